"""Training throughput beside TRL's, on the CPU: useful tokens per second, peak memory, and the held-out loss after the same pairs.

    python benchmarks/train_cpu.py             512 pairs of the seed corpus, three times each
    python benchmarks/train_cpu.py --sweep     ours alone with other row lengths and micro-batches, learning rates and steps: what do they change?
    python benchmarks/train_cpu.py --profile   where the seconds of our step go
    python benchmarks/train_cpu.py --quick     64 pairs, once

Peers (`pip install -r requirements-bench.txt`): (a) `trl-padded`, TRL's SFTTrainer as most people run it, and (b) `trl-bfd`, its packing.
Which row length, which format of the base (loaded in 16 bits or in fp32) and which attention is fastest for them here is tried first, on
a quarter of the pairs; the fastest is the peer. All train the same 4-bit nano base with the same adapter for one epoch of the same
pairs, and multiply in the same format; peers.py says in which formats each keeps the rest. Useful tokens are those of prompts and
answers, without padding; the clock runs over optimiser steps and the loading of their batches, after the first step. The held-out loss is
the module's for all, in fp32, over the rephrased validation questions. A run whose gradient norm was 0 or whose held-out loss
did not fall is marked and compared with nothing. Goals: at least 3 times (a) and 1.6 times (b), at the same held-out loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common
import peers

import arciva_assistant_poc as arciva

OURS, PADDED, BFD = "ours", "trl-padded", "trl-bfd"
BFD_LENGTHS = (128, 256, 512, 1024, 2048)
ATTENTIONS = ("sdpa", "eager")  # the peers' default, and what is faster for ours on a CPU
LEARNING_RATE = arciva.PRESETS["nano"]["learning_rate"]
# Of the sweep: a change of row length or micro-batch must leave the held-out loss where it is, one of what a step means must not.
SWEEP = {
    "the preset": {},
    "every pair in a row of its own": {"row_tokens": 1},
    "rows of 64": {"row_tokens": 64},
    "rows of 1,024": {"row_tokens": 1024},
    "micro-batches of 4 pairs": {"micro_batch_pairs": 4},
    "micro-batches of 1 pair": {"micro_batch_pairs": 1},
    "half the pairs per step": {"pairs_per_step": arciva.Config().pairs_per_step // 2},
    # Learning rates as the square root of the batch: ×1.4 for twice the pairs, ×2 for four times.
    "32 pairs per step, learning rate × 1.4": {"pairs_per_step": 32, "learning_rate": 1.4 * LEARNING_RATE},
    "64 pairs per step, learning rate × 2": {"pairs_per_step": 64, "learning_rate": 2 * LEARNING_RATE},
    "half the learning rate": {"learning_rate": LEARNING_RATE / 2},
}


def prepare(options: argparse.Namespace):
    """(config, hardware, tokenizer, splits cut to the wanted pairs, model with a fresh adapter)."""
    hardware = arciva.detect_hardware()
    given = {"base_model": options.base_model, "data": options.data, "epochs": 1.0, "log_every": 1}
    given |= SWEEP.get(options.variant, {})
    config, _ = arciva.configure(hardware, **given, resume="never", checkpoint_dir=str(options.folder))
    arciva.seed_everything(config.seed)
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    chosen = arciva.sample_rows(splits["train"], options.pairs, config.seed)
    splits["train"] = splits["train"].select(chosen)
    # A peer's name ends with the format its base is loaded in, and its attention.
    loaded = peers.As16Bit(**vars(hardware)) if options.variant.split()[1:2] == [precision(hardware)] else hardware
    model = arciva.add_adapter(arciva.load_base_model(config, loaded), config)
    return config, hardware, arciva.load_tokenizer(config.base_model), splits, model


def precision(hardware: arciva.Hardware) -> str:
    """Name of the format that products compute in."""
    return str(hardware.dtype).removeprefix("torch.")


def held_out_loss(model, tokenizer, splits, config: arciva.Config, hardware: arciva.Hardware) -> float:
    """Nats per answer token over the rephrased validation questions."""
    encoded = arciva.encode_held_out(tokenizer, splits["validation"], config.max_length)["rephrased"]
    limits = {"row_tokens": config.row_tokens, "pad_id": tokenizer.pad_token_id}
    with peers.in_fp32(model):
        return math.log(arciva.perplexity(arciva.score_losses(model, encoded, hardware, **limits)))


def child(options: argparse.Namespace) -> dict:
    """Train one variant; its throughput, losses and gradient norms."""
    config, hardware, tokenizer, splits, model = prepare(options)
    encoded, _, _ = arciva.encode_split(tokenizer, splits["train"], config.max_length)
    mean_tokens = sum(len(item.input_ids) for item in encoded) / len(encoded)
    before = held_out_loss(model, tokenizer, splits, config, hardware)
    clock = peers.StepClock()
    if options.variant == OURS or options.variant in SWEEP:
        with profiled(options.profile):
            arciva.train_adapter(model, tokenizer, splits, config, hardware, callbacks=[clock])
        shape, steps = f"rows of {config.row_tokens}", math.ceil(len(encoded) / config.pairs_per_step)
    else:
        model, shape, steps = train_peer(options, (config, hardware, tokenizer, splits, model), clock)
        tokenizer = arciva.load_tokenizer(config.base_model)  # without TRL's template
    after = held_out_loss(model, tokenizer, splits, config, hardware)
    return {
        "shape": shape,
        "tokens_per_second": mean_tokens * len(encoded) * clock.steps / steps / clock.seconds,
        "pairs": len(encoded),
        "tokens_per_pair": mean_tokens,
        "steps": steps,
        "held_out_before": before,
        "held_out_after": after,
        "losses": clock.losses,
        "gradient_norms": clock.norms,
        "not_learned": common.not_learned(before, after, clock.norms),
        "threads": torch.get_num_threads(),
    }


def train_peer(options: argparse.Namespace, prepared: tuple, clock: peers.StepClock):
    """(trained model, what a pass looks like, optimiser steps) of the peer that the variant names: `trl-bfd-512 bfloat16 sdpa`."""
    config, hardware, tokenizer, splits, model = prepared
    name, loaded, attention = options.variant.split()
    length = None if name == PADDED else int(name.removeprefix(f"{BFD}-"))
    settings = {"row_tokens": length, "attention": attention, "callbacks": [clock]}
    data = (tokenizer, splits["train"], config, hardware, str(options.folder))
    trainer = peers.trl_trainer(model, *data, **settings)
    trainer.train()
    shape = f"rows of {length}" if length else f"batches of {peers.PADDED_BATCH}, padded"
    return trainer.model, f"{shape}, base in {loaded}, {attention}", trainer.state.max_steps


class profiled:
    """Prints torch's own profile of what runs inside, the operators that take most time first."""

    def __init__(self, on: bool):
        self.profile = torch.profiler.profile() if on else None

    def __enter__(self):
        if self.profile:
            self.profile.__enter__()

    def __exit__(self, *error):
        if self.profile:
            self.profile.__exit__(*error)
            print(self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def sweep(options: argparse.Namespace, flags: list) -> Path:
    """Ours with one setting changed at a time."""
    results = common.interleave(Path(__file__), dict.fromkeys(SWEEP, flags), options.repeats)
    rates = {name: [r["tokens_per_second"] for r in found] for name, found in results.items()}
    shown = ("variant", "useful tokens/s", "peak GiB above imports", "steps", "held-out loss")
    lines = [line(name, found, {**rates, OURS: rates["the preset"]}) for name, found in results.items()]
    print(
        common.describe(common.environment()), common.table([{k: row[k] for k in shown} for row in lines]), sep="\n\n"
    )
    return common.save("train-sweep", {"pairs": options.pairs, "results": results}, options.out)


def fastest(found: dict[str, list[dict]]) -> str:
    """The variant with the most useful tokens per second of those that learned."""
    rates = {name: r[0]["tokens_per_second"] for name, r in found.items() if not r[0]["not_learned"]}
    if not rates:
        raise arciva.ArcivaError(f"no peer learned in its trial: {[r[0]['not_learned'] for r in found.values()]}")
    return max(rates, key=rates.get)


def choose_peers(options: argparse.Namespace, flags: list) -> tuple[str, str, dict[str, list[dict]]]:
    """(padded, packed, what was tried): the row length first, then format and attention of each."""
    hardware, script = arciva.detect_hardware(), Path(__file__)
    formats = peers.load_formats(hardware)
    lengths = BFD_LENGTHS[1:3] if options.quick else BFD_LENGTHS
    plain = f"{formats[0]} {ATTENTIONS[0]}"
    tried = common.interleave(script, {f"{BFD}-{length} {plain}": flags for length in lengths}, 1)
    best = fastest(tried).split()[0]
    rest = [f"{n} {f} {a}" for n in (best, PADDED) for f in formats for a in ATTENTIONS if f"{n} {f} {a}" not in tried]
    tried |= common.interleave(script, dict.fromkeys(rest, flags), 1)
    padded = {name: found for name, found in tried.items() if name.startswith(PADDED)}
    return fastest(padded), fastest({n: found for n, found in tried.items() if n not in padded}), tried


def parent(options: argparse.Namespace) -> Path:
    """The peers' best settings first, then all three side by side."""
    script = Path(__file__)
    with tempfile.TemporaryDirectory() as folder:

        def flags(pairs: int) -> list:
            shared = ["--base-model", options.base_model, "--data", options.data, "--pairs", pairs]
            return [*shared, "--folder", folder]

        if options.sweep:
            return sweep(options, flags(options.pairs))
        few = max(48, options.pairs // 4)
        padded, packed, tried = choose_peers(options, flags(few))
        results = common.interleave(
            script, dict.fromkeys((OURS, padded, packed), flags(options.pairs)), options.repeats
        )
    rates = {name: [r["tokens_per_second"] for r in found] for name, found in results.items()}
    print(common.describe(common.environment()), f"{results[OURS][0]['threads']} threads", sep="\n")
    speeds = (f"{name.removeprefix('trl-')}: {found[0]['tokens_per_second']:,.0f}" for name, found in tried.items())
    print(f"the peers' trials on {few} pairs, useful tokens/s: {', '.join(speeds)}")
    print(f"\n{common.table([line(name, found, rates) for name, found in results.items()])}\n")
    print("\n".join(verdicts(results, padded, packed)))
    return common.save("train", {"pairs": options.pairs, "tried": tried, "results": results}, options.out)


def verdicts(results: dict[str, list[dict]], padded: str, packed: str) -> list[str]:
    """How the goals stand; a comparison with a run that did not learn is none."""
    lines = []
    for name, bound in ((padded, 3.0), (packed, 1.6)):
        pairs = list(zip(results[OURS], results[name], strict=True))
        if any(r["not_learned"] for pair in pairs for r in pair):
            lines.append(f"no comparison with {name}: a run did not learn")
            continue
        ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
        lines.append(common.verdict(f"useful tokens/s beside {name}", ratio, bound))
        loss = statistics.median(a["held_out_after"] / b["held_out_after"] for a, b in pairs)
        lines.append(common.verdict(f"held-out loss beside {name}", loss, 1.02, at_most=True))
    return lines


def line(name: str, found: list[dict], rates: dict[str, list[float]]) -> dict:
    """One variant as a line of the table."""
    first, failed = found[0], [r["not_learned"] for r in found if r["not_learned"]]
    compared = name != OURS and not failed
    return {
        "variant": name,
        "shape": first["shape"],
        "useful tokens/s": f"DID NOT LEARN: {failed[0]}" if failed else common.spread(rates[name]),
        "ours is": f"{common.spread(common.ratios(rates[OURS], rates[name]))} times as fast" if compared else "",
        "peak GiB above imports": common.spread([r["peak_gib"] for r in found]),
        "steps": first["steps"],
        "training loss": f"{first['losses'][0]:.2f} → {first['losses'][-1]:.2f}",
        "gradient norm ≥": common.figure(min(min(r["gradient_norms"]) for r in found)),
        "held-out loss": f"{first['held_out_before']:.2f} → {common.spread([r['held_out_after'] for r in found])}",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=512, help="training pairs, seen once")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"))
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_synthetic.jsonl"))
    parser.add_argument("--sweep", action="store_true", help="ours alone, one setting changed at a time")
    parser.add_argument("--profile", action="store_true", help="torch's profile of our training, instead")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.repeats = min(options.pairs, 256 if options.sweep else 64), 1  # four steps
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            options.variant, options.folder = OURS, Path(folder)
            return common.run(options, lambda: child(options), lambda: parent(options))
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
