"""QLoRA training of a 7B-shaped model on this GPU: tokens per second, MFU and peak memory by layout, beside TRL's.

    python benchmarks/train_gpu.py                          Qwen2.5-7B's shape
    python benchmarks/train_gpu.py --shape llama-3.1-8b     or mistral-7b
    python benchmarks/train_gpu.py --layouts 128x1024 --kernels sdpa --no-peers
    python benchmarks/train_gpu.py --shape tiny --quick     the same code on any CPU, in a minute

Nothing is downloaded: weights of the exact shape are drawn at random and quantised to NF4 layer by layer. The pairs are the extended
corpus's as the embedded tokenizer cuts them, so their lengths are real; throughput does not depend on which token it is. A layout
PAIRSxROW packs that many pairs into rows of that many tokens in one pass; PAIRSxpadded gives every pair a padded row of its own. A flash kernel
gets all pairs in a single row, because it reads boundaries from positions only then. Every layout runs with and without
checkpointing; one that does not fit says so. Useful tokens are those of prompts and answers, without padding; MFU is 4 N tokens/s
over the device's dense 16-bit peak, N the weights in matrix products, head included (a frozen base has no weight gradients). Peers:
`trl-padded`, SFTTrainer's common recipe, and `trl-bfd-ROW`, its packing with answer-only loss, both with checkpointing as TRL sets it.
Goals on an H100: at least 45 % MFU, and 8 times `trl-padded`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common
import peers

import arciva_assistant_poc as arciva

SHAPES = {
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "tiny": LlamaConfig(
        vocab_size=6144,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
}
LAYOUTS = ("4xpadded", "16xpadded", "16x1024", "64x1024", "128x1024", "128x2048")
BFD_ROWS = (1024, 2048, 4096, 8192)
# Dense 16-bit tensor-core peak in TFLOPS with fp32 sums, by a part of the device's name, from the makers' data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "RTX 4090": 165,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "T4": 65,
}
WARM_STEPS = 2


# --- the model ---------------------------------------------------------------------------------------------------------------------------


def random_nf4_model(shape, hardware: arciva.Hardware, kernel: str):
    """A frozen model of the exact shape with random weights: linear layers in NF4, quantised one by one, the rest as loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=hardware.load_dtype, attn_implementation=kernel)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, random_nf4_layer(module, hardware))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            values = torch.ones if parameter.ndim == 1 else torch.randn
            drawn = values(parameter.shape, dtype=parameter.dtype, device=hardware.device)
            setattr(model.get_submodule(parent), child, nn.Parameter(drawn * (1 if parameter.ndim == 1 else 0.02)))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(hardware.device)
    model.is_loaded_in_4bit = True  # by which peft chooses its 4-bit layers
    model.tie_weights()
    return arciva.freeze(model)


def random_nf4_layer(layer: nn.Linear, hardware: arciva.Hardware) -> bnb.nn.Linear4bit:
    """A 4-bit layer of the same sizes, as `load_base_model` configures them."""
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=hardware.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = 0.02 * torch.randn(layer.weight.shape, dtype=hardware.load_dtype, device=hardware.device)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    if layer.bias is not None:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=hardware.load_dtype, device=hardware.device))
    return made.to(hardware.device)


