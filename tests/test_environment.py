"""Sections 1 and 2: pins, import, configuration, hardware. Run: pytest tests/test_environment.py"""

import ast
import re
from pathlib import Path

import httpx2
import pytest
import torch
from conftest import ROOT

import arciva_assistant_poc as arciva


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r'(?m)(?:^|")([A-Za-z0-9_.-]+)==([\w.+]+)', text))


def test_first_cell_pins_what_requirements_pin():
    source = (ROOT / "arciva_assistant_poc.py").read_text()
    first_cell = source[source.index('"skip-execution"') : source.index("## 2. Library Imports")]
    installed, required = pins(first_cell), pins((ROOT / "requirements.txt").read_text())
    assert installed and {name: required.get(name) for name in installed} == installed
    assert "torch" not in installed and "numpy" not in installed and "pandas" not in installed


def test_importing_only_defines():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse((ROOT / "arciva_assistant_poc.py").read_text()).body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        logger = isinstance(node, ast.Expr) and ast.unparse(node).startswith("logging.getLogger")
        assert isinstance(node, allowed) or guard or logger, f"line {node.lineno}: {ast.unparse(node)[:80]}"


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
    ],
)
def test_a_wrong_setting_is_named(cpu, setting, words):
    with pytest.raises(arciva.ArcivaError, match=words):
        arciva.configure(cpu, base_model="nano", **setting)


def test_an_unfinished_folder_never_takes_the_final_name(tmp_path):
    final = tmp_path / "out"
    with arciva.atomic_folder(final) as folder:
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
