"""Sections 1 and 2: pins, import, configuration, hardware. Run: pytest tests/test_environment.py"""

import ast
import contextlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import jupytext
import pytest
import torch
from conftest import ROOT

import arciva_assistant_poc as arciva


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r'(?m)(?:^|["\s])([A-Za-z0-9_.-]+)==([\w.+]+)', text))


def test_first_cell_pins_what_requirements_pin():
    source = (ROOT / "arciva_assistant_poc.py").read_text()
    first_cell = source[source.index('"skip-execution"') : source.index("## 2. Library Imports")]
    installed = pins(first_cell)
    required = pins((ROOT / "requirements.txt").read_text()) | pins((ROOT / "requirements-gpu.txt").read_text())
    assert installed and {name: required.get(name) for name in installed} == installed
    assert "torch" not in installed and "numpy" not in installed and "pandas" not in installed


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({}, None),
        ({"peft": "0.17.0"}, "peft is 0.17.0, expected"),
        ({"rouge-score": None}, "rouge-score is missing, expected"),
        ({"torch": "2.5.1"}, "torch is 2.5.1, expected"),
        ({"torch": None}, "torch is missing, expected"),
    ],
)
def test_the_first_cell_notices_what_pip_could_not_install(installed, words, monkeypatch):
    """As in an image whose own packages conflict: pip says so and ends, and the notebook must not go on."""
    notebook = jupytext.read(ROOT / "arciva_assistant_poc.ipynb")
    cell = next(c.source for c in notebook.cells if "skip-execution" in c.metadata.get("tags", []))
    commands = []
    monkeypatch.setattr(shutil, "which", lambda name: None)  # a machine without a GPU
    source = re.sub(r"(?m)^(\s*)%pip (.*)$", r"\1pip(f'\2')", cell)
    required = pins((ROOT / "requirements.txt").read_text()) | {"ipykernel": "7.0.0", "torchao": "0.10.0"} | installed

    def version(name: str) -> str:
        if required[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return required[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match=words) if words else contextlib.nullcontext():
        exec(source, {"pip": commands.append})
    assert words or [command.split()[0] for command in commands] == ["install", "uninstall"]
    if commands:  # the image's own torch, numpy and pandas stay
        constraints = Path(re.search(r"-c (\S+)", commands[0])[1]).read_text().splitlines()
        assert {f"{name}=={version(name)}" for name in ("torch", "numpy", "pandas")} <= set(constraints)
        assert "torch==" not in commands[0]


def test_the_first_cell_installs_triton_s_kernels_on_a_gpu_alone(monkeypatch):
    notebook = jupytext.read(ROOT / "arciva_assistant_poc.ipynb")
    cell = next(c.source for c in notebook.cells if "skip-execution" in c.metadata.get("tags", []))
    required = pins((ROOT / "requirements.txt").read_text()) | pins((ROOT / "requirements-gpu.txt").read_text())
    required |= {"ipykernel": "7.0.0", "torchao": "0.17.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: required[name])
    for found, installed in ((None, False), ("/usr/bin/nvidia-smi", True)):
        commands = []
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        exec(re.sub(r"(?m)^(\s*)%pip (.*)$", r"\1pip(f'\2')", cell), {"pip": commands.append})
        assert ("liger-kernel==" in commands[0]) == installed


DEFINING_CALLS = set(
    "set Path globals re.compile dict.fromkeys functools.partial MetricSpec mean_of counted_by pairwise share_of "
    "rouge_scorer.RougeScorer UnicodeWords sacrebleu.BLEU sacrebleu.CHRF".split()
)


def calls_at_import(value: ast.AST) -> set[str]:
    """Names of what is called when the value is computed; methods of literals and bodies of lambdas aside."""
    found, waiting = set(), [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name)
        ):
            found.add(ast.unparse(node.func))
        waiting += ast.iter_child_nodes(node)
    return found


def test_importing_only_defines():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse((ROOT / "arciva_assistant_poc.py").read_text()).body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        logger = isinstance(node, ast.Expr) and ast.unparse(node).startswith("logging.getLogger")
        assert isinstance(node, allowed) or guard or logger, f"line {node.lineno}: {ast.unparse(node)[:80]}"
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            assert calls_at_import(node.value) <= DEFINING_CALLS, f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_importing_says_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import arciva_assistant_poc"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_the_module_as_a_program_runs_the_whole_pipeline(monkeypatch):
    guard = ast.parse((ROOT / "arciva_assistant_poc.py").read_text()).body[-1]
    assert ast.unparse(guard.body) == "sys.exit(run_main(run_with_defaults))"
    assert ast.unparse(guard.test) == "__name__ == '__main__' and (not running_in_notebook())"
    assert inspect.signature(arciva.run_pipeline).parameters["stages"].default == arciva.STAGES
    given = []
    monkeypatch.setattr(arciva, "run_pipeline", lambda config: given.append(config) or {})
    assert arciva.run_main(arciva.run_with_defaults) == 0
    assert given == [arciva.configure(arciva.detect_hardware())[0]]


def test_scripts_define_no_training_scoring_or_merging():
    source = ast.parse((ROOT / "train_arciva_assistant_local.py").read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"torch", "peft", "bitsandbytes", "safetensors", "sacrebleu"}
    assert len((ROOT / "train_arciva_assistant_local.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize(
    ("device", "capability", "cpu_bf16", "expected"),
    [
        ("cuda", (7, 5), False, torch.float16),  # T4: bf16 would be emulated
        ("cuda", (8, 0), False, torch.bfloat16),  # A100
        ("cuda", (9, 0), False, torch.bfloat16),  # H100
        ("cpu", (0, 0), True, torch.bfloat16),
        ("cpu", (0, 0), False, torch.float32),
    ],
)
def test_compute_format_follows_capability(device, capability, cpu_bf16, expected):
    assert arciva.choose_dtype(device, capability, cpu_bf16=cpu_bf16)[0] == expected


@pytest.mark.parametrize(
    ("device", "memory", "debug", "reachable", "profile"),
    [
        ("cuda", 80, False, True, "full"),
        ("cuda", 14.6, False, True, "full"),  # a T4 reports 14.6 GiB
        ("cuda", 8, False, True, "debug"),
        ("cuda", 80, True, True, "debug"),
        ("cuda", 80, False, False, "nano"),
        ("cpu", 64, False, True, "nano"),
    ],
)
def test_profile_follows_hardware_and_names_its_reason(device, memory, debug, reachable, profile):
    hardware = arciva.Hardware(device, "x", memory, torch.float32, "")
    chosen, model, reason = arciva.choose_profile("auto", debug, hardware, reachable=lambda _: reachable)
    assert (chosen, model) == (profile, arciva.PROFILES[profile])
    assert reason


def test_a_refused_token_is_no_missing_network(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(*_, **__):
        request = httpx2.Request("GET", "https://huggingface.co/api/models/nobody")
        raise HfHubHTTPError("401", response=httpx2.Response(401, request=request))

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(arciva.ArcivaError, match="HF_TOKEN"):
        arciva.hub_reachable("nobody/no-such-model")


def test_the_nano_base_is_found_beside_the_module_and_never_looked_up_on_the_hub(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(arciva.configure(cpu)[0].base_model).is_dir()
    monkeypatch.setattr(arciva, "REPOSITORY", tmp_path)
    with pytest.raises(arciva.ArcivaError, match="clone the repository"):
        arciva.configure(cpu)


def test_a_preset_yields_to_what_was_set(cpu):
    config, _ = arciva.configure(cpu, base_model="nano", rank=8, epochs=None)
    assert config.rank == 8
    assert config.epochs == arciva.PRESETS["nano"]["epochs"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rnak": 8}, "unknown settings"),
        ({"rank": 0}, "rank is 0"),
        ({"resume": "maybe"}, "resume is 'maybe'"),
        ({"pairs_per_step": 16, "micro_batch_pairs": 5}, "multiple of micro_batch_pairs"),
        ({"merge_base": "4bit"}, "merge_base is '4bit'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"dropout": 1.5}, "dropout is 1.5, expected 0 or more and below 1"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"micro_batch_pairs": -4}, "micro_batch_pairs is -4"),
        ({"seed": -1}, "seed is -1"),
        ({"report_to": "tensorbord"}, "report_to is 'tensorbord'"),
        ({"epochs": "3"}, "epochs is '3', expected float"),
        ({"rank": 8.5}, "rank is 8.5, expected int"),
        ({"rank": True}, "rank is True"),
        ({"not_worse_than_base": "yes"}, "not_worse_than_base is 'yes', expected bool"),
        ({"min_rouge_l": 40.0}, "min_rouge_l is 40.0, expected a figure from 0 to 1"),
        ({"min_bleu": float("nan")}, "min_bleu is nan, expected a figure from 0 to 100"),
        ({"output_dir": "out", "merged_dir": "out"}, "lies in output_dir"),
        ({"output_dir": "out", "reports_dir": "out/reports"}, "reports_dir .* lies in output_dir"),
        ({"output_dir": "."}, "lies in output_dir"),
    ],
)
def test_a_wrong_setting_is_named(cpu, setting, words):
    with pytest.raises(arciva.ArcivaError, match=words):
        arciva.configure(cpu, base_model="nano", **setting)


def test_whole_numbers_count_as_figures_and_no_threshold_is_refused(cpu):
    config, _ = arciva.configure(cpu, base_model="nano", epochs=2, min_bleu=40, min_rouge_l=1)
    assert (config.epochs, config.min_bleu, config.min_exact_match) == (2, 40, None)
    assert isinstance(config.epochs, float)  # as from the command line: one run, whose checkpoints are found


def test_the_settings_line_holds_what_counts(cpu):
    line = arciva.settings_line(arciva.configure(cpu, base_model="nano", epochs=2)[0])
    assert f"rank {arciva.PRESETS['nano']['rank']}" in line and "epochs 2" in line and "seed 42" in line


def test_an_unfinished_folder_never_takes_the_final_name(tmp_path):
    final = tmp_path / "out"
    with arciva.atomic_folder(final) as folder:
        (folder / "manifest.json").write_text("{}")
        (folder / "a").write_text("whole")
    with pytest.raises(RuntimeError), arciva.atomic_folder(final) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (final / "a").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unwritable_output_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(arciva.ArcivaError, match="cannot write to"), arciva.atomic_folder(tmp_path / "file" / "out"):
        raise AssertionError("the folder cannot exist")
    with pytest.raises(arciva.ArcivaError, match="cannot write"):
        arciva.write_atomic(Path(tmp_path / "file" / "x.txt"), "text")


def test_a_folder_that_no_run_made_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(arciva.ArcivaError, match=r"holds no manifest\.json"), arciva.atomic_folder(tmp_path / "mine"):
        raise AssertionError("nothing may be written")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    with arciva.atomic_folder(tmp_path / "empty") as folder:
        (folder / "manifest.json").write_text("{}")
    assert (tmp_path / "empty" / "manifest.json").is_file()


def test_a_place_that_takes_no_results_is_named_before_training(tmp_path, tiny_config):
    (tmp_path / "file").write_text("")
    for name in arciva.FOLDERS:
        with pytest.raises(arciva.ArcivaError, match=f"cannot write {name}"):
            arciva.run_pipeline(replace(tiny_config, **{name: str(tmp_path / "file" / "below")}))
