"""The local script, from flags to exit codes. Run: pytest tests/test_cli.py"""

import errno
import json
import subprocess
import sys
import typing
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from safetensors import SafetensorError

import arciva_assistant_poc as arciva
import train_arciva_assistant_local as local
import train_arciva_assistant_vertex as vertex


def flags(config: arciva.Config) -> list[str]:
    default = arciva.Config()
    return [
        part
        for f in fields(config)
        if (value := getattr(config, f.name)) != getattr(default, f.name)
        for part in (f"--{f.name}", str(value))
    ]


def test_every_setting_is_a_flag_and_only_given_ones_count():
    for f in fields(arciva.Config):
        kind = next(iter(typing.get_args(f.type)), f.type)  # float of float | None
        value = {int: "7", float: "0.5", bool: "true"}.get(kind, "x")
        assert set(vars(local.parse_arguments([f"--{f.name}", value]))) == {f.name, "stages"}
    assert set(vars(local.parse_arguments([]))) == {"stages"}


def test_the_stages_run_together_and_one_by_one_from_disk(tiny_config, capsys):
    arguments = flags(tiny_config)
    assert arciva.run_main(lambda: local.run(arguments)) == 0
    assert "merged model" in capsys.readouterr().out
    reports, merged = Path(tiny_config.reports_dir), Path(tiny_config.merged_dir)
    assert {"metrics.json", "metrics.csv", "predictions.jsonl", "loss.csv", "loss.png", "dashboard.csv"} <= {
        p.name for p in reports.iterdir()
    }
    assert {"model.safetensors", "config.json", "manifest.json", "README.md", "tokenizer.json"} <= {
        p.name for p in merged.iterdir()
    }
    manifest = json.loads((merged / "manifest.json").read_text())
    # A few questions to a barely trained random model: fp16 may tip one near-tie; the perplexities tell a wrong merge.
    assert manifest["verification"]["equal_answers"] >= 0.7
    assert manifest["verification"]["perplexity_merged"] == pytest.approx(
        manifest["verification"]["perplexity_adapter"], rel=0.01
    )
    assert not Path(tiny_config.checkpoint_dir, "x").exists() and not list(
        Path(tiny_config.checkpoint_dir).glob("*/checkpoint-*")
    )
    first = arciva.load_predictions(tiny_config.reports_dir)
    for stage in ("evaluate", "dashboard", "merge"):
        assert arciva.run_main(lambda stage=stage: local.run([*arguments, "--stages", stage])) == 0
    pd.testing.assert_frame_equal(arciva.load_predictions(tiny_config.reports_dir), first)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
        (["--base_model", "no_such_folder/model"], "no_such_folder/model"),
        (["--rank", "0"], "rank is 0"),
        (["--stages", "dashboard"], "run the evaluate stage first"),
        (["--stages", "merge"], "train first"),
        (["--max_length", "3"], "raise max_length"),
    ],
)
def test_what_a_user_gets_wrong_ends_with_one_sentence_and_code_2(tiny_config, capsys, monkeypatch, extra, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert arciva.run_main(lambda: local.run([*flags(tiny_config), *extra])) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not Path(tiny_config.output_dir).exists() and not Path(tiny_config.merged_dir).exists()


@pytest.mark.parametrize("flag", ["--epocks", "--epoch"])  # a misspelling, and a beginning that would fit
def test_a_wrong_flag_shows_its_name(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        local.parse_arguments([flag, "3"])
    assert caught.value.code == 2 and f"arguments: {flag}" in capsys.readouterr().err


def test_one_folder_holds_all_of_a_run_but_what_is_named(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(arciva, "run_pipeline", lambda config, stages: seen.append(config) or {})
    local.run(["--base_model", "nano", "--output", str(tmp_path), "--reports_dir", "elsewhere"])
    folders = {k: v for k, v in asdict(seen[0]).items() if k.endswith("_dir")}
    assert folders == {
        "output_dir": f"{tmp_path}/model_output", "merged_dir": f"{tmp_path}/final_merged_model",
        "reports_dir": "elsewhere", "checkpoint_dir": f"{tmp_path}/checkpoints",
    }  # fmt: skip
    assert vertex.RESULT_FOLDERS.items() <= {f.name: f.default for f in fields(arciva.Config)}.items()


def test_help_explains_every_setting():
    done = subprocess.run(
        [sys.executable, "train_arciva_assistant_local.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in asdict(arciva.Config()))
    assert "SUPPRESS" not in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_one_sentence(error, capsys):
    def run():
        raise error

    assert arciva.run_main(run) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


def test_a_missed_threshold_ends_the_run_before_the_merge(tiny_config, capsys):
    assert arciva.run_main(lambda: local.run([*flags(tiny_config), "--min-rouge-l", "0.99"])) == 2
    assert "not accepted: rouge_l is 0" in capsys.readouterr().err
    assert Path(tiny_config.reports_dir, "dashboard.html").exists() and not Path(tiny_config.merged_dir).exists()
    summary = json.loads(Path(tiny_config.reports_dir, "suites.json").read_text(), parse_constant=pytest.fail)
    assert summary["adapter"] == json.loads(Path(tiny_config.reports_dir, "metrics.json").read_text())["adapter"]
    accepted = [*flags(tiny_config), "--stages", "merge", "--min-rouge-l", "0"]
    assert arciva.run_main(lambda: local.run(accepted)) == 0
