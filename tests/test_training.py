"""Section 4: packing, loss, 4-bit training, resume. Run: pytest tests/test_training.py"""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, ROOT, corpus_rows, in_whole_steps, make_model, pair, write_rows
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arciva_assistant_poc as arciva

TEXTS = [
    ("How do I export?", "Press Start export."),
    ("Wie groß?", 'Click "Größe".'),
    ("a", "b"),
    ("Name?", "Any name you like, really."),
]


def encoded_pairs(tokenizer) -> list[arciva.Encoded]:
    return [arciva.encode(tokenizer, pair(q, a)) for q, a in TEXTS]


def forward(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_packed_row_gives_the_logits_of_its_pairs_alone(architecture, attention, training, chatml):
    model = make_model(architecture, vocabulary=len(chatml)).train(training)
    model.set_attn_implementation(attention)
    items = encoded_pairs(chatml)
    batch = arciva.collate_packed(items, 10_000, chatml.pad_token_id)
    assert batch["input_ids"].shape[0] == 1
    packed = forward(model, batch)
    for i, item in enumerate(items):
        alone = forward(
            model,
            {"input_ids": torch.tensor([item.input_ids]), "position_ids": torch.arange(len(item.input_ids))[None]},
        )
        # fp32 sums in another order: 1e-4 against logits of order 1; a leak between pairs shows as more than 1e-1.
        assert (packed[batch["segments"] == i] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_changing_one_pair_leaves_its_neighbours_unchanged(architecture, attention, training, chatml):
    model = make_model(architecture, vocabulary=len(chatml)).train(training)
    model.set_attn_implementation(attention)
    batch = arciva.collate_packed(encoded_pairs(chatml), 10_000, chatml.pad_token_id)
    before = forward(model, batch)
    changed = batch["segments"] == 1
    batch["input_ids"] = torch.where(changed, (batch["input_ids"] + 7) % len(chatml), batch["input_ids"])
    after = forward(model, batch)
    assert torch.equal(before[~changed], after[~changed])
    assert (before[changed] - after[changed]).abs().max() > 1e-2


def test_the_leak_that_packing_avoids_is_real(chatml):
    """The reference for the two tests above: with an all-ones mask transformers does mix neighbours."""
    model = make_model(vocabulary=len(chatml))
    batch = arciva.collate_packed(encoded_pairs(chatml), 10_000, chatml.pad_token_id)
    mask = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        leaking = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
        ).logits
    assert (leaking - forward(model, batch)).abs().max() > 0.1


def test_rows_are_of_nearly_equal_load_and_hold_every_pair_once():
    lengths = [7, 50, 31, 8, 90, 45, 44, 12, 60, 33]
    rows = arciva.pack_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(10))
    # 380 tokens in four rows of 95: LPT stays within a third of the best.
    assert len(rows) == 4 and max(sum(lengths[i] for i in row) for row in rows) <= 4 / 3 * 95


def padded_loss(model, items, pad_id) -> torch.Tensor:
    """The textbook computation: right-padded batch, attention mask, full logits, mean over all supervised tokens."""
    width = max(len(i.input_ids) for i in items)
    ids = torch.tensor([i.input_ids + [pad_id] * (width - len(i.input_ids)) for i in items])
    labels = torch.tensor([i.labels + [arciva.IGNORE_INDEX] * (width - len(i.labels)) for i in items])
    mask = torch.tensor([[1] * len(i.input_ids) + [0] * (width - len(i.input_ids)) for i in items])
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=arciva.IGNORE_INDEX)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_packing_is_checked_before_training(architecture, chatml, cpu):
    model, items = make_model(architecture, vocabulary=len(chatml)), encoded_pairs(chatml)
    arciva.check_packing(model, items, cpu, chatml.pad_token_id)
    heedless = model.forward
    model.forward = lambda position_ids, **inputs: heedless(**inputs)  # as an architecture without restarts
    with pytest.raises(arciva.ArcivaError, match="does not keep packed pairs apart"):
        arciva.check_packing(model, items, cpu, chatml.pad_token_id)


def test_scoring_that_runs_out_of_memory_goes_on_with_less(chatml, cpu, monkeypatch, capsys):
    model, items, packed = make_model(vocabulary=len(chatml)), encoded_pairs(chatml), arciva.supervised_logits
    longest = max(len(item.input_ids) for item in items)
    options = {"row_tokens": 40, "pad_id": chatml.pad_token_id, "batch_tokens": 4 * longest}
    expected = arciva.score_losses(model, items, cpu, **options)

    def small_gpu(model, batch):
        if batch["input_ids"].numel() > longest:
            raise torch.OutOfMemoryError
        return packed(model, batch)

    monkeypatch.setattr(arciva, "supervised_logits", small_gpu)
    assert np.allclose(arciva.score_losses(model, items, cpu, **options), expected, rtol=1e-5)
    assert f"going on with {longest} tokens at a time" in capsys.readouterr().out


@pytest.mark.parametrize("row_tokens", [10_000, 40])
def test_padding_and_packing_give_the_same_loss(chatml, row_tokens):
    model, items = make_model(vocabulary=len(chatml)), encoded_pairs(chatml)
    batch = arciva.collate_packed(items, row_tokens, chatml.pad_token_id)
    packed = arciva.answer_loss(model, batch, sum(i.supervised for i in items))
    assert packed.item() == pytest.approx(padded_loss(model, items, chatml.pad_token_id).item(), abs=1e-5)


def test_gradient_accumulation_gives_the_gradients_of_one_batch(chatml):
    items = encoded_pairs(chatml)
    supervised, gradients, losses = sum(i.supervised for i in items), [], []
    for parts in ([items], [[i] for i in items]):
        model, total = make_model(vocabulary=len(chatml)), 0.0
        for part in parts:
            loss = arciva.answer_loss(model, arciva.collate_packed(part, 512, chatml.pad_token_id), supervised)
            loss.backward()
            total += loss.item()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5


