"""QLoRA training of a 7B-shaped model on this GPU: tokens per second, MFU and peak memory by layout, beside TRL's.

    python benchmarks/train_gpu.py                          Qwen2.5-7B's shape, what matters most first, within ten minutes
    python benchmarks/train_gpu.py                          again: goes on where the minutes ended; --fresh starts over
    python benchmarks/train_gpu.py --shape all              Mistral-7B's and Llama-3.1-8B's too, or one by its name
    python benchmarks/train_gpu.py --layouts 128x1024 --kernels sdpa --no-peers
    python benchmarks/train_gpu.py --shape tiny --quick     the same code on any CPU, in minutes

Nothing is downloaded: weights of the exact shape are drawn at random and quantised to NF4 layer by layer. The pairs are the extended
corpus's as the embedded tokenizer cuts them, so their lengths are real; throughput does not depend on which token it is. A layout
PAIRSxROW packs that many pairs into rows of that many tokens in one pass; PAIRSxpadded gives every pair a padded row of its own. A kernel that
reads boundaries from positions gets all pairs in a single row. A variant is a layout, an attention kernel and checkpointing or not,
perhaps with Liger's kernels or compiled blocks; one that does not fit, fails or does not learn says so and is compared with nothing.
Useful tokens are those of prompts and answers, without padding; MFU is 4 N tokens/s over the device's dense 16-bit peak, N the
weights in matrix products, head included (a frozen base has no weight gradients). The peak is that of the training steps, weights
included; beside it stands what the memory plan had estimated. Peers: `trl-padded`, SFTTrainer's common recipe, and `trl-bfd-ROW`, its packing
with answer-only loss, with and without checkpointing (TRL's default is with), each with the kernels that transformers has here. Ours
and a peer are compared at the same pairs per optimiser step. Goals on an H100: at least 45 % MFU, and 8 times `trl-padded`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common
import gpu_kernels
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
BIG_SHAPES = ("qwen2.5-7b", "mistral-7b", "llama-3.1-8b")
LAYOUTS = ("128x1024", "64x1024", "16x1024", "128x2048", "16xpadded", "4xpadded")  # what matters most first
BFD_ROWS = (2048, 8192, 1024, 4096)
# Dense 16-bit tensor-core peak in TFLOPS with fp32 sums, by a part of the device's name, from the makers' data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "RTX 4090": 165,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "T4": 65,
}
WARM_STEPS = 2
PEER_WARM_STEPS = 1  # of many passes each
PADDED, BFD = "trl-padded", "trl-bfd"
PEER_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # those that transformers brings


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


def read_layout(layout: str, kernel: str) -> tuple[int, int]:
    """(pairs per pass, tokens per row); one token per row makes every pair a row of its own."""
    match = re.fullmatch(r"(\d+)x(\d+|padded)", layout)
    if not match:
        raise arciva.ArcivaError(f"layout {layout!r}: expected pairs x row length, as 128x1024, or 16xpadded")
    row = 1 if match[2] == "padded" else int(match[2])
    return int(match[1]), (1 << 30) if gpu_kernels.by_position(kernel) and row > 1 else row


def prepare(options: argparse.Namespace, pairs_per_step: int, steps: int):
    """(config, hardware, tokenizer, splits): the extended corpus cut to what `steps` optimiser steps need."""
    hardware = arciva.detect_hardware()
    config = arciva.Config(
        base_model=str(common.ROOT / "data/nano_base"),
        data=options.data,
        pairs_per_step=pairs_per_step,
        epochs=1.0,
        learning_rate=2e-3,  # a few steps must show that the loss falls
        dropout=options.dropout,
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
    """Train one variant for a few steps; `out_of_memory` where it does not fit, `failed` with the reason for anything else."""
    try:
        return train_peer(options) if options.variant.startswith("trl") else train_ours(options)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except Exception as error:  # a kernel, a compiler, a library: one variant that fails must not end the others
        traceback.print_exc()
        reason = next(iter(str(error).strip().splitlines()), "")
        return {"failed": f"{type(error).__name__}: {reason}"[:300]}


def train_ours(options: argparse.Namespace) -> dict:
    """The module's training as the variant's name says: `128x1024 sdpa plain`, and perhaps `liger` or `compile`."""
    layout, kernel, checkpointing, *extras = options.variant.split()
    pairs, row_tokens = read_layout(layout, kernel)
    config, hardware, tokenizer, splits = prepare(options, pairs, options.steps + WARM_STEPS)
    config = replace(config, micro_batch_pairs=pairs, row_tokens=row_tokens)
    hardware = gpu_kernels.training_with(hardware, kernel, liger=gpu_kernels.LIGER in extras)
    encoded, _, _ = arciva.encode_split(tokenizer, splits["train"], config.max_length)
    model = arciva.add_adapter(random_nf4_model(SHAPES[options.shape], hardware, hardware.attention), config)
    if gpu_kernels.COMPILE in extras:
        gpu_kernels.compile_blocks(model)
    plan = forced_plan(arciva.unwrap(model).config, encoded, config, hardware, checkpointing == "checkpointing", kernel)
    before = loss_of_some(model, tokenizer, encoded, hardware)
    clock, planned, smaller = peers.StepClock(WARM_STEPS), arciva.plan_for, arciva.smaller_plan
    arciva.plan_for, arciva.smaller_plan = (lambda *_, **__: plan), no_smaller_plan
    try:
        arciva.train_adapter(model, tokenizer, splits, config, hardware, callbacks=[clock])
    finally:
        arciva.plan_for, arciva.smaller_plan = planned, smaller
    learned = before, loss_of_some(model, tokenizer, encoded, hardware)
    base = (
        arciva.weight_bytes(arciva.unwrap(model).config, hardware, config.rank)[0] / 2**30
    )  # loaded, so not in the plan
    estimate = base + plan.weights_gib + plan.activations_gib + plan.unpacked_gib
    return measurement(clock, encoded, math.ceil(len(encoded) / pairs), learned, estimate)


def largest_batch(encoded: list[arciva.Encoded], pairs: int, row_tokens: int) -> tuple[int, int, int]:
    """(tokens with padding, of which supervised, tokens per row) of the largest of some random batches of `pairs`."""
    found, draw = [], random.Random(0)
    for _ in range(8):
        batch = draw.sample(encoded, min(pairs, len(encoded)))
        rows = arciva.pack_rows([len(item.input_ids) for item in batch], row_tokens)
        width = max(sum(len(batch[i].input_ids) for i in row) for row in rows)
        found.append((len(rows) * width, sum(item.supervised for item in batch), width))
    return max(found)


def forced_plan(
    shape, encoded, config: arciva.Config, hardware: arciva.Hardware, checkpointing: bool, kernel: str
) -> arciva.MemoryPlan:
    """The module's estimate for a layout that is given instead of chosen."""
    training = arciva.weight_bytes(shape, hardware, config.rank)[1] / 2**30
    tokens, supervised, width = largest_batch(encoded, config.pairs_per_step, config.row_tokens)
    settings = {"element": hardware.dtype.itemsize, "checkpointing": checkpointing, "attention": kernel}
    settings |= {"liger": hardware.liger}
    need = arciva.activation_bytes(shape, replace(config, row_tokens=width), tokens, supervised, **settings)
    free = arciva.free_memory_gib(hardware)
    plan = arciva.MemoryPlan(config.pairs_per_step, checkpointing, training, need / 2**30, free)
    return arciva.with_unpacked(plan, shape, hardware)