def matrix_weights(shape) -> int:
    """N of the 4N rule: weights of the blocks' linear layers and the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def peak_flops(name: str) -> float | None:
    """Peak FLOP/s of a device by name, None where it is not in the table."""
    return next((1e12 * tera for part, tera in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


# --- the variants ------------------------------------------------------------------------------------------------------------------------


def kernels_present(hardware: arciva.Hardware) -> list[str]:
    """Attention implementations that this machine can run, the module's choice first."""
    found = [hardware.attention]
    if hardware.device == "cuda":
        found += ["flex_attention"]
        found += ["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []
    return found


def read_layout(layout: str, kernel: str) -> tuple[int, int]:
    """(pairs per pass, tokens per row); one token per row makes every pair a row of its own."""
    match = re.fullmatch(r"(\d+)x(\d+|padded)", layout)
    if not match:
        raise arciva.ArcivaError(f"layout {layout!r}: expected pairs x row length, as 128x1024, or 16xpadded")
    row = 1 if match[2] == "padded" else int(match[2])
    return int(match[1]), (1 << 30) if kernel.startswith("flash") and row > 1 else row


def prepare(options: argparse.Namespace, pairs_per_step: int, steps: int):
    """(config, hardware, tokenizer, splits): the extended corpus cut to what `steps` optimiser steps need."""
    hardware = arciva.detect_hardware()
    config = arciva.Config(
        base_model=str(common.ROOT / "data/nano_base"),
        data=options.data,
        pairs_per_step=pairs_per_step,
        epochs=1.0,
        learning_rate=2e-3,  # a few steps must show that the loss falls
        evaluations_per_epoch=1,
        log_every=1,
        resume="never",
        checkpoint_dir=str(options.folder),
    )
    arciva.seed_everything(config.seed)
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    train = splits["train"]
    chosen = arciva.sample_rows(train, pairs_per_step * steps, config.seed)
    splits["train"] = train.select((chosen * math.ceil(pairs_per_step * steps / len(chosen)))[: pairs_per_step * steps])
    splits["validation"] = splits["validation"].select(range(min(64, len(splits["validation"]))))
    return config, hardware, arciva.load_tokenizer(config.base_model), splits


def child(options: argparse.Namespace) -> dict:
    """Train one variant for a few steps; `out_of_memory` where it does not fit."""
    try:
        return train_peer(options) if options.variant.startswith("trl") else train_ours(options)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def train_ours(options: argparse.Namespace) -> dict:
    """The module's training with the layout, kernel and checkpointing that the variant's name says."""
    layout, kernel, checkpointing = options.variant.split()
    pairs, row_tokens = read_layout(layout, kernel)
    config, hardware, tokenizer, splits = prepare(options, pairs, options.steps + WARM_STEPS)
    config = replace(config, micro_batch_pairs=pairs, row_tokens=row_tokens)
    encoded, _, _ = arciva.encode_split(tokenizer, splits["train"], config.max_length)
    model = arciva.add_adapter(random_nf4_model(SHAPES[options.shape], hardware, kernel), config)
    plan = forced_plan(arciva.unwrap(model).config, encoded, config, hardware, checkpointing == "checkpointing", kernel)
    before = loss_of_some(model, tokenizer, encoded, hardware)
    clock, planned, smaller = peers.StepClock(WARM_STEPS), arciva.plan_for, arciva.smaller_plan
    arciva.plan_for, arciva.smaller_plan = (lambda *_, **__: plan), no_smaller_plan
    try:
        arciva.train_adapter(model, tokenizer, splits, config, hardware, callbacks=[clock])
    finally:
        arciva.plan_for, arciva.smaller_plan = planned, smaller
    learned = before, loss_of_some(model, tokenizer, encoded, hardware)
    estimate = plan.weights_gib + plan.activations_gib
    return measurement(clock, encoded, math.ceil(len(encoded) / pairs), learned, estimate)


def forced_plan(
    shape, encoded, config: arciva.Config, hardware: arciva.Hardware, checkpointing: bool, kernel: str
) -> arciva.MemoryPlan:
    """The module's estimate for a layout that is given instead of chosen."""
    base, training = arciva.weight_bytes(shape, hardware, config.rank)
    tokens = config.pairs_per_step * sum(len(item.input_ids) for item in encoded) / len(encoded)
    share = sum(item.supervised for item in encoded) / sum(len(item.input_ids) for item in encoded)
    settings = {"rank": config.rank, "row_tokens": min(config.row_tokens, round(tokens)), "attention": kernel}
    need = arciva.activation_bytes(
        shape, tokens, tokens * share, hardware.dtype.itemsize, checkpointing=checkpointing, **settings
    )
    free = arciva.free_memory_gib(hardware)
    return arciva.MemoryPlan(config.pairs_per_step, checkpointing, (base + training) / 2**30, need / 2**30, free)


def no_smaller_plan(plan: arciva.MemoryPlan, config: arciva.Config) -> arciva.MemoryPlan:
    """A layout that does not fit is reported, not replaced."""
    raise torch.OutOfMemoryError(f"{plan}")


def train_peer(options: argparse.Namespace) -> dict:
    """TRL's training, with gradient checkpointing on as it is by default there."""
    row = int(options.variant.rpartition("-")[2]) if options.variant != "trl-padded" else None
    config, hardware, tokenizer, splits = prepare(options, options.peer_pairs, options.steps + WARM_STEPS)
    encoded, _, _ = arciva.encode_split(tokenizer, splits["train"], config.max_length)
    model = arciva.add_adapter(random_nf4_model(SHAPES[options.shape], hardware, "sdpa"), config)
    before, clock = loss_of_some(model, tokenizer, encoded, hardware), peers.StepClock(WARM_STEPS)
    trainer = peers.trl_trainer(
        model,
        tokenizer,
        splits["train"],
        config,
        hardware,
        str(options.folder),
        row_tokens=row,
        gradient_checkpointing=True,
        callbacks=[clock],
    )
    trainer.train()
    learned = before, loss_of_some(trainer.model, tokenizer, encoded, hardware)
    return measurement(clock, encoded, trainer.state.max_steps, learned)


def loss_of_some(model, tokenizer, encoded: list[arciva.Encoded], hardware: arciva.Hardware) -> float:
    """Nats per answer token over the first pairs."""
    settings = {"row_tokens": 1024, "pad_id": tokenizer.pad_token_id}
    return math.log(arciva.perplexity(arciva.score_losses(model, encoded[:16], hardware, **settings)))


def measurement(
    clock: peers.StepClock,
    encoded: list[arciva.Encoded],
    steps: int,
    learned: tuple[float, float],
    estimate: float | None = None,
) -> dict:
    """What a variant's run comes to; `learned` is the loss of some pairs before and after it."""
    useful = sum(len(item.input_ids) for item in encoded) * clock.steps / steps
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "tokens_per_second": useful / clock.seconds,
        "steps": clock.steps,
        "loss_before": learned[0],
        "loss_after": learned[1],
        "gradient_norms": clock.norms,
        "gpu_peak_gib": gpu,
        "estimated_gib": estimate,
    }