def quantized_model(base: Path, cpu, **settings):
    config = arciva.Config(base_model=str(base), rank=4, dropout=0.0, **settings)
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # zero at the start, where lower layers would get no gradient
    return model


def adapter_gradients(model, batch) -> torch.Tensor:
    model.train()
    model.zero_grad()
    arciva.answer_loss(model, batch, 10).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_all_linear_layers_but_the_head_are_four_bit_and_have_an_adapter(tiny_base, cpu):
    model = quantized_model(tiny_base, cpu)
    four_bit = [n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit" and n.endswith("base_layer")]
    assert len(four_bit) == 2 * 7
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n or "norm" in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_before_and_after_an_evaluation_are_equal(tiny_base, dtype, chatml):
    hardware = arciva.Hardware("cpu", "test", 8.0, dtype, "")
    model, items = quantized_model(tiny_base, hardware), encoded_pairs(chatml)
    batch = arciva.collate_packed(items, 512, chatml.pad_token_id)
    with hardware.autocast():
        before = adapter_gradients(model, batch)
    arciva.score_losses(model, items, hardware, row_tokens=512, pad_id=chatml.pad_token_id)
    arciva.generate_answers(model, chatml, ["a?"], hardware, max_new_tokens=3, batch_size=2)
    assert before.abs().max() > 0
    four_bit = [m for m in model.modules() if isinstance(m, arciva.bnb.nn.Linear4bit)]
    # Where the CPU has the instructions, bitsandbytes would repack the weights for a kernel without a gradient.
    assert four_bit and not any(m.support_avx512bf16_for_cpu for m in four_bit)
    with hardware.autocast():
        assert torch.equal(before, adapter_gradients(model, batch))


@pytest.mark.parametrize("room_gib", [8.0, 0.0])  # dequantised once, and layer by layer
def test_four_bit_answers_do_not_depend_on_the_batch(tiny_base, chatml, room_gib, monkeypatch):
    hardware = arciva.Hardware("cpu", "test", 8.0, torch.bfloat16, "")
    monkeypatch.setattr(arciva, "free_memory_gib", lambda _: room_gib)
    model, prompts = (
        quantized_model(tiny_base, hardware),
        ["a?", "Wie exportiere ich meine Fotos?", "Where?", "b", "Wo ist es?"],
    )
    one, two, five = (
        arciva.generate_answers(model, chatml, prompts, hardware, max_new_tokens=16, batch_size=size)
        for size in (1, 2, 5)
    )
    assert one == two == five and len({answer.text for answer in one}) > 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2's layers have a bias
def test_unpacked_weights_compute_the_same_numbers(tmp_path, cpu, chatml, architecture, monkeypatch):
    make_model(architecture, vocabulary=len(chatml)).save_pretrained(tmp_path)
    chatml.save_pretrained(tmp_path)
    model, ids = quantized_model(tmp_path, cpu), torch.tensor([arciva.encode_prompt(chatml, "Where is the panel?")])
    used, multiply = [], arciva.multiply
    monkeypatch.setattr(arciva, "multiply", lambda *given: used.append(1) or multiply(*given))
    with torch.inference_mode():
        packed = model(ids).logits
        with arciva.unpacked_weights(model, room_gib=1.0):
            assert torch.equal(model(ids).logits, packed)
        assert len(used) == 2 * 7
        with arciva.unpacked_weights(model, room_gib=1e-5):
            assert torch.equal(model(ids).logits, packed)
        assert torch.equal(model(ids).logits, packed)
        assert len(used) == 2 * 7


def test_an_evaluation_within_training_does_not_use_weights_that_were_unpacked_for_it(tmp_path, chatml):
    """Training computes in bf16, evaluation on a CPU in fp32: a weight that was rounded to bf16 would show."""
    make_model("llama", vocabulary=len(chatml)).save_pretrained(tmp_path)
    chatml.save_pretrained(tmp_path)
    hardware = arciva.Hardware("cpu", "test", 8.0, torch.bfloat16, "")
    model, ids = quantized_model(tmp_path, hardware), torch.tensor([arciva.encode_prompt(chatml, "Where is it?")])
    with torch.inference_mode():
        with arciva.evaluation_precision(model, hardware):
            expected = model(ids).logits
        with arciva.unpacked_weights(model, room_gib=1.0), arciva.evaluation_precision(model, hardware):
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("architecture", "dropout", "unpack", "checkpointing"),
    [
        ("llama", 0.0, False, False),
        ("mistral", 0.3, True, False),
        ("qwen2", 0.3, False, True),
        ("qwen2", 0.0, True, True),
    ],
)
def test_the_training_kernels_compute_what_peft_and_transformers_do(
    tmp_path, cpu, chatml, architecture, dropout, unpack, checkpointing, monkeypatch
):
    """Loss and gradients in fp32, where only the order of summation differs; the same dropout from the same seed."""
    make_model(architecture, vocabulary=len(chatml)).save_pretrained(tmp_path)
    chatml.save_pretrained(tmp_path)
    config = arciva.Config(base_model=str(tmp_path), rank=4, alpha=12, dropout=dropout)
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    items = [arciva.Encoded(list(range(5, 5 + n)), list(range(5, 5 + n))) for n in (7, 12, 9, 4)]
    batch, found = arciva.collate_packed(items, 16, 0), {}
    on_a_gpu = type("OnGpu", (arciva.Hardware,), {"packed_attention": "eager"})("cuda", "test", 8.0, torch.float32, "")
    used = Counter()
    for name in ("adapted", "normalised", "multiply"):
        ours = getattr(arciva, name)
        monkeypatch.setattr(arciva, name, lambda *given, name=name, ours=ours: used.update([name]) or ours(*given))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for kernels in (contextlib.nullcontext(), arciva.training_kernels(model.train(), on_a_gpu, unpack=unpack)):
        before = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
        with kernels:
            torch.manual_seed(1)
            model.zero_grad()
            loss = arciva.answer_loss(model, batch, 28)
            loss.backward()
        found[loss] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        assert before == {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    (peft_loss, peft_gradients), (loss, gradients) = found.items()
    torch.testing.assert_close(loss, peft_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, peft_gradients, rtol=1e-3, atol=1e-6)
    assert min(g.abs().max() for g in gradients.values()) > 0
    layers, passes = model.config.num_hidden_layers, 2 if checkpointing else 1
    assert used["adapted"] == 7 * layers * passes and used["normalised"] == 2 * layers * passes + 1
    assert used["multiply"] == (7 * layers * passes if unpack else 0)


SHAPES = {
    "7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "vocab_size": 152064, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "1.1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


def shape_of(name: str):
    shape = dict(SHAPES[name])
    return arciva.AutoConfig.for_model(shape.pop("model_type"), **shape)


# A pair of the corpus has some 90 tokens; a long one nearly fills the 512 that are allowed.
SHORT, LONG = 90, 480


@pytest.mark.parametrize(
    ("machine", "ram", "name", "free", "dtype", "step", "tokens", "pairs", "checkpointing"),
    [
        ("T4", 12.7, "7B", 14.6, torch.float16, 16, SHORT, 8, False),
        ("T4", 12.7, "7B", 14.6, torch.float16, 128, SHORT, 8, False),
        ("T4", 12.7, "7B", 14.6, torch.float16, 16, LONG, 8, True),
        ("T4", 12.7, "7B", 14.6, torch.float16, 128, LONG, 8, True),
        ("T4", 12.7, "1.1B", 14.6, torch.float16, 16, SHORT, 16, False),
        ("L4", 53.0, "7B", 22.0, torch.bfloat16, 16, SHORT, 16, False),
        ("L4", 53.0, "7B", 22.0, torch.bfloat16, 128, LONG, 16, True),
        ("A10", 60.0, "7B", 22.0, torch.bfloat16, 16, SHORT, 16, False),
        ("RTX 4090", 62.0, "7B", 23.5, torch.bfloat16, 16, SHORT, 16, False),
        ("A100-40", 83.0, "7B", 39.0, torch.bfloat16, 16, SHORT, 16, False),
        ("A100-40", 83.0, "7B", 39.0, torch.bfloat16, 128, SHORT, 32, False),
        ("H100", 120.0, "7B", 79.0, torch.bfloat16, 16, SHORT, 16, False),
        ("H100", 120.0, "7B", 79.0, torch.bfloat16, 128, SHORT, 64, False),
        ("H100", 120.0, "7B", 79.0, torch.bfloat16, 128, LONG, 16, False),
        ("8 GB card", 15.0, "1.1B", 7.6, torch.float16, 16, SHORT, 16, False),
        ("CPU", 11.0, "1.1B", 11.0, torch.bfloat16, 16, SHORT, 8, False),
        ("CPU", 11.0, "1.1B", 11.0, torch.float32, 128, LONG, 16, True),
    ],
)
def test_a_plan_fits_the_machine_it_is_made_for(
    machine, ram, name, free, dtype, step, tokens, pairs, checkpointing, monkeypatch
):
    hardware = arciva.Hardware("cpu" if machine == "CPU" else "cuda", machine, free, dtype, "")
    monkeypatch.setattr(arciva, "free_memory_gib", lambda asked: ram if asked.device == "cpu" else free)
    half = tokens // 2
    encoded = [arciva.Encoded([0] * tokens, [arciva.IGNORE_INDEX] * half + [0] * half)] * 20
    config = arciva.Config(pairs_per_step=step)
    plan = arciva.plan_for(shape_of(name), encoded, config, hardware, loaded=False)
    assert plan.weights_gib + plan.activations_gib <= 0.9 * free
    assert (plan.micro_batch_pairs, plan.gradient_checkpointing) == (pairs, checkpointing)
    assert 0 < plan.host_gib <= plan.host_free_gib == ram and "machine's memory" in str(plan)
    assert "may not do" not in str(plan)
    assert arciva.plan_for(shape_of(name), encoded, config, hardware, loaded=True).host_gib == 0


def test_a_machine_whose_memory_may_not_hold_a_shard_is_told_so():
    """A shard has at most 5 GB, which are 4.66 GiB; the 1.1B model is a single one of 2.05 GiB."""
    gpu = arciva.Hardware("cuda", "test", 14.6, torch.float16, "")
    assert arciva.host_gib(shape_of("7B"), gpu) == pytest.approx(4.66, abs=0.01)
    assert arciva.host_gib(shape_of("1.1B"), gpu) == pytest.approx(2.05, abs=0.01)
    plan = arciva.MemoryPlan(16, False, 5.0, 4.0, 14.6, host_gib=4.7, host_free_gib=3.0)
    assert "4.70 GiB of 3.0 GiB" in str(plan) and "may not do" in str(plan)


def test_the_attention_is_chosen_with_its_reason(monkeypatch):
    cpu = arciva.Hardware("cpu", "test", 8.0, torch.float32, "")
    gpu = arciva.Hardware("cuda", "test", 80.0, torch.bfloat16, "")
    old = arciva.Hardware("cuda", "test", 15.0, torch.float16, "")
    assert cpu.attention == cpu.packed_attention == "eager" and "mask" in cpu.attention_reason
    assert old.attention == old.packed_attention == "sdpa" and "8.0" in old.attention_reason
    assert gpu.attention == "sdpa" and gpu.packed_attention == arciva.VARLEN and "themselves" in gpu.attention_reason
    monkeypatch.setattr(arciva, "varlen_options", lambda: {"query", "is_causal"})  # as torch 2.10's
    assert gpu.packed_attention == "sdpa" and "2.11" in gpu.attention_reason


@pytest.mark.parametrize(
    ("dtype", "installed", "compiler", "expected", "words"),
    [
        (torch.bfloat16, True, "/usr/bin/gcc", True, "one kernel each"),
        (torch.bfloat16, True, None, False, "install gcc"),
        (torch.bfloat16, False, "/usr/bin/gcc", False, "requirements-gpu.txt"),
        (torch.float16, True, "/usr/bin/gcc", False, "bf16"),
    ],
)
def test_liger_s_kernels_are_chosen_with_their_reason(monkeypatch, dtype, installed, compiler, expected, words):
    monkeypatch.setattr(arciva, "is_liger_kernel_available", lambda: installed)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(arciva.sysconfig, "get_path", lambda name: ROOT / "tests/headers")
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.delenv("CC", raising=False)
    gpu = arciva.Hardware("cuda", "test", 80.0, dtype, "")
    assert gpu.liger == expected and words in gpu.liger_reason
    assert not arciva.Hardware("cpu", "test", 80.0, dtype, "").liger


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"hidden_act": "gelu"}, False),
        ({"attention_dropout": 0.1}, False),
        ({"head_dim": 512}, False),
        ({"model_type": "cohere"}, False),
    ],
)
def test_a_model_that_gpu_kernels_would_compute_otherwise_keeps_its_own(cpu, change, known):
    model = make_model("llama")
    for name, value in change.items():
        setattr(type(model.config) if name == "model_type" else model.config, name, value)
    gpu = type("Gpu", (arciva.Hardware,), {"liger": True, "packed_attention": arciva.VARLEN})(
        "cuda", "", 80.0, torch.bfloat16, ""
    )
    try:
        assert arciva.packed_kernel(gpu, model.config) == (arciva.VARLEN if known else "sdpa")
        assert arciva.uses_liger(gpu, model.config) == known
        norm = model.model.norm
        with arciva.training_kernels(model, replace_properties(gpu, packed_attention="sdpa", liger=False)):
            assert ("forward" in norm.__dict__) == known
    finally:
        if "model_type" in change:
            type(model.config).model_type = "llama"