def no_smaller_plan(plan: arciva.MemoryPlan, config: arciva.Config) -> arciva.MemoryPlan:
    """A layout that does not fit is reported, not replaced."""
    raise torch.OutOfMemoryError(f"{plan}")


def train_peer(options: argparse.Namespace) -> dict:
    """TRL's training as the variant's name says: `trl-bfd-2048 sdpa checkpointing 128`, the last the pairs per step."""
    name, kernel, checkpointing, pairs = options.variant.split()
    row = None if name == PADDED else int(name.removeprefix(f"{BFD}-"))
    config, hardware, tokenizer, splits = prepare(options, int(pairs), options.peer_steps + PEER_WARM_STEPS)
    encoded, _, _ = arciva.encode_split(tokenizer, splits["train"], config.max_length)
    model = arciva.add_adapter(random_nf4_model(SHAPES[options.shape], hardware, kernel), config)
    before, clock = loss_of_some(model, tokenizer, encoded, hardware), peers.StepClock(PEER_WARM_STEPS)
    settings = {"row_tokens": row, "attention": kernel, "gradient_checkpointing": checkpointing == "checkpointing"}
    data = (tokenizer, splits["train"], config, hardware, str(options.folder))
    trainer = peers.trl_trainer(model, *data, **settings, callbacks=[clock])
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
    gpu = clock.gpu_peak / 2**30 if torch.cuda.is_available() else None
    return {
        "tokens_per_second": useful / clock.seconds,
        "steps": clock.steps,
        "cold_seconds": clock.cold_seconds,
        "not_learned": common.not_learned(*learned, clock.norms),
        "loss_before": learned[0],
        "loss_after": learned[1],
        "gradient_norms": clock.norms,
        "gpu_peak_gib": gpu,
        "estimated_gib": estimate,
    }


