"""The benchmarks run at small sizes, compare what they say they compare, and build the model they claim to."""

import inspect
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
import first_step
import gpu_kernels
import merge
import peers
import train_cpu
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


def test_a_child_that_takes_too_long_is_one_sentence(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(arciva.ArcivaError, match="was ended after 1 s"):
        common.run_child(script, [], timeout=1)


@pytest.mark.parametrize(
    ("before", "after", "norms", "reason"),
    [
        (2.0, 1.0, [0.5, 0.1], None),
        (2.0, 1.0, [float("inf"), 0.1], None),  # the loss scaler's first steps
        (2.0, 1.0, [0.5, 0.0], "gradient norm 0"),
        (2.0, 1.0, [], "gradient norm nan"),
        (2.0, 2.0, [0.5], "loss 2 → 2"),
        (2.0, float("nan"), [0.5], "loss 2 → nan"),
    ],
)
def test_a_run_counts_only_if_its_loss_fell_and_gradients_flowed(before, after, norms, reason):
    assert common.not_learned(before, after, norms) == reason


def test_a_goal_is_said_to_be_met_or_missed():
    assert common.verdict("speed", 3.1, 3) == "goal speed ≥ 3: 3.1, met"
    assert common.verdict("memory", 1.3, 1.2, at_most=True) == "goal memory ≤ 1.2: 1.3, MISSED"


def test_results_name_their_commit_and_their_data():
    found = common.environment()
    assert found["commit"] and len(found["data"]["arciva_qa_synthetic.jsonl"]) == 12 and found["data"]["nano_base"]


def test_memory_is_counted_above_what_was_there_before():
    found = common.measured(lambda: {"size": len(bytearray(200 << 20))})
    assert 0.15 < found["peak_gib"] < 0.5


def test_the_clock_leaves_out_the_first_step_and_evaluations(monkeypatch):
    times = iter([-5.0, 0.0, 10.0, 11.0, 50.0, 52.0])
    clock = peers.StepClock(skip=1)
    monkeypatch.setattr(clock, "mark", lambda: next(times))
    state, control = Namespace(global_step=1), Namespace()
    clock.on_train_begin(None, state, control)
    for step, event in ((1, "step"), (2, "step"), (3, "step"), (3, "evaluate"), (4, "step")):
        state.global_step = step
        {"step": clock.on_step_end, "evaluate": clock.on_evaluate}[event](None, state, control)
    assert (clock.steps, clock.seconds, clock.cold_seconds) == (3, 10.0 + 1.0 + 2.0, 5.0)


def test_the_gpu_peak_is_that_of_the_training_steps(monkeypatch):
    """Loading peaked at 900 and an evaluation at 800; the steps at 300 and 500."""
    peak = {"now": 900}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak["now"])
    clock, state = peers.StepClock(), Namespace(global_step=0)
    for largest in (300, 500):
        clock.on_step_begin(None, state, None)
        peak["now"] = largest
        clock.on_step_end(None, state, None)
        peak["now"] = 800
    assert clock.gpu_peak == 500


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