def replace_properties(hardware: arciva.Hardware, **properties) -> arciva.Hardware:
    return type("Changed", (type(hardware),), properties)(**vars(hardware))


@pytest.mark.parametrize(("free", "unpacked"), [(24.0, 0.0), (139.0, 12.2)])
def test_weights_are_unpacked_where_the_plan_leaves_room_and_packed_again_first_when_it_did_not(free, unpacked):
    """Qwen2.5-7B has 6.53 billion weights in 4-bit layers: 12.2 GiB in bf16."""
    gpu = arciva.Hardware("cuda", "test", free, torch.bfloat16, "")
    plan = arciva.with_unpacked(arciva.MemoryPlan(16, False, 6.0, 10.0, free), shape_of("7B"), gpu)
    assert plan.unpacked_gib == pytest.approx(unpacked, abs=0.05)
    assert ("dequantised weights 12.15 GiB" in str(plan)) == (unpacked > 0)
    smaller = [plan]
    while len(smaller) < 3 + (unpacked > 0):
        smaller.append(arciva.smaller_plan(smaller[-1], arciva.Config()))
    cuts = [(p.unpacked_gib > 0, p.gradient_checkpointing, p.micro_batch_pairs) for p in smaller]
    expected = [(True, False, 16)] * (unpacked > 0) + [(False, False, 16), (False, True, 16), (False, True, 8)]
    assert cuts == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_liger_s_kernels_rotate_and_multiply_gates_only_while_training(monkeypatch, cpu, architecture):
    """With stand-ins for its Triton kernels, which no CPU runs: same numbers, both used in every layer, and nothing left behind."""
    model = make_model(architecture)
    items = [arciva.Encoded(list(range(s, s + n)), [9] * n) for s, n in ((5, 7), (20, 12))]
    modeling, used = sys.modules[type(model).__module__], []
    rotate = modeling.apply_rotary_pos_emb

    class Gated:
        def forward(self, x):
            used.append("gate")
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    liger = SimpleNamespace(
        LigerSwiGLUMLP=Gated, liger_rotary_pos_emb=lambda *a, **k: used.append("turn") or rotate(*a, **k)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    hardware = type("WithLiger", (arciva.Hardware,), {"liger": True})(**vars(cpu))
    batch = arciva.collate_packed(items, 16, 0)
    with torch.no_grad():
        expected = arciva.supervised_logits(model, batch)[0]
        with arciva.training_kernels(model, hardware):
            torch.testing.assert_close(arciva.supervised_logits(model, batch)[0], expected)
        layers = model.config.num_hidden_layers
        assert used == ["turn", "gate"] * layers
        arciva.supervised_logits(model, batch)
        assert len(used) == 2 * layers and modeling.apply_rotary_pos_emb is rotate


def reference_varlen(query, key, value, bounds, _, longest, __, *, window_size, scale, enable_gqa=False):
    """What torch's kernel computes, pair by pair: (tokens, heads, size) → the same."""
    assert longest == max(bounds.diff()) and query.dtype == key.dtype == value.dtype
    parts = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        far = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (far >= 0) & ((far <= window_size[0]) if window_size[0] >= 0 else torch.ones_like(far, dtype=torch.bool))
        settings = {"attn_mask": mask, "scale": scale, "enable_gqa": enable_gqa}
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **settings)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.skipif(not arciva.varlen_options(), reason="torch has no varlen attention before 2.10")
@pytest.mark.parametrize(
    ("architecture", "window"), [("llama", None), ("mistral", None), ("mistral", 5), ("qwen2", None)]
)
def test_torch_s_varlen_kernel_is_given_the_pairs_as_they_are(monkeypatch, cpu, architecture, window):
    asked = []
    kernel = lambda *given, **settings: asked.append(1) or reference_varlen(*given, **settings)  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", functools.wraps(reference_varlen)(kernel))
    model = make_model(architecture)
    items = [arciva.Encoded(list(range(s, s + n)), [9] * n) for s, n in ((5, 7), (20, 12), (40, 9), (60, 4))]
    model.config.sliding_window = window
    batch = arciva.collate_packed(items, 16, 0)
    assert batch["input_ids"].shape[0] == 2  # rows laid end to end
    by_pairs = type("ByPairs", (arciva.Hardware,), {"packed_attention": arciva.VARLEN})(**vars(cpu))
    with torch.no_grad():
        expected = arciva.supervised_logits(model, batch)[0]
        with arciva.training_kernels(model, by_pairs):
            found = arciva.supervised_logits(model, batch)[0]
    assert len(asked) == model.config.num_hidden_layers
    assert model.config._attn_implementation == cpu.attention
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_step_that_does_not_fit_is_cut_and_a_hopeless_one_is_as_small_as_can_be():
    config = arciva.Config(pairs_per_step=16)
    plans = [
        arciva.plan_memory(shape_of("7B"), config, 0.5, free, pair_tokens=100, answer_share=0.5, element=2)
        for free in (70.0, 8.0, 3.0, 0.6)
    ]
    assert [p.activations_gib for p in plans] == sorted((p.activations_gib for p in plans), reverse=True)
    assert [p.gradient_checkpointing for p in plans] == [False, False, True, True]
    assert plans[-1].micro_batch_pairs == 1


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, until each is freed; `peak` is their largest sum."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.live, self.now, self.peak = known, {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage) -> None:
        key = storage._cdata
        if key in self.live or storage.data_ptr() in self.known or not storage.nbytes():
            return
        self.live[key] = storage.nbytes()
        self.now += self.live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key)

    def free(self, key) -> None:
        self.now -= self.live.pop(key, 0)