# --- the comparison ----------------------------------------------------------------------------------------------------------------------


def present(options: argparse.Namespace, hardware: arciva.Hardware) -> tuple[list[str], list[str]]:
    """(attention kernels, extras) to measure here, the module's choice first."""
    extras = [] if options.no_extras else gpu_kernels.extras_present(hardware)
    extras += [gpu_kernels.COMPILE] * (options.compile and gpu_kernels.COMPILE not in extras)
    return options.kernels or gpu_kernels.attention_kernels(hardware), extras


def headline(options: argparse.Namespace, hardware: arciva.Hardware) -> list[str]:
    """What the goals are about: ours, with Liger's kernels where they are, the common recipe, and TRL's packing."""
    (kernel, *_), extras = present(options, hardware)
    ours = [f"{options.layouts[0]} {kernel} plain"]
    ours += [f"{ours[0]} {gpu_kernels.LIGER}"] * (gpu_kernels.LIGER in extras)
    if options.no_peers:
        return ours
    pairs = options.peer_pairs[0]
    peer = kernel if kernel in PEER_KERNELS else "sdpa"
    return [*ours, f"{PADDED} {peer} checkpointing {pairs}", f"{BFD}-{options.bfd_rows[0]} {peer} plain {pairs}"]


def variants(options: argparse.Namespace, hardware: arciva.Hardware) -> list[str]:
    """Every variant, what tells most first."""
    (first, *others), extras = present(options, hardware)
    layouts, kernels, found = options.layouts, [first, *others], headline(options, hardware)
    found += [f"{layouts[0]} {k} plain" for k in others]
    found += [f"{layouts[0]} {first} plain {extra}" for extra in extras]
    found += [f"{layout} {first} plain" for layout in layouts] + [f"{layouts[0]} {first} checkpointing"]
    if not options.no_peers:
        found += peer_variants(options, kernels)
    found += [f"{x} {k} {c}" for x in layouts for k in kernels for c in ("plain", "checkpointing")]
    return list(dict.fromkeys(name for name in found if not repeats_another(name, layouts)))


def peer_variants(options: argparse.Namespace, present: list[str]) -> list[str]:
    """TRL with the kernels that transformers has here."""
    usable = [k for k in present if k in PEER_KERNELS] or ["sdpa"]
    names = [f"{PADDED} {k} {c}" for k in usable[:1] for c in ("checkpointing", "plain")]
    names += [f"{BFD}-{row} {k} {c}" for row in options.bfd_rows for k in usable for c in ("plain", "checkpointing")]
    return [f"{name} {pairs}" for pairs in options.peer_pairs for name in names]


def repeats_another(name: str, layouts: list[str]) -> bool:
    """Whether a kernel that takes all pairs in one row would run a layout again that differs in the row alone."""
    layout, kernel, *_ = name.split()
    if name.startswith("trl") or not gpu_kernels.by_position(kernel) or layout.endswith("padded"):
        return False
    pairs = layout.split("x")[0]
    return layout != next(x for x in layouts if x.split("x")[0] == pairs and not x.endswith("padded"))