# --- the comparison ----------------------------------------------------------------------------------------------------------------------


def variants(options: argparse.Namespace, hardware: arciva.Hardware) -> list[str]:
    kernels = options.kernels or kernels_present(hardware)
    ours = [f"{x} {k} {c}" for x in options.layouts for k in kernels for c in ("plain", "checkpointing")]
    for layout in options.layouts:
        read_layout(layout, kernels[0])
    if options.no_peers:
        return ours
    if importlib.util.find_spec("trl") is None:
        raise arciva.ArcivaError("trl is not installed; pip install -r requirements-bench.txt, or add --no-peers")
    return [*ours, "trl-padded", *(f"trl-bfd-{row}" for row in options.bfd_rows)]


def parent(options: argparse.Namespace) -> Path:
    """Every variant in its own process; prints the table, the fastest of ours and how it stands to the peers."""
    hardware = arciva.detect_hardware()
    peak, weights = peak_flops(hardware.name), matrix_weights(SHAPES[options.shape])
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--shape", options.shape, "--data", options.data, "--steps", options.steps, "--folder", folder]
        flags += ["--peer-pairs", options.peer_pairs]
        results = common.interleave(Path(__file__), dict.fromkeys(variants(options, hardware), flags), options.repeats)
    print(common.describe(common.environment()))
    print(f"{options.shape}: {weights / 1e9:.2f} B weights in matrix products", end="")
    print(f", peak {peak / 1e12:,.0f} TFLOPS" if peak else "; the device's peak is not in the table, so no MFU")
    rates = {n: [r["tokens_per_second"] for r in found] for n, found in results.items() if "loss_after" in found[0]}
    mfu = {n: 4 * weights * statistics.median(r) / peak for n, r in rates.items()} if peak else {}
    print(f"\n{common.table([line(name, found, mfu.get(name)) for name, found in results.items()])}\n")
    best = max((n for n in rates if not n.startswith("trl")), key=lambda n: statistics.median(rates[n]), default=None)
    for peer in (n for n in rates if n.startswith("trl") and best):
        print(f"ours ({best}) is {common.spread(common.ratios(rates[best], rates[peer]))} times as fast as {peer}")
    payload = {"shape": options.shape, "weights": weights, "peak_flops": peak, "mfu": mfu, "results": results}
    return common.save(f"train-{options.shape}", payload, options.out)


def line(name: str, found: list[dict], mfu: float | None) -> dict:
    """One variant as a line of the table."""
    first = found[0]
    if "loss_after" not in first:
        return {"variant": name, "useful tokens/s": "out of memory"}
    gpu = first["gpu_peak_gib"] is not None
    peaks = [r["gpu_peak_gib"] if gpu else r["peak_gib"] for r in found]
    return {
        "variant": name,
        "useful tokens/s": common.spread([r["tokens_per_second"] for r in found]),
        "MFU": f"{mfu:.1%}" if mfu else "",
        "peak GiB" if gpu else "peak GiB above imports": common.spread(peaks),
        "estimated GiB": common.figure(first["estimated_gib"]) if first["estimated_gib"] else "",
        "loss of 16 pairs": f"{first['loss_before']:.2f} → {first['loss_after']:.2f}",
        "gradient norm ≥": common.figure(min(min(r["gradient_norms"]) for r in found)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), help="pairs x row tokens, or pairs x padded")
    parser.add_argument("--kernels", nargs="+", help="attention implementations, else those that are present")
    parser.add_argument("--bfd-rows", type=int, nargs="+", default=list(BFD_ROWS), help="TRL's row lengths")
    parser.add_argument("--peer-pairs", type=int, default=128, help="pairs per optimiser step of the peers")
    parser.add_argument("--steps", type=int, default=8, help="measured optimiser steps")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_extended.jsonl"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.layouts, options.bfd_rows, options.peer_pairs = ["16xpadded", "16x256"], [512], 32
        options.steps, options.repeats = 3, 1
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