def measured_and_estimated(config, hardware, attention: str, checkpointing: bool) -> tuple[int, float]:
    """Peak bytes of a second training step beyond weights and gradients, and the estimate of it."""
    tokenizer = arciva.load_tokenizer(config.base_model)
    rows = arciva.load_examples(str(ROOT / "data/arciva_qa_synthetic.jsonl"))[0][:8]
    encoded = [arciva.encode(tokenizer, row.messages) for row in rows]
    model = arciva.add_adapter(arciva.load_base_model(config, hardware), config).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = arciva.collate_packed(encoded, config.row_tokens, tokenizer.pad_token_id)

    def step() -> None:
        with hardware.autocast():
            loss = arciva.answer_loss(model, batch, 1)
        loss.backward()

    step()  # from here on the gradients are there
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with LiveStorage({tensor.untyped_storage().data_ptr() for tensor in held}) as storage:
        step()
    shape, supervised = arciva.unwrap(model).config, int((batch["labels"] != arciva.IGNORE_INDEX).sum())
    settings = {"element": hardware.dtype.itemsize, "checkpointing": checkpointing, "attention": attention}
    need = arciva.activation_bytes(shape, config, batch["input_ids"].numel(), supervised, **settings)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Autocast's copies of adapters and head live in a step too; the estimate counts them with the weights.
    return storage.peak, need + arciva.weight_bytes(shape, hardware, config.rank)[1] - 16 * adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_estimate_is_within_15_percent_of_the_peak(attention, checkpointing, dtype):
    hardware = arciva.Hardware("cpu", "test", 8.0, dtype, "")
    config = arciva.configure(hardware, base_model=str(ROOT / "data" / "nano_base"))[0]
    measured, estimated = measured_and_estimated(config, hardware, attention, checkpointing)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_estimate_knows_of_shared_keys_and_of_dropout(checkpointing, dropout, tiny_base, monkeypatch):
    """The 7B profile's case: fewer heads of keys than of queries, and a mask of one byte per element, as on a GPU."""
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace=False: torch.native_dropout(x, p, training)[0])
    hardware = arciva.Hardware("cpu", "test", 8.0, torch.bfloat16, "")
    config = arciva.Config(base_model=str(tiny_base), rank=4, dropout=dropout, row_tokens=512)
    measured, estimated = measured_and_estimated(config, hardware, "sdpa", checkpointing)
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_weights_estimate_is_what_is_loaded(cpu):
    config = arciva.configure(cpu, base_model=str(ROOT / "data" / "nano_base"))[0]
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base, training = arciva.weight_bytes(arciva.model_shape(config, cpu), cpu, config.rank)
    assert training == 16 * adapter
    # get_memory_footprint counts the packed weights, not the scales of their blocks: 3 % of them.
    assert base == pytest.approx(model.get_memory_footprint() - 4 * adapter, rel=0.03)


