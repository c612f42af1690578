"""The benchmarks run at small sizes, compare what they say they compare, and build the model they claim to."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

import arciva_assistant_poc as arciva

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import merge
import peers
import train_gpu

import data


def test_a_spread_is_the_median_with_its_range():
    assert common.spread([3.0, 1.0, 2.0]) == "2 (1..3)" and common.spread([1234.4]) == "1,234"


def test_ratios_pair_the_rounds():
    assert common.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_table_is_markdown_with_every_column():
    lines = common.table([{"a": 1, "b": 22}, {"a": 333, "c": 4}]).splitlines()
    assert lines[0].split("|")[1:-1] == [" a   ", " b  ", " c "] and set(lines[1]) <= set("|-")
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_child_that_fails_fails_the_benchmark(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import sys; sys.exit('boom')")
    with pytest.raises(arciva.ArcivaError, match="ended with 1"):
        common.run_child(script, [])


def test_rounds_alternate_their_order(tmp_path):
    log, script = tmp_path / "log", tmp_path / "child.py"
    script.write_text(f"import sys; open({str(log)!r}, 'a').write(sys.argv[2]); print('{{}}')")
    common.interleave(script, {"a": [], "b": []}, 3)
    assert log.read_text() == "abbaab"


def test_memory_is_counted_above_what_was_there_before():
    found = common.measured(lambda: {"size": len(bytearray(200 << 20))})
    assert 0.15 < found["peak_gib"] < 0.5


def test_the_clock_leaves_out_the_first_step_and_evaluations(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 50.0, 52.0])
    clock = peers.StepClock(skip=1)
    monkeypatch.setattr(clock, "mark", lambda: next(times))
    state, control = Namespace(global_step=1), Namespace()
    for step, event in ((1, "step"), (2, "step"), (3, "step"), (3, "evaluate"), (4, "step")):
        state.global_step = step
        {"step": clock.on_step_end, "evaluate": clock.on_evaluate}[event](None, state, control)
    assert (clock.steps, clock.seconds) == (3, 10.0 + 1.0 + 2.0)


def test_a_merge_is_shown_with_its_ratio_where_peft_ran_too():
    results = {merge.ORIGINAL: [{"seconds": 2.0, "gib": 1.0, "peak_gib": 0.5, "anonymous_gib": 0.4}]}
    assert "times peft's seconds" not in merge.line(merge.ORIGINAL, results)
    results[merge.PEFT] = [{"seconds": 4.0, "gib": 1.0, "peak_gib": 5.0, "anonymous_gib": 4.0}]
    line = merge.line(merge.ORIGINAL, results)
    assert line["times peft's seconds"].startswith("0.5") and line["times peft's peak"].startswith("0.1")


def test_a_peer_trains_without_what_ours_adds_to_the_model(tiny_config, cpu):
    def hooks(model) -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    model = arciva.add_adapter(arciva.load_base_model(tiny_config, cpu), tiny_config)
    assert hooks(model) > 1
    model = peers.as_peers_load(model)
    assert hooks(model) == 0 and model.config._attn_implementation == "sdpa"


def test_made_up_rows_load_and_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    data.write_corpus(path, 205, str(ROOT / "data/arciva_qa_synthetic.jsonl"), seed=0)
    found = data.measure(str(path), str(ROOT / "data/nano_base"))
    assert found["rows"] == 205 and found["tokens"] > 205


# --- the 7B shapes at a size that fits a test --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hardware():
    return arciva.detect_hardware()


def test_random_weights_are_nf4_and_have_the_shape_of_a_loaded_model(hardware):
    shape = train_gpu.SHAPES["tiny"]
    model = train_gpu.random_nf4_model(shape, hardware, "sdpa")
    plain = AutoModelForCausalLM.from_config(shape)
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} == linear
    assert all(model.get_submodule(name).weight.bnb_quantized for name in linear)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "mistral-7b", "llama-3.1-8b"])
def test_the_shapes_have_the_published_numbers_of_weights(name):
    """Parameters of the model cards, in millions."""
    published = {"qwen2.5-7b": 7615.6, "mistral-7b": 7248.0, "llama-3.1-8b": 8030.3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(train_gpu.SHAPES[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == published[name]


def test_layouts_are_read():
    assert train_gpu.read_layout("128x1024", "sdpa") == (128, 1024)
    assert train_gpu.read_layout("16xpadded", "sdpa") == (16, 1)
    assert train_gpu.read_layout("16x1024", "flash_attention_2")[1] > 1e9
    with pytest.raises(arciva.ArcivaError, match="pairs x row length"):
        train_gpu.read_layout("many", "sdpa")


def test_a_device_s_peak_is_found_by_its_whole_name():
    assert train_gpu.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert train_gpu.peak_flops("NVIDIA L4") == 121e12 and train_gpu.peak_flops("NVIDIA A10") == 125e12
    assert train_gpu.peak_flops("Tesla T4") == 65e12 and train_gpu.peak_flops("Some GPU") is None


@pytest.mark.parametrize("variant", ["8xpadded sdpa plain", "8x256 eager checkpointing"])
def test_a_gpu_variant_trains_at_a_small_shape(tmp_path, variant):
    options = Namespace(variant=variant, shape="tiny", steps=2, folder=tmp_path)
    options.data = str(ROOT / "data/arciva_qa_synthetic.jsonl")
    found = train_gpu.child(options)
    assert found["steps"] == 2 and found["tokens_per_second"] > 0 and found["estimated_gib"] > 0
    assert found["loss_after"] < found["loss_before"] and min(found["gradient_norms"]) > 0


def test_a_layout_that_does_not_fit_says_so(tmp_path, monkeypatch):
    options = Namespace(variant="8x256 sdpa plain", shape="tiny", steps=1, folder=tmp_path)
    options.data = str(ROOT / "data/arciva_qa_synthetic.jsonl")

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(arciva, "answer_loss", full)
    assert train_gpu.child(options) == {"out_of_memory": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["train_cpu.py"],
        ["train_gpu.py", "--shape", "tiny"],
        ["generate.py"],
        ["merge.py"],
        ["data.py"],
        ["first_step.py"],
        ["leak.py"],
    ],
    ids=lambda command: command[0],
)
def test_every_benchmark_runs_from_its_command(tmp_path, command):
    pytest.importorskip("trl", reason="pip install -r requirements-bench.txt")
    out = tmp_path / "result.json"
    script, *flags = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *flags, "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["environment"]["versions"]["torch"]