def test_a_peer_whose_base_is_loaded_in_16_bits_computes_in_them_everywhere(tiny_config):
    """fp32 norms would hand fp32 to every projection: a handicap that no user of TRL has."""
    hardware = arciva.Hardware("cpu", "test", 8.0, torch.bfloat16, "")
    model = arciva.add_adapter(arciva.load_base_model(tiny_config, peers.As16Bit(**vars(hardware))), tiny_config)
    model, seen = peers.as_peers_load(model), set()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.register_forward_hook(lambda m, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    with hardware.autocast():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    with peers.in_fp32(model):
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_peer_is_tried_in_both_formats_where_16_bits_are_not_how_ours_loads():
    cpu, gpu = (arciva.Hardware(device, "test", 8.0, torch.bfloat16, "") for device in ("cpu", "cuda"))
    assert peers.load_formats(cpu) == ["bfloat16", "float32"] and peers.load_formats(gpu) == ["bfloat16"]
    assert peers.load_formats(arciva.Hardware("cpu", "test", 8.0, torch.float32, "")) == ["float32"]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_trl_s_16_bit_adapters_are_fp32_where_a_loss_scaler_is_at_work(tiny_config, tmp_path, dtype, expected):
    pytest.importorskip("trl", reason="pip install -r requirements-bench.txt")
    hardware = arciva.Hardware("cpu", "test", 8.0, dtype, "")
    splits, _ = arciva.split_examples(arciva.load_examples(tiny_config.data)[0], tiny_config.seed)
    model = arciva.add_adapter(arciva.load_base_model(tiny_config, hardware), tiny_config)
    tokenizer = arciva.load_tokenizer(tiny_config.base_model)
    trainer = peers.trl_trainer(model, tokenizer, splits["train"], tiny_config, hardware, str(tmp_path))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {expected}


def test_the_fastest_peer_is_one_that_learned():
    found = {"a": [{"tokens_per_second": 9.0, "not_learned": "gradient norm 0"}]}
    with pytest.raises(arciva.ArcivaError, match="no peer learned"):
        train_cpu.fastest(found)
    found |= {n: [{"tokens_per_second": s, "not_learned": None}] for n, s in (("b", 2.0), ("c", 3.0))}
    assert train_cpu.fastest(found) == "c"


def test_a_run_that_did_not_learn_is_compared_with_nothing():
    def run(speed: float, problem: str | None = None) -> list[dict]:
        losses = {"held_out_before": 2.0, "held_out_after": 1.0, "losses": [3.0, 1.0], "gradient_norms": [0.5]}
        fixed = {"shape": "", "peak_gib": 1.0, "steps": 4} | losses
        return [{"tokens_per_second": speed, "not_learned": problem, **fixed}]

    results = {"ours": run(9.0), "trl-padded": run(3.0), "trl-bfd-512": run(1.0, "gradient norm 0")}
    lines = train_cpu.verdicts(results, "trl-padded", "trl-bfd-512")
    assert lines[0] == "goal useful tokens/s beside trl-padded ≥ 3: 3, met" and "did not learn" in lines[-1]
    rates = {name: [r["tokens_per_second"] for r in found] for name, found in results.items()}
    assert "DID NOT LEARN" in train_cpu.line("trl-bfd-512", results["trl-bfd-512"], rates)["useful tokens/s"]


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
    assert train_gpu.read_layout("16xpadded", "torch_varlen") == (16, 1)
    with pytest.raises(arciva.ArcivaError, match="pairs x row length"):
        train_gpu.read_layout("many", "sdpa")


def test_a_device_s_peak_is_found_by_its_whole_name():
    assert train_gpu.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert train_gpu.peak_flops("NVIDIA L4") == 121e12 and train_gpu.peak_flops("NVIDIA A10") == 125e12
    assert train_gpu.peak_flops("NVIDIA A10G") == 70e12 and train_gpu.peak_flops("NVIDIA H100 NVL") == 835e12
    assert train_gpu.peak_flops("Tesla T4") == 65e12 and train_gpu.peak_flops("Some GPU") is None


def child_options(folder: Path, variant: str, **given) -> Namespace:
    options = {"variant": variant, "shape": "tiny", "steps": 2, "peer_steps": 2, "dropout": 0.05, "folder": folder}
    return Namespace(**options | {"data": str(ROOT / "data/arciva_qa_synthetic.jsonl")} | given)


@pytest.mark.parametrize("variant", ["8xpadded sdpa plain", "8x256 eager checkpointing"])
def test_a_gpu_variant_trains_at_a_small_shape(tmp_path, variant):
    found = train_gpu.child(child_options(tmp_path, variant))
    assert found["steps"] == 2 and found["tokens_per_second"] > 0 and found["estimated_gib"] > 0
    assert found["loss_after"] < found["loss_before"] and min(found["gradient_norms"]) > 0
    assert found["not_learned"] is None and found["cold_seconds"] > 0


@pytest.mark.slow
def test_compiled_blocks_train(tmp_path):
    found = train_gpu.child(child_options(tmp_path, "8x256 sdpa plain compile"))
    assert found.get("not_learned", found) is None


def test_a_layout_that_does_not_fit_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(arciva, "answer_loss", full)
    assert train_gpu.child(child_options(tmp_path, "8x256 sdpa plain")) == {"out_of_memory": True}


def test_a_variant_that_fails_says_why_and_ends_no_other(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED\nmore")

    monkeypatch.setattr(arciva, "answer_loss", broken)
    found = train_gpu.child(child_options(tmp_path, "8x256 sdpa plain"))
    assert found == {"failed": "RuntimeError: CUBLAS_STATUS_EXECUTION_FAILED"}


def test_the_plan_of_padded_rows_counts_their_padding(hardware):
    """Four pairs of 10, 20, 30 and 40 tokens: packed 100 tokens in one row, padded four rows of 40."""
    encoded = [arciva.Encoded([0] * n, [0] * n) for n in (10, 20, 30, 40)]
    assert train_gpu.largest_batch(encoded, 4, 1000)[0] == 100
    assert train_gpu.largest_batch(encoded, 4, 1)[0] == 160 and train_gpu.largest_batch(encoded, 4, 1)[2] == 40


# --- the comparison on a GPU, with made-up results ------------------------------------------------------------------------------------------


def gpu_options(out: Path, **given) -> Namespace:
    options = {"shape": "tiny", "layouts": ["128x1024", "16x1024"], "kernels": ["sdpa"], "bfd_rows": [2048], "out": out}
    options |= {"peer_pairs": [128], "steps": 8, "peer_steps": 3, "dropout": 0.0, "data": "x.jsonl", "repeats": 2}
    options |= {
        "minutes": 9.0,
        "fresh": False,
        "only": None,
        "quick": False,
        "no_peers": False,
        "no_extras": True,
        "compile": False,
    }
    return Namespace(**options | given)


def trained(speed: float, **given) -> dict:
    result = {
        "tokens_per_second": speed,
        "not_learned": None,
        "cold_seconds": 1.0,
        "peak_gib": 1.0,
        "gpu_peak_gib": 4.0,
    }
    result |= {"loss_before": 9.0, "loss_after": 8.0, "gradient_norms": [1.0], "estimated_gib": 2.0, "steps": 8}
    return result | given


@pytest.fixture
def children(monkeypatch):
    """`run_child` as a function of how often it was called; what was asked for is recorded."""
    asked, answers = [], {}

    def run_child(script, arguments, timeout=None):
        name = arguments[1]
        asked.append(name)
        answer = answers.get((name, asked.count(name)), trained(100.0))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(common, "run_child", run_child)
    monkeypatch.setattr(train_gpu.importlib.util, "find_spec", lambda name: name)
    return asked, answers


def test_a_round_that_ran_out_of_memory_or_was_killed_costs_only_itself(tmp_path, children, capsys):
    _, answers = children
    answers[("128x1024 sdpa plain", 2)] = {"out_of_memory": True, "peak_gib": 1.0}
    answers[("trl-padded sdpa checkpointing 128", 1)] = arciva.ArcivaError("killed")
    path = train_gpu.parent(gpu_options(tmp_path / "r.json"))
    shown = capsys.readouterr().out
    assert "100; out of memory" in shown and "failed: killed" in shown
    saved = json.loads(path.read_text())["shapes"]["tiny"]["results"]
    assert saved["128x1024 sdpa plain"][1] == {"out_of_memory": True, "peak_gib": 1.0}
    assert "as fast as trl-bfd-2048 sdpa plain 128" in shown  # by the rounds that both have


def test_a_second_call_goes_on_with_what_is_missing_and_failed(tmp_path, children, monkeypatch, capsys):
    asked, answers = children
    answers[("16x1024 sdpa plain", 1)] = arciva.ArcivaError("killed")
    monkeypatch.setattr(common, "environment", lambda: {"device": "x", "versions": {}, "commit": "1"})
    monkeypatch.setattr(common, "describe", lambda _: "")
    train_gpu.parent(gpu_options(tmp_path / "r.json"))
    first = len(asked)
    train_gpu.parent(gpu_options(tmp_path / "r.json"))
    assert asked[first:] == ["16x1024 sdpa plain"]
    train_gpu.parent(gpu_options(tmp_path / "r.json", steps=4))
    assert "starting over" in capsys.readouterr().out and len(asked) == 2 * first + 1


def test_variants_that_are_named_run_alone_and_in_their_order(tmp_path, hardware):
    options = gpu_options(tmp_path / "out.json", only=["16x1024 sdpa plain", "trl-padded sdpa plain 16"], repeats=1)
    assert train_gpu.schedule(options, hardware) == [(0, "tiny", name) for name in options.only]


def test_no_run_starts_that_the_minutes_do_not_suffice_for(tmp_path, children, capsys):
    asked, _ = children
    with pytest.raises(arciva.ArcivaError, match="no variant trained"):
        train_gpu.parent(gpu_options(tmp_path / "r.json", minutes=0.0))
    assert not asked and "the same command goes on" in capsys.readouterr().out


def test_what_the_goals_are_about_runs_first_and_all_shapes_take_turns(hardware):
    found = train_gpu.schedule(gpu_options(Path("x"), shape="all"), hardware)
    ours = "128x1024 sdpa plain"
    assert found[:3] == [(0, shape, ours) for shape in train_gpu.BIG_SHAPES]
    assert {name for _, _, name in found[: 3 * 3 * 2]} == set(train_gpu.headline(gpu_options(Path("x")), "sdpa"))
    assert len(found) == len(set(found))


def test_ours_is_compared_with_a_peer_at_the_same_pairs_per_step():
    results = {
        "128x1024 sdpa plain": [trained(10.0)],
        "16x1024 sdpa plain": [trained(6.0)],
        "trl-padded sdpa checkpointing 128": [trained(1.0)],
        "trl-padded sdpa checkpointing 16": [trained(2.0)],
        "trl-padded sdpa plain 64": [trained(2.0)],
    }
    lines = train_gpu.comparisons(results)
    assert len(lines) == 2 and "(128x1024 sdpa plain) is 10 times" in lines[0]
    assert "(16x1024 sdpa plain) is 3 times" in lines[1]


def test_a_variant_that_did_not_learn_is_never_the_best():
    results = {
        "128x1024 sdpa plain": [trained(10.0)],
        "128x2048 sdpa plain": [trained(99.0, not_learned="gradient norm 0")],
    }
    assert train_gpu.fastest(results, lambda n: True) == "128x1024 sdpa plain"
    assert (
        "DID NOT LEARN"
        in train_gpu.line("128x2048 sdpa plain", results["128x2048 sdpa plain"], None)["useful tokens/s"]
    )


def test_an_option_pays_by_what_it_does_to_ten_minutes():
    """Compiled, 1.2 times as fast after 300 s: 1.2 × 300 / 599 = 0.6 times the tokens."""
    base = "128x1024 sdpa plain"
    results = {
        base: [trained(100.0)],
        "128x1024 torch_varlen plain": [trained(110.0)],
        f"{base} compile": [trained(120.0, cold_seconds=300.0)],
    }
    assert train_gpu.options_that_pay(results) == [
        "torch_varlen instead of sdpa: 1.10 times the tokens in ten minutes, so it pays",
        "compile: 0.60 times the tokens in ten minutes, so it does not pay",
    ]


@pytest.mark.parametrize(
    ("capability", "flash2", "flash3", "expected"),
    [
        ((7, 5), True, False, ["sdpa"]),
        ((8, 9), True, True, ["torch_varlen", "sdpa", "flash_attention_2", "flex_attention"]),
        ((9, 0), False, True, ["torch_varlen", "sdpa", "flash_attention_3", "flex_attention"]),
    ],
)
def test_kernels_are_those_that_the_card_can_run(capability, flash2, flash3, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gpu_kernels, "is_flash_attn_2_available", lambda: flash2)
    monkeypatch.setattr(gpu_kernels, "is_flash_attn_3_available", lambda: flash3)
    monkeypatch.setattr(gpu_kernels.importlib.util, "find_spec", lambda name: name)
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    assert gpu_kernels.attention_kernels(arciva.Hardware("cuda", "test", 80.0, dtype, "")) == expected


def test_a_cpu_has_the_module_s_kernel_and_no_extras(hardware):
    cpu = arciva.Hardware("cpu", "test", 8.0, torch.float32, "")
    assert gpu_kernels.attention_kernels(cpu) == ["eager", "sdpa"] and gpu_kernels.extras_present(cpu) == []


def test_every_function_that_is_timed_as_a_stage_is_one_that_a_run_calls():
    called = inspect.getsource(arciva.run_pipeline) + inspect.getsource(arciva.train_until_it_fits)
    called += inspect.getsource(arciva.generate_answers) + inspect.getsource(arciva.predict_split)
    missing = [n for n in {**first_step.STAGES, **first_step.INNER} if not callable(getattr(arciva, n, None))]
    unused = [n for n in first_step.STAGES if f"{n}(" not in called]
    assert not missing and not unused


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