def train(
    config, hardware, callbacks=(), keep=False, **settings
) -> tuple[arciva.TrainingResult, dict[str, torch.Tensor]]:
    config = replace(config, **settings)
    arciva.seed_everything(config.seed)
    tokenizer = arciva.load_tokenizer(config.base_model)
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    model = arciva.add_adapter(arciva.load_base_model(config, hardware), config)
    result = arciva.train_adapter(model, tokenizer, splits, config, hardware, callbacks=callbacks)
    if not keep:
        shutil.rmtree(result.checkpoints)  # as `save_adapter` does
    return result, {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_training_lowers_the_held_out_loss_and_keeps_the_best_adapter(tiny_config, cpu):
    result, _ = train(tiny_config, cpu, epochs=3)
    held_out = [h["eval_loss"] for h in result.history if "eval_loss" in h]
    assert min(held_out) < held_out[0]
    assert result.best_loss == pytest.approx(min(held_out))
    assert {"eval_rephrased", "eval_unseen"} <= set(next(h for h in result.history if "eval_loss" in h))
    assert result.history[0]["step"] == 0 and result.best_step > 0  # the curves begin with the base


def test_a_run_is_known_by_its_held_out_pairs_too(tiny_config):
    train_pair, held_out, other = (arciva.Encoded([1, 2, n], [-100, 2, n]) for n in (3, 4, 5))
    names = {arciva.run_fingerprint(tiny_config, [train_pair, pair]) for pair in (held_out, other)}
    assert len(names) == 2  # they decide which checkpoint is the best


@pytest.mark.parametrize(
    "history", [[], [{"step": 0, "eval_rephrased": 1.0}], [{"step": s, "loss": 1.0} for s in (5, 366)]]
)
def test_the_loss_curve_s_axis_ends_with_the_run(history):
    figure = arciva.plot_loss(history)
    last = max((h["step"] for h in history), default=0)
    assert all(0 <= tick <= last for tick in figure.axes[0].get_xticks())
    assert len(figure.axes[0].texts) == len({key for h in history for key in h} - {"step"})  # each curve is named
    arciva.plt.close(figure)


def test_micro_batches_change_no_weight_beyond_rounding(tiny_config, cpu):
    _, whole = train(tiny_config, cpu, epochs=0.5, dropout=0.0, micro_batch_pairs=8)
    _, parts = train(tiny_config, cpu, epochs=0.5, dropout=0.0, micro_batch_pairs=2)
    # Adam divides by the gradient's size, so rounding of 1e-7 may move a weight by a small share of the learning rate, 1e-2.
    assert max((whole[n] - parts[n]).abs().max().item() for n in whole) < 1e-3


KILLED_RUN = """
import json, os, signal, sys, torch
sys.path[:0] = [{root!r}]
import arciva_assistant_poc as arciva

class Kill(arciva.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), {signal})

config = arciva.Config(**json.loads({config!r}))
arciva.detect_hardware = lambda: arciva.Hardware("cpu", "test", 8.0, torch.float32, "")
sys.exit(arciva.run_main(lambda: arciva.run_pipeline(config, ["train"], callbacks=[Kill()])))
"""


TWO_PROCESSES = """
import json, sys, torch
sys.path[:0] = [{root!r}]
import arciva_assistant_poc as arciva

config = arciva.Config(**json.loads({config!r}))
arciva.detect_hardware = lambda: arciva.Hardware("cpu", "test", 8.0, torch.float32, "")
sys.exit(arciva.run_main(lambda: arciva.run_pipeline(config, ["train"])))
"""


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node=2",
    "accelerate": "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"
    " --dynamo_backend=no --main_process_port=0",
}
TWO_MACHINES = """
import json, os, shutil, sys, torch
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
sys.path[:0] = [{root!r}]
import arciva_assistant_poc as arciva

rank = int(os.environ["RANK"])
config = arciva.Config(**json.loads({config!r}))
config = replace(config, checkpoint_dir=config.checkpoint_dir + f"-{{rank}}")
arciva.detect_hardware = lambda: arciva.Hardware("cpu", "test", 8.0, torch.float32, "")
PartialState(cpu=True)
folder = Path(config.checkpoint_dir) / "made-up"
for step in ((4, 8, 12), (4, 8, 10))[rank]:
    arciva.write_atomic(folder / f"checkpoint-{{step}}" / "COMPLETE", "")
print(f"machine {{rank}}: {{arciva.newest_checkpoint(folder).name}}", flush=True)
shutil.rmtree(folder)
sys.exit(arciva.run_main(lambda: arciva.run_pipeline(config, ["train"])))
"""