def rate(result: dict) -> float | None:
    """Useful tokens per second of a run that fitted, ended and learned."""
    return None if result.get("not_learned") else result.get("tokens_per_second")


def rates(found: list[dict]) -> list[float]:
    return [r for r in map(rate, found) if r is not None]


def pairs_of(name: str) -> int:
    """Pairs per optimiser step of a variant."""
    return int(name.split()[-1]) if name.startswith("trl") else int(name.split("x")[0])


def common_rounds(ours: list[dict], peer: list[dict]) -> tuple[list[float], list[float]]:
    """Both rates of the rounds in which both trained."""
    both = [(rate(a), rate(b)) for a, b in zip(ours, peer, strict=False)]
    both = [pair for pair in both if None not in pair]
    return [a for a, _ in both], [b for _, b in both]


def fastest(results: dict[str, list[dict]], wanted) -> str | None:
    """The variant that `wanted` accepts with the highest median rate."""
    medians = {n: statistics.median(rates(found)) for n, found in results.items() if wanted(n) and rates(found)}
    return max(medians, key=medians.get, default=None)


class Measured:
    """The results so far, by shape and variant, in the file that they go on from."""

    def __init__(self, options: argparse.Namespace):
        self.path = options.out or common.RESULTS / f"train-{options.shape}-{common.device_slug()}.json"
        names = ("steps", "peer_steps", "dropout", "data")
        self.settings = {name: getattr(options, name) for name in names}
        self.settings["data"] = Path(options.data).name
        self.results = {} if options.fresh or options.quick else self.read()

    def read(self) -> dict[str, dict[str, list[dict]]]:
        """What an earlier call measured in this very environment; runs that failed are tried again."""
        if not self.path.exists():
            return {}
        saved, here = json.loads(self.path.read_text(encoding="utf-8")), common.environment()
        if saved.get("settings") != self.settings or saved["environment"] != here:
            print(f"{self.path} was measured with other settings, versions or code: starting over")
            return {}
        return {
            shape: {name: [r for r in rounds if "failed" not in r] for name, rounds in part["results"].items()}
            for shape, part in saved["shapes"].items()
        }

    def rounds(self, shape: str, name: str) -> list[dict]:
        return self.results.setdefault(shape, {}).setdefault(name, [])

    def save(self) -> Path:
        """Write all there is."""
        peak = peak_flops(arciva.detect_hardware().name)
        shapes = {
            shape: {"weights": matrix_weights(SHAPES[shape]), "results": {n: r for n, r in found.items() if r}}
            for shape, found in self.results.items()
        }
        return common.save("train", {"settings": self.settings, "peak_flops": peak, "shapes": shapes}, self.path)


def schedule(options: argparse.Namespace, hardware: arciva.Hardware) -> list[tuple[int, str, str]]:
    """(round, shape, variant) in the order of their worth: the headline over all rounds, then the others."""
    if options.only:
        return [(r, options.shape, name) for r in range(options.repeats) for name in options.only]
    names = variants(options, hardware)
    first = headline(options, hardware)
    shapes = BIG_SHAPES if options.shape == "all" else (options.shape,)
    parts = (first, [name for name in names if name not in first])
    return [
        (r, shape, name)
        for part in parts
        for r in range(options.repeats)
        for name in part[:: -1 if r % 2 else 1]
        for shape in shapes
    ]


