"""Prove requirements.vertex-ai.txt: a fresh environment installs it, every hash checked, and runs the Vertex script's smoke job.

    python tools/prove_lock.py [--keep FOLDER]

The container's base image brings torch and CUDA. Here torch comes from requirements.txt's pin, so the lock's CUDA build and what
belongs to it are left out; everything else is installed as the container's build does, `pip check` included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = re.compile(r"(torch|triton|liger-kernel|nvidia-[^=]*|cuda-[^=]*)==")


def blocks(lock: str) -> list[str]:
    """The lock's requirements, each with its hashes."""
    return [block for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE) if block[:1] not in ("", "#")]


def without_torch(lock: str) -> tuple[str, list[str]]:
    """(the lock without torch's CUDA build, names of what was left out)."""
    kept = [block for block in blocks(lock) if not OF_TORCH.match(block)]
    return "".join(kept), [block.split("==")[0] for block in blocks(lock) if OF_TORCH.match(block)]


def install(folder: Path) -> Path:
    """The Python of a new environment with torch and the rest of the lock."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    lock, left_out = without_torch((ROOT / "requirements.vertex-ai.txt").read_text())
    (folder / "lock.txt").write_text(lock)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", torch], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--require-hashes", "-r", str(folder / "lock.txt")], check=True)
    subprocess.run([*pip, "check"], check=True)
    print(f"installed     {len(blocks(lock))} requirements by hash, {torch} beside; left out: {', '.join(left_out)}")
    return python


def size_of(folder: Path) -> float:
    """GiB of all files below, each counted once."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 2**30


def smoke_job(python: Path, folder: Path, rows: int) -> dict[str, dict]:
    """Run the job on the first rows of the seed corpus with the nano base; the manifests of what it left, by folder."""
    lines = (ROOT / "data" / "arciva_qa_synthetic.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    flags = {
        "base-model": "data/nano_base", "data": folder / "pairs.jsonl", "output": folder / "output", "work": folder / "work",
        "logs": folder / "logs", "epochs": 1, "max-new-tokens": 8, "max-eval-rows": 16,
    }  # fmt: skip
    command = [
        python,
        ROOT / "train_arciva_assistant_vertex.py",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("AIP_", "GCS_", "CLOUD_ML_", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(command, cwd=ROOT, env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the smoke job ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    assert (folder / "output" / "COMPLETE.json").is_file()
    return {
        name: json.loads((folder / "output" / name / "manifest.json").read_text())
        for name in ("model_output", "final_merged_model")
    }


def prove(folder: Path, rows: int) -> None:
    """Install, run, and print the figures."""
    started = time.perf_counter()
    python = install(folder)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    print(
        f"environment   {len(json.loads(listed.stdout))} packages, {size_of(folder / 'venv'):.2f} GiB, {time.perf_counter() - started:.0f} s"
    )
    started = time.perf_counter()
    manifests = smoke_job(python, folder, rows)
    training = manifests["model_output"]["training"]
    print(
        f"smoke job     {training['steps']} steps, held-out loss {training['best_loss']:.3f}, merged, {time.perf_counter() - started:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    parser.add_argument("--rows", type=int, default=240, help="rows of the seed corpus that the smoke job trains on")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True)
        prove(options.keep.resolve(), options.rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            prove(Path(folder), options.rows)


if __name__ == "__main__":
    main()