def test_machines_with_disks_of_their_own_agree_on_a_checkpoint_and_end_with_the_best(tiny_config):
    config = replace(
        tiny_config, epochs=30, patience=2, learning_rate=0.05
    )  # the best comes two evaluations before the end
    script = Path(tiny_config.output_dir).with_name("machines.py")
    script.write_text(TWO_MACHINES.format(root=str(ROOT), config=json.dumps(asdict(config))))
    command = [sys.executable, *LAUNCHERS["torchrun"].split(), str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert all(f"machine {rank}: checkpoint-8" in ended.stdout for rank in (0, 1))
    assert "checkpoint-12 is not on every machine" in ended.stdout
    training = arciva.read_manifest(config.output_dir)["training"]
    assert training["best_step"] < training["steps"]


@pytest.mark.parametrize(("how", "step", "code"), [(signal.SIGKILL, 7, -signal.SIGKILL), (signal.SIGTERM, 6, 143)])
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny_config, cpu, how, step, code):
    config = replace(tiny_config, epochs=2)
    expected_result, expected = train(config, cpu, checkpoint_dir=tiny_config.checkpoint_dir + "-uninterrupted")
    script = KILLED_RUN.format(root=str(ROOT), step=step, signal=int(how), config=json.dumps(asdict(config)))
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert killed.returncode == code, killed.stderr
    assert not Path(config.output_dir).exists()
    result, resumed = train(config, cpu)
    assert 0 < result.resumed_from <= step + 1  # a signal counts from the next step boundary
    assert [h["step"] for h in result.history].count(
        0
    ) == 1  # the base was evaluated before the first run's steps alone
    assert result.steps == expected_result.steps
    assert all(torch.equal(expected[n], resumed[n]) for n in expected)


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    left, control = [signal.SIGTERM], transformers.TrainerControl()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: left and os.kill(os.getpid(), left.pop()))
    with arciva.StopOnSignal() as stop:
        args = SimpleNamespace(device=torch.device("cpu"))
        stop.on_step_end(args, None, control)
        assert stop.received and not (stop.stopped or control.should_training_stop)
        stop.on_step_end(args, None, control)
        assert stop.stopped and control.should_training_stop and control.should_save


