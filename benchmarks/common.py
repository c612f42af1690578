"""What the benchmarks share: child processes with their own peak memory, tables, the environment, result files.

Every variant runs in a fresh child process, so that its memory is its own and nothing is warm from the one before. A child is the same
script with `--variant`; its last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arciva_assistant_poc as arciva

RESULTS = ROOT / "benchmarks" / "results"


def run_child(script: Path, arguments: Sequence[str], timeout: float | None = None) -> dict:
    """The JSON object that `python script *arguments` prints last; what it prints before is shown when it fails.

    `timeout` in seconds; a child that takes longer is ended and is an `ArcivaError`.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise arciva.ArcivaError(f"{' '.join(command[1:])} was ended after {timeout:.0f} s") from error
    if done.returncode == 2:  # one sentence that says what to put right
        raise arciva.ArcivaError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise arciva.ArcivaError(f"{' '.join(command[1:])} ended with {done.returncode}, expected 0; see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interleave(script: Path, variants: dict[str, Sequence[str]], repeats: int) -> dict[str, list[dict]]:
    """Each variant's results over `repeats` rounds; every other round runs the variants backwards."""
    results = {name: [] for name in variants}
    for round_ in range(repeats):
        for name in list(variants)[:: -1 if round_ % 2 else 1]:
            results[name].append(run_child(script, ["--variant", name, *variants[name]]))
            print(f"round {round_ + 1} of {repeats}  {name}", file=sys.stderr, flush=True)
    return results


def process_memory() -> dict[str, float]:
    """GiB of this process: `VmRSS` and its peak `VmHWM`, mapped files included, and `RssAnon` without them."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {name: int(kib) / 2**20 for name, kib in re.findall(r"(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", status)}


def measured(work: Callable[[], dict]) -> dict:
    """What `work` returns, and `peak_gib`: the largest memory while it ran above what the process had before (the imports)."""
    gc.collect()
    with contextlib.suppress(OSError):  # forget the peak of the imports; kernels without this keep it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = process_memory()["VmRSS"]
    result = work()
    return {**result, "peak_gib": process_memory()["VmHWM"] - before}


def trained_adapter(adapter: str, base_model: str, data: str, folder: str, *, epochs: float | None = None) -> str:
    """`adapter` where it holds one of this very base, else one that the local script now trains in `folder`."""
    manifest = Path(adapter) / "manifest.json"
    if manifest.is_file() and arciva.read_manifest(adapter).get("base_fingerprint") == arciva.base_fingerprint(
        base_model
    ):
        return adapter
    print(f"no adapter of {base_model} in {adapter}: one is trained first", flush=True)
    paths = {name: f"{folder}/{name}" for name in ("output_dir", "reports_dir", "checkpoint_dir")}
    flags = {"stages": "train", "base_model": base_model, "data": data, **paths} | (
        {"epochs": epochs} if epochs else {}
    )
    command = [sys.executable, str(ROOT / "train_arciva_assistant_local.py")]
    done = subprocess.run(
        [*command, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise arciva.ArcivaError(f"no adapter could be trained: {done.stderr.strip().splitlines()[-1]}")
    return paths["output_dir"]


def figure(value: float) -> str:
    """Three significant digits, whole numbers from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median and range: `12.3 (11.9..12.8)`."""
    median, low, high = (figure(v) for v in (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} ({low}..{high})"


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Ours over the peer's, round by round: both ran next to each other."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def not_learned(before: float, after: float, norms: Sequence[float]) -> str | None:
    """Why a training run does not count as one, None for a run that learned; losses in nats per token."""
    finite = [norm for norm in norms if math.isfinite(norm)]  # a loss scaler skips its first steps, which overflow
    if not finite or min(finite) <= 0:
        return f"gradient norm {min(finite, default=math.nan):.3g}"
    return None if after < before else f"loss {before:.3g} → {after:.3g}"


def verdict(goal: str, value: float, bound: float, *, at_most: bool = False) -> str:
    """One line: the goal, what was measured, and whether it is met."""
    met = value <= bound if at_most else value >= bound
    return f"goal {goal} {'≤' if at_most else '≥'} {figure(bound)}: {figure(value)}, {'met' if met else 'MISSED'}"


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table whose columns line up as plain text too."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def commit() -> str:
    """The commit that ran, `-dirty` where tracked files other than results differ from it; outside a clone what ARCIVA_COMMIT says."""
    if not (ROOT / ".git").exists():
        return os.environ.get("ARCIVA_COMMIT", "unknown")
    found = []
    for asked in ("rev-parse --short HEAD", "status --porcelain --untracked-files=no -- . :!benchmarks/results"):
        try:
            done = subprocess.run(["git", *asked.split()], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return "unknown"
        found.append(done.stdout.strip())
    return (found[0] + ("-dirty" if found[1] else "")) or "unknown"


def data_fingerprints() -> dict[str, str]:
    """Hash of each corpus and of the embedded base, by name."""
    files = [ROOT / "data" / f"arciva_qa_{name}.jsonl" for name in ("synthetic", "extended")]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files if path.exists()}
    return found | {"nano_base": arciva.base_fingerprint(str(ROOT / "data/nano_base"))}


def environment() -> dict:
    """Device, threads, Python, package versions, commit and data that the figures belong to."""
    hardware, versions = arciva.detect_hardware(), arciva.package_versions()
    for name in ("trl", "liger-kernel", "flash-attn", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return {
        "device": hardware.name,
        "processor": model[1] if model else platform.processor(),
        "memory_gib": round(hardware.memory_gib, 1),
        "format": str(hardware.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "data": data_fingerprints(),
    }


def describe(environment: dict) -> str:
    """The environment in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['device']} ({environment['processor']}), {environment['memory_gib']} GiB, {environment['format']}\n"
        f"Python {environment['python']}, {versions}, commit {environment['commit']}"
    )


def device_slug() -> str:
    """`cpu`, or the GPU's name in a form that fits a file name."""
    hardware = arciva.detect_hardware()
    return "cpu" if hardware.device == "cpu" else re.sub(r"[^a-z0-9]+", "-", hardware.name.lower()).strip("-")


def save(name: str, payload: dict, out: Path | None = None) -> Path:
    """Write the result with its environment to `out`, by default `benchmarks/results/<name>-<device>.json`."""
    path = Path(out) if out else RESULTS / f"{name}-{device_slug()}.json"
    arciva.write_atomic(path, json.dumps({"environment": environment(), **payload}, indent=1) + "\n")
    return path


def parser(text: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=3, help="rounds over all variants")
    made.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    made.add_argument("--out", type=Path, help="result file, else benchmarks/results/<name>-<device>.json")
    made.add_argument("--variant", help=argparse.SUPPRESS)
    return made


def run(options: argparse.Namespace, child: Callable[[], dict], parent: Callable[[], Path]) -> int:
    """Exit code of a benchmark: a child measures one variant and prints it as JSON last, the parent compares."""
    if not options.variant:
        return arciva.run_main(lambda: {"results": parent()})
    arciva.quieten_libraries()
    try:
        print(json.dumps(measured(child)))
    except arciva.ArcivaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