def measure(options: argparse.Namespace, hardware: arciva.Hardware, folder: str) -> tuple[Measured, int]:
    """(results, runs that the minutes did not suffice for); saved after every run."""
    measured, left, took = Measured(options), 0, {}
    ends = time.monotonic() + 60 * options.minutes
    flags = ["--data", options.data, "--steps", options.steps, "--peer-steps", options.peer_steps]
    flags += ["--dropout", options.dropout, "--folder", folder]
    for r, shape, name in schedule(options, hardware):
        rounds, now = measured.rounds(shape, name), time.monotonic()
        if len(rounds) > r or (rounds and rounds[-1].get("out_of_memory")):
            continue
        # A run that would be cut short tells nothing: none starts without the time that the slowest of its kind took so far.
        kind = re.split(r"[ \d]", name)[0]
        if now + took.get(kind, max(took.values(), default=0)) > ends:
            left += 1
            continue
        try:
            given = ["--variant", name, "--shape", shape, *flags]
            rounds.append(common.run_child(Path(__file__), given, timeout=max(60, ends - now)))
        except arciva.ArcivaError as error:
            rounds.append({"failed": str(error)})
        took[kind] = max(took.get(kind, 0), time.monotonic() - now)
        measured.save()
        print(f"round {r + 1}  {shape}  {name}  {outcome(rounds[-1])}", file=sys.stderr, flush=True)
    return measured, left


def outcome(result: dict) -> str:
    """One run in a few words."""
    if result.get("out_of_memory"):
        return "out of memory"
    if result.get("failed"):
        return f"failed: {result['failed']}"
    if result.get("not_learned"):
        return f"DID NOT LEARN: {result['not_learned']}"
    return f"{common.figure(result['tokens_per_second'])} useful tokens/s"


def parent(options: argparse.Namespace) -> Path:
    """Every variant in its own process; prints a table per shape, how ours stands to the peers, and what pays."""
    hardware = arciva.detect_hardware()
    for layout in options.layouts:
        read_layout(layout, hardware.packed_attention)
    if not options.no_peers and importlib.util.find_spec("trl") is None:
        raise arciva.ArcivaError("trl is not installed; pip install -r requirements-bench.txt, or add --no-peers")
    with tempfile.TemporaryDirectory() as folder:
        measured, left = measure(options, hardware, folder)
    print(
        common.describe(common.environment()),
        f"attention: {hardware.packed_attention}: {hardware.attention_reason}",
        sep="\n",
    )
    for shape, found in measured.results.items():
        if any(found.values()):
            report(shape, {name: rounds for name, rounds in found.items() if rounds}, hardware)
    if left:
        print(f"\n{left} runs are left after {options.minutes:g} minutes: the same command goes on with them")
    path = measured.save()
    if not any(rates(rounds) for found in measured.results.values() for rounds in found.values()):
        raise arciva.ArcivaError(f"no variant trained; {path} says why")
    return path


def report(shape: str, results: dict[str, list[dict]], hardware: arciva.Hardware) -> None:
    """The table of a shape and what follows from it."""
    peak, weights = peak_flops(hardware.name), matrix_weights(SHAPES[shape])
    known = f"peak {peak / 1e12:,.0f} TFLOPS" if peak else "the device's peak is not in the table, so no MFU"
    print(f"\n{shape}: {weights / 1e9:.2f} B weights in matrix products, {known}")
    mfu = {
        n: 4 * weights * statistics.median(rates(found)) / peak for n, found in results.items() if peak and rates(found)
    }
    print(f"\n{common.table([line(name, found, mfu.get(name)) for name, found in results.items()])}\n")
    goals = (
        verdicts(results, mfu) if re.search("H[12]00", hardware.name) else ["the goals are an H100's: undecided here"]
    )
    print("\n".join([*comparisons(results), *options_that_pay(results), *goals]))


def comparisons(results: dict[str, list[dict]]) -> list[str]:
    """Ours at its best beside every peer, at the same pairs per step."""
    lines = []
    for peer in (n for n in results if n.startswith("trl")):
        ours = fastest(results, lambda n, peer=peer: not n.startswith("trl") and pairs_of(n) == pairs_of(peer))
        a, b = common_rounds(results[ours], results[peer]) if ours else ([], [])
        if a:
            lines.append(f"ours ({ours}) is {common.spread(common.ratios(a, b))} times as fast as {peer}")
    return lines