class SignalAtTheEnd(arciva.TrainerCallback):
    """SIGTERM to this process when no step is left that could answer it."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_behind_the_last_step_ends_the_run_and_the_next_start_trains_nothing(tiny_config, cpu, capsys):
    config = replace(tiny_config, epochs=1)
    expected_result, expected = train(config, cpu, checkpoint_dir=tiny_config.checkpoint_dir + "-uninterrupted")
    assert arciva.run_main(lambda: train(config, cpu, callbacks=[SignalAtTheEnd()])) == 143
    assert f"at step {expected_result.steps} of {expected_result.steps}" in capsys.readouterr().err
    result, weights = train(config, cpu)
    assert (
        result.resumed_from == result.steps == expected_result.steps and result.best_step == expected_result.best_step
    )
    assert all(torch.equal(expected[n], weights[n]) for n in expected)


def test_a_run_that_starts_anew_beside_other_checkpoints_names_them(tiny_config, cpu, capsys):
    train(tiny_config, cpu, keep=True, epochs=0.5)
    assert "anew" not in capsys.readouterr().out
    (other,) = Path(tiny_config.checkpoint_dir).iterdir()
    train(tiny_config, cpu, epochs=0.5, rank=2)
    assert capsys.readouterr().out.count(f"({other.name}) belong to other settings") == 1


def test_a_place_that_takes_no_checkpoints_is_one_sentence_before_training(tiny_config, cpu, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(arciva.ArcivaError, match="cannot write"):
        train(tiny_config, cpu, checkpoint_dir=str(tmp_path / "file"))


def test_a_full_disk_is_recognised_in_the_words_of_torch():
    with pytest.raises(RuntimeError) as full:
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    assert arciva.disk_full(full.value) and not arciva.disk_full(RuntimeError("shapes cannot be multiplied"))


def test_the_keyboard_ends_a_run_with_one_sentence(capsys):
    def run():
        raise KeyboardInterrupt

    assert arciva.run_main(run) == 130
    assert (
        capsys.readouterr().err
        == "stopped by the keyboard; the same command goes on from the last complete checkpoint\n"
    )


def test_a_checkpoint_without_its_marker_is_passed_over(tmp_path, capsys):
    for step, complete in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "COMPLETE").touch()
    assert arciva.newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert "incomplete" in capsys.readouterr().out
    assert arciva.newest_checkpoint(tmp_path / "nothing") is None


def test_a_resumed_run_cuts_its_steps_as_the_interrupted_one_did(tmp_path):
    plan = arciva.MemoryPlan(16, False, 0.1, 0.1, 8.0)
    cut = {"versions": {}, "micro_batch": {"pairs": 4, "checkpointing": True}}
    (tmp_path / "COMPLETE").write_text(json.dumps(cut))
    resumed = arciva.plan_of_checkpoint(tmp_path, replace(plan, unpacked_gib=0.1), share=16)
    assert (resumed.micro_batch_pairs, resumed.gradient_checkpointing, resumed.unpacked_gib) == (4, True, 0.0)
    assert arciva.plan_of_checkpoint(tmp_path, plan, share=2) is plan  # eight processes now, two pairs each


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"epochs": 30, "patience": 1, "learning_rate": 0.05}])
def test_a_run_that_ended_before_its_adapter_was_saved_is_not_trained_again(tiny_config, cpu, settings):
    first, expected = train(tiny_config, cpu, keep=True, **settings)
    again, weights = train(tiny_config, cpu, keep=True, **settings)
    assert again.resumed_from == again.steps == first.steps and again.best_step == first.best_step
    assert again.history == first.history and again.best_loss == first.best_loss
    stopped_early = max(entry["epoch"] for entry in first.history) < settings["epochs"]
    assert stopped_early == ("patience" in settings)
    assert all(torch.equal(expected[n], weights[n]) for n in expected)


def test_a_run_that_diverges_says_so_and_leaves_nothing_to_go_on_from(tiny_config, cpu, monkeypatch):
    monkeypatch.setattr(arciva, "check_packing", lambda *_: None)  # the base itself is sound
    monkeypatch.setattr(arciva, "score_losses", lambda model, encoded, *_, **__: np.full((len(encoded), 2), np.nan))
    with pytest.raises(arciva.ArcivaError, match="diverged"):
        train(tiny_config, cpu, epochs=1)
    assert not list(Path(tiny_config.checkpoint_dir).glob("*"))


def test_one_process_trains_with_the_pairs_it_was_given_however_many_gpus_it_sees(tiny_config, cpu, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 4)
    plan = arciva.MemoryPlan(4, False, 0.1, 0.1, 8.0)
    arguments = arciva.training_arguments(tiny_config, cpu, plan, Path("x"), 64, bars=False)
    assert arguments._n_gpu == 1


def test_rows_without_shared_facts_train_by_the_unseen_half(tiny_config, cpu, capsys):
    path = Path(tiny_config.data)
    rows = [{"instruction": f"Question {i} about {i * 7919 % 1009}?", "response": f"Answer {i}."} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = train(tiny_config, cpu, epochs=1)
    assert "fact_ids" in capsys.readouterr().out and math.isfinite(result.best_loss)
    assert "eval_unseen" in result.history[-1] and "eval_rephrased" not in result.history[-1]


class Watch(arciva.TrainerCallback):
    """What lies on disk at the moment a checkpoint is announced."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append({p.name: (p / "COMPLETE").exists() for p in Path(args.output_dir).glob("checkpoint-*")})


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tiny_config, cpu, monkeypatch):
    rotated = []

    def rotate(folder, *args, **kwargs):
        rotated.append(arciva.newest_checkpoint(Path(folder)).name)
        transformers.trainer_utils.rotate_checkpoints(folder, *args, **kwargs)

    monkeypatch.setattr(arciva, "rotate_checkpoints", rotate)
    watch = Watch()
    train(tiny_config, cpu, epochs=3, callbacks=[watch])
    assert len(rotated) == len(watch.seen) > 3
    assert all(
        newest in seen and all(seen.values()) and len(seen) <= 3
        for newest, seen in zip(rotated, watch.seen, strict=True)
    )