def options_that_pay(results: dict[str, list[dict]], job_seconds: float = 600) -> list[str]:
    """Every other kernel and extra beside the first variant: over a job of ten minutes, what its first steps cost included."""
    base = next(iter(results))
    layout, kernel, *rest = base.split()
    lines = []
    for name in (n for n in results if n.startswith(f"{layout} ") and n != base and "checkpointing" not in n):
        a, b = common_rounds(results[name], results[base])
        if not a or rest != ["plain"]:
            continue
        _, other, _, *extras = name.split()
        cold = [statistics.median(r["cold_seconds"] for r in results[n] if rate(r)) for n in (name, base)]
        gain = statistics.median(a) * (job_seconds - cold[0]) / statistics.median(b) / (job_seconds - cold[1])
        what = " and ".join([*extras, *([f"{other} instead of {kernel}"] if other != kernel else [])])
        lines.append(
            f"{what}: {gain:.2f} times the tokens in ten minutes, so it {'pays' if gain > 1.02 else 'does not pay'}"
        )
    return lines


def verdicts(results: dict[str, list[dict]], mfu: dict[str, float]) -> list[str]:
    """How the goals stand."""
    lines, best = [], fastest(results, lambda n: not n.startswith("trl"))
    if best in mfu:
        lines.append(common.verdict(f"MFU in per cent ({best})", 100 * mfu[best], 45))
    for peer in (n for n in results if n.startswith(PADDED)):
        ours = fastest(results, lambda n, peer=peer: not n.startswith("trl") and pairs_of(n) == pairs_of(peer))
        a, b = common_rounds(results[ours], results[peer]) if ours else ([], [])
        if a:
            ratio = statistics.median(common.ratios(a, b))
            lines.append(common.verdict(f"useful tokens/s beside {peer}", ratio, 8))
    return lines


def line(name: str, found: list[dict], mfu: float | None) -> dict:
    """One variant as a line of the table."""
    trained = [r for r in found if rate(r) is not None]
    problems = [outcome(r) for r in found if rate(r) is None]
    if not trained:
        return {"variant": name, "useful tokens/s": problems[0]}
    gpu = trained[0]["gpu_peak_gib"] is not None
    peaks = [r["gpu_peak_gib"] if gpu else r["peak_gib"] for r in trained]
    estimated, last = trained[0]["estimated_gib"], trained[-1]
    return {
        "variant": name,
        "useful tokens/s": "; ".join([common.spread(rates(found)), *problems]),
        "MFU": f"{mfu:.1%}" if mfu else "",
        "peak GiB" if gpu else "peak GiB above imports": common.spread(peaks),
        "estimate ÷ peak": common.figure(estimated / statistics.median(peaks)) if estimated and gpu else "",
        "first steps s": common.spread([r["cold_seconds"] for r in trained]),
        "loss of 16 pairs": f"{last['loss_before']:.2f} → {last['loss_after']:.2f}",
        "gradient norm ≥": common.figure(min(min(r["gradient_norms"]) for r in trained)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="qwen2.5-7b")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), help="pairs x row tokens, or pairs x padded")
    parser.add_argument("--kernels", nargs="+", help="attention implementations, else those that are present")
    parser.add_argument("--bfd-rows", type=int, nargs="+", default=list(BFD_ROWS), help="TRL's row lengths")
    parser.add_argument("--peer-pairs", type=int, nargs="+", default=[128, 16], help="pairs per step of the peers")
    parser.add_argument("--steps", type=int, default=8, help="measured optimiser steps of ours")
    parser.add_argument("--peer-steps", type=int, default=3, help="measured optimiser steps of the peers")
    parser.add_argument("--minutes", type=float, default=9, help="no run starts that would not end within them")
    parser.add_argument("--only", nargs="+", help="these variants alone, in this order, as the table names them")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from the result file")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--no-extras", action="store_true", help="without liger and compile where they could run")
    parser.add_argument("--compile", action="store_true", help="compiled blocks also where there is no GPU")
    parser.add_argument(
        "--dropout", type=float, default=arciva.Config().dropout, help="before the adapters, in ours and the peers"
    )
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_extended.jsonl"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.layouts, options.bfd_rows, options.peer_pairs = ["16x256", "16xpadded"], [512], [16]
        options.steps, options.peer_steps, options.repeats, options.minutes = 3, 3, 1, 60
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