def test_running_out_of_memory_makes_smaller_passes_and_ends_with_the_same_weights(
    tiny_config, cpu, monkeypatch, capsys
):
    settings = {"epochs": 1, "dropout": 0.0, "micro_batch_pairs": 8}
    _, expected = train(tiny_config, cpu, **settings)
    whole, calls = arciva.answer_loss, []

    def too_large(model, batch, supervised):
        calls.append(int(batch["segments"].max()) + 1)
        if len(calls) > 3 and calls[-1] > 4:  # two steps have moved the weights by then
            raise torch.OutOfMemoryError
        return whole(model, batch, supervised)

    monkeypatch.setattr(arciva, "answer_loss", too_large)
    result, weights = train(tiny_config, cpu, **settings)
    assert result.plan.micro_batch_pairs == 4 and result.plan.gradient_checkpointing and result.resumed_from == 0
    assert capsys.readouterr().out.count("out of memory") == 3  # weights packed, activations recomputed, half the pairs
    # As for any other micro-batch: rounding of 1e-7, divided by a small gradient, moves a weight by a share of the rate.
    assert max((expected[n] - weights[n]).abs().max().item() for n in expected) < 1e-3


def test_running_out_of_memory_after_a_checkpoint_goes_on_from_it_with_smaller_passes(tiny_config, cpu, monkeypatch):
    whole, saved = arciva.answer_loss, Watch()

    def too_large(model, batch, supervised):
        if saved.seen and int(batch["segments"].max()) + 1 > 4:
            raise torch.OutOfMemoryError
        return whole(model, batch, supervised)

    monkeypatch.setattr(arciva, "answer_loss", too_large)
    result, _ = train(tiny_config, cpu, epochs=2, micro_batch_pairs=8, callbacks=[saved])
    assert result.plan.micro_batch_pairs == 4
    steps = [point["step"] for point in result.history]
    assert steps == sorted(steps) and steps[-1] == result.steps and steps.count(0) == 1


def test_a_step_that_cannot_shrink_further_is_one_sentence(tiny_config):
    with pytest.raises(arciva.ArcivaError, match="single pair"):
        arciva.smaller_plan(arciva.MemoryPlan(1, True, 0.1, 0.1, 8.0), tiny_config)


@pytest.mark.parametrize("launcher", [pytest.param("torchrun"), pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_end_with_the_held_out_loss_of_one(launcher, tiny_config, cpu):
    data = Path(tiny_config.data)
    write_rows(data, in_whole_steps(corpus_rows(), data, 8))
    config = replace(tiny_config, epochs=2, dropout=0.0, pairs_per_step=8, micro_batch_pairs=4)
    alone, _ = train(config, cpu, checkpoint_dir=tiny_config.checkpoint_dir + "-alone")
    script = Path(tiny_config.output_dir).with_name("two.py")
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), config=json.dumps(asdict(config))))
    command = [sys.executable, *LAUNCHERS[launcher].split(), str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    together = arciva.read_manifest(config.output_dir)["training"]
    assert together["steps"] == alone.steps and together["best_step"] == alone.best_step
    assert together["best_loss"] == pytest.approx(alone.best_loss, abs=1e-4)


def test_the_saved_adapter_is_the_trained_one_and_knows_its_base(tiny_config, cpu, tmp_path, chatml):
    config = replace(tiny_config, epochs=1)
    arciva.run_pipeline(config, ["train"])
    model, tokenizer = arciva.load_tuned_model(config, cpu)
    stored = load_file(Path(config.output_dir) / "adapter_model.safetensors")
    live = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert stored.keys() == live.keys() and all(torch.equal(stored[n], live[n]) for n in stored)
    assert tokenizer.chat_template == chatml.chat_template
    assert math.isfinite(arciva.read_manifest(config.output_dir)["training"]["best_loss"])
    other = tmp_path / "other_base"
    make_model("mistral", vocabulary=len(chatml)).save_pretrained(other)
    chatml.save_pretrained(other)
    with pytest.raises(arciva.ArcivaError, match="was trained on"):
        arciva.load_tuned_model(replace(config, base_model=str(other)), cpu)


def test_an_unknown_model_is_one_sentence(cpu, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(arciva.ArcivaError, match="cannot load"):
        arciva.load_base_model(arciva.Config(base_model=str(tmp_path / "empty")), cpu)
    with pytest.raises(arciva.ArcivaError, match="no tokenizer for"):
        arciva.load_tokenizer(str(tmp_path / "empty"))


def test_a_quantised_base_is_refused_before_training(tiny_base, cpu):
    path = tiny_base / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(arciva.ArcivaError, match="quantised already"):
        arciva.model_shape(arciva.Config(base_model=str(tiny_base)), cpu)


def test_a_base_cut_short_is_one_sentence(tiny_base, cpu):
    file = next(tiny_base.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(arciva.ArcivaError, match="cannot load"):
        arciva.load_base_model(arciva.Config(base_model=str(tiny_base)), cpu)


def test_tensorboard_s_files_outlive_the_checkpoints(tiny_config, cpu, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arciva.run_pipeline(replace(tiny_config, report_to="tensorboard", epochs=1), ["train"])
    assert list(Path(tiny_config.reports_dir).glob("tensorboard/**/events.out*"))
    assert not list(Path(tiny_config.checkpoint_dir).glob("*/checkpoint-*"))
