"""Peak memory and time of the streaming merge beside peft's, on a synthetic checkpoint; and which merge base is the better one.

    python benchmarks/merge.py                        1.1B shape, three times each, beside peft
    python benchmarks/merge.py --shape 7b             Qwen2.5-7B's shape, ours alone; needs 30 GiB of disk
    python benchmarks/merge.py --shape 7b --layers 4  the same with fewer layers, beside peft
    python benchmarks/merge.py --bases                both merge bases of the nano adapter against the live one
    python benchmarks/merge.py --quick                one layer of the 1.1B shape, once

The checkpoint has random weights in files of at most 4 GB as on the hub, the adapter random LoRA updates of every linear layer. peft
loads the base in fp16, merges and saves. It merges into the original weights: `ours-original` does the same work, and the check says how
much of the result is equal; `ours-dequantized` is the default and rounds every weight to NF4 and back on top. Seconds count until
the bytes are on disk. Peak memory holds mapped file pages too, which the kernel takes back under pressure; `anonymous` does not.
Goals: at most 1.2 GiB above the imports for the 7B shape, and no slower than peft.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it advises a hub kernel on every CPU

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common

import arciva_assistant_poc as arciva

GIB = 2**30
SHAPES = {
    "1b": LlamaConfig(  # TinyLlama-1.1B
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    ),
    "7b": Qwen2Config(  # Qwen2.5-7B
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        architectures=["Qwen2ForCausalLM"],
    ),
}
PEFT, ORIGINAL, DEQUANTIZED = "peft", "ours-original", "ours-dequantized"


# --- the synthetic run -------------------------------------------------------------------------------------------------------------------


def model_shape(options: argparse.Namespace):
    """The chosen shape's configuration, shortened and tied as asked for."""
    shape = SHAPES[options.shape]
    shape.num_hidden_layers = options.layers or shape.num_hidden_layers
    shape.tie_word_embeddings, shape.dtype = options.tied, getattr(torch, options.dtype)
    if shape.model_type == "qwen2":
        shape.layer_types = ["full_attention"] * shape.num_hidden_layers
    return shape


def skeleton(shape) -> torch.nn.Module:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def random_weights(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights of each tensor: parts of one random pool, because no merge looks at the values."""
    pool = (0.02 * torch.randn((1 << 24) + 9973, generator=torch.Generator().manual_seed(0))).to(dtype)
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if "norm" in name:
            yield name, torch.ones(shape, dtype=dtype)
            continue
        yield name, pool.repeat(-(-(offset + size) // len(pool)))[offset : offset + size].reshape(shape).clone()
        offset = (offset + size) % len(pool)


def write_base(shape, folder: Path, *, shard_bytes: int = 4 * 10**9) -> None:
    """A checkpoint in shards, with their index, as the hub has it."""
    folder.mkdir(parents=True)
    shape.save_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in skeleton(shape).named_parameters()}
    groups = arciva.plan_shards(shapes, shard_bytes)
    owner = {name: number for number, names in enumerate(groups, 1) for name in names}
    files = {n: f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)}
    tensors = random_weights(shapes, shape.dtype)
    for number, names in enumerate(groups, 1):
        save_file(dict(next(tensors) for _ in names), folder / files[number], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[number] for name, number in owner.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_adapter(shape, config: arciva.Config, *, rslora: bool) -> None:
    """An adapter of every linear layer but the head, with random updates, and the manifest that training leaves."""
    folder, generator = Path(config.output_dir), torch.Generator().manual_seed(1)
    layers = {
        name: module
        for name, module in skeleton(shape).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    lora.save_pretrained(str(folder))
    tensors = {}
    for name, layer in layers.items():
        sizes = {"A": (config.rank, layer.in_features), "B": (layer.out_features, config.rank)}
        for side, size in sizes.items():
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = 0.02 * torch.randn(size, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    arciva.load_tokenizer(str(common.ROOT / "data/nano_base")).save_pretrained(folder)
    manifest = {
        "config": asdict(config),
        "base_model": config.base_model,
        "base_fingerprint": arciva.base_fingerprint(config.base_model),
        "quantized_from": str(arciva.detect_hardware().load_dtype).removeprefix("torch."),
        "data_fingerprint": "synthetic",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def settings(folder: Path, variant: str) -> arciva.Config:
    """Where a variant reads and writes."""
    return arciva.Config(
        base_model=str(folder / "base"),
        output_dir=str(folder / "adapter"),
        merged_dir=str(folder / variant),
        merge_base="original" if variant == ORIGINAL else "dequantized",
    )


# --- the variants ------------------------------------------------------------------------------------------------------------------------


class AnonymousPeak:
    """The largest anonymous memory, in GiB above that at the start, of what runs inside: a look every 20 ms."""

    def __enter__(self) -> AnonymousPeak:
        self.before = self.highest = common.process_memory()["RssAnon"]
        self.done, self.thread = threading.Event(), threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.02):
            self.highest = max(self.highest, common.process_memory()["RssAnon"])

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.gib = self.highest - self.before


def merge_with_peft(config: arciva.Config) -> None:
    """What peft's documentation says: load the base in fp16, put the adapter on, merge, save."""
    model = AutoModelForCausalLM.from_pretrained(config.base_model, dtype=torch.float16)
    merged = PeftModel.from_pretrained(model, config.output_dir).merge_and_unload()
    merged.save_pretrained(config.merged_dir)
    arciva.load_tokenizer(config.output_dir).save_pretrained(config.merged_dir)


def write_through(folder: Path) -> int:
    """Wait until every file of a folder is on disk; returns its bytes."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return sum(file.stat().st_size for file in folder.iterdir())


def merge(options: argparse.Namespace) -> dict:
    """Seconds and memory of one variant's merge."""
    config = settings(options.folder, options.variant)
    shutil.rmtree(config.merged_dir, ignore_errors=True)
    skeleton(AutoConfig.from_pretrained(config.base_model))  # imports the model's code: neither is charged for that
    with AnonymousPeak() as anonymous:
        started = time.perf_counter()
        merge_with_peft(config) if options.variant == PEFT else arciva.merge_adapter(config)
        returned = time.perf_counter() - started
        size = write_through(Path(config.merged_dir))
        seconds = time.perf_counter() - started
    if not options.keep:
        shutil.rmtree(config.merged_dir)
    return {"seconds": seconds, "returned_seconds": returned, "gib": size / GIB, "anonymous_gib": anonymous.gib}


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a folder's safetensors files."""
    for name, file in sorted(arciva.base_shards(str(folder), None).items()):
        with safe_open(file, "pt") as opened:
            yield name, opened.get_tensor(name)


def check(options: argparse.Namespace) -> dict:
    """How much of peft's result and ours is equal, over every element; by how much the rest differs; how much the adapter changed."""
    counts, largest = {"equal": 0, "unchanged": 0, "elements": 0}, 0.0
    ours, base = (arciva.base_shards(str(options.folder / name), None) for name in (ORIGINAL, "base"))
    for name, theirs in tensors_of(options.folder / PEFT):
        with safe_open(ours.pop(name), "pt") as merged, safe_open(base[name], "pt") as original:
            own, before = merged.get_tensor(name), original.get_tensor(name)
        counts["equal"] += (own == theirs).sum().item()
        counts["unchanged"] += (own == before.half()).sum().item()
        counts["elements"] += own.numel()
        largest = max(largest, (own.float() - theirs.float()).abs().max().item())
    return {**counts, "largest_difference": largest, "only_in_ours": sorted(ours)}


def bases(options: argparse.Namespace) -> dict:
    """Both merge bases of a trained adapter, each measured against the live adapter on the same held-out questions."""
    hardware = arciva.detect_hardware()
    config, _ = arciva.configure(hardware, base_model=options.base_model, output_dir=options.adapter, data=options.data)
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    rows = arciva.verification_rows(splits, config, options.questions)
    live = arciva.measure_model(*arciva.load_tuned_model(config, hardware), rows, config, hardware)
    found = {}
    for base in ("dequantized", "original"):
        merged = replace(config, merge_base=base, merged_dir=str(options.folder / base))
        arciva.merge_adapter(merged)
        model = arciva.load_merged_model(merged, hardware)
        found[base] = arciva.compare_models(live, arciva.measure_model(*model, rows, merged, hardware))
    return found


def child(options: argparse.Namespace) -> dict:
    if options.variant == "write":
        shape = model_shape(options)
        write_base(shape, options.folder / "base")
        write_adapter(shape, settings(options.folder, "merged"), rslora=options.rslora)
        return {}
    return {"check": check, "bases": bases}.get(options.variant, merge)(options)


# --- the comparison ----------------------------------------------------------------------------------------------------------------------


def refuse_small_disk(folder: Path, gib: float) -> None:
    """One sentence where the disk cannot hold what the benchmark writes."""
    free = shutil.disk_usage(folder).free / GIB
    print(f"disk: {gib:.1f} GiB needed in {folder}, {free:.1f} GiB free")
    if free < gib:
        raise arciva.ArcivaError(
            f"{folder} has {free:.1f} GiB free, expected {gib:.1f}; name another with --folder or lower --layers"
        )


def chosen_variants(options: argparse.Namespace, gib: float) -> list[str]:
    """peft holds the whole model: it takes part where that is asked for and fits, with room for a shard on top."""
    if options.shape == "7b" and not options.layers:
        return [DEQUANTIZED, ORIGINAL]
    free = arciva.free_memory_gib(arciva.detect_hardware())
    if free < 1.5 * gib + 2:
        print(f"without peft: it needs some {1.5 * gib + 2:.0f} GiB of memory and {free:.0f} GiB are free")
        return [DEQUANTIZED, ORIGINAL]
    return [DEQUANTIZED, ORIGINAL, PEFT]


def compare_merges(options: argparse.Namespace, folder: Path) -> dict:
    """Every variant's results over the rounds, and the check of ours against peft's."""
    shape = model_shape(options)
    gib = 2 * sum(p.numel() for p in skeleton(shape).parameters()) / GIB
    variants = chosen_variants(options, gib)
    beside_peft = PEFT in variants
    refuse_small_disk(folder, 1.05 * gib * (1 + (len(variants) if beside_peft else 1)))
    flags = ["--folder", folder, "--shape", options.shape, "--dtype", options.dtype]
    flags += ["--layers", shape.num_hidden_layers] + ["--tied"] * options.tied + ["--rslora"] * options.rslora
    common.run_child(Path(__file__), ["--variant", "write", *flags])
    flags += ["--keep"] * beside_peft
    results = common.interleave(Path(__file__), dict.fromkeys(variants, flags), options.repeats)
    found = {"weights_gib": gib, "layers": shape.num_hidden_layers, "tied": options.tied, "dtype": options.dtype}
    found |= {"shape": options.shape, "rank_stabilised": options.rslora, "results": results}
    return found | {"check": common.run_child(Path(__file__), ["--variant", "check", *flags])} if beside_peft else found


def line(name: str, results: dict[str, list[dict]]) -> dict:
    """One variant as a line of the table."""
    found, shown = results[name], {}
    if PEFT in results:
        for key, what in (("seconds", "seconds"), ("peak_gib", "peak")):
            rates = common.ratios([r[key] for r in found], [r[key] for r in results[PEFT]])
            shown[f"times peft's {what}"] = common.spread(rates)
    return {
        "variant": name,
        "seconds": common.spread([r["seconds"] for r in found]),
        "written GiB": common.figure(found[0]["gib"]),
        "peak GiB above imports": common.spread([r["peak_gib"] for r in found]),
        "anonymous GiB": common.spread([r["anonymous_gib"] for r in found]),
        **shown,
    }


def verdicts(found: dict) -> list[str]:
    """How the goals stand: for each merge base its time beside peft's, which merges into the original, and for a 7B shape its memory."""
    lines, results = [], found["results"]
    for name in (DEQUANTIZED, ORIGINAL):
        if PEFT in results:
            ratio = common.ratios(*([r["seconds"] for r in results[which]] for which in (name, PEFT)))
            lines.append(common.verdict(f"seconds of {name} beside peft's", statistics.median(ratio), 1, at_most=True))
        if found["shape"] == "7b":
            peak = statistics.median(r["peak_gib"] for r in results[name])
            lines.append(common.verdict(f"GiB above the imports of {name}", peak, 1.2, at_most=True))
    return lines


def print_merges(found: dict) -> None:
    head = "tied" if found["tied"] else "untied"
    print(
        f"{found['shape']} shape, {found['layers']} layers, {found['weights_gib']:.2f} GiB of {found['dtype']}, {head} head,"
        f" {'rank-stabilised' if found['rank_stabilised'] else 'plain'} scaling"
    )
    print(common.describe(common.environment()), end="\n\n")
    print(common.table([line(name, found["results"]) for name in found["results"]]))
    print("", *verdicts(found), sep="\n")
    if checked := found.get("check"):
        equal, changed = checked["equal"] / checked["elements"], 1 - checked["unchanged"] / checked["elements"]
        print(
            f"\n{ORIGINAL} and {PEFT}: {equal:.4%} of the elements equal, the largest difference is "
            f"{checked['largest_difference']:.2g}; the adapter changed {changed:.0%} of them; "
            f"only in ours: {', '.join(checked['only_in_ours']) or 'nothing'}"
        )


def print_bases(found: dict) -> None:
    print(common.describe(common.environment()), end="\n\n")
    print(common.table([{"merge base": base, **{k: f"{v:.4g}" for k, v in f.items()}} for base, f in found.items()]))


def parent(options: argparse.Namespace) -> Path:
    """Everything on disk lies in a folder that goes away, also when the run fails."""
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-") as folder:
        if options.bases:
            epochs = 0.2 if options.quick else None
            adapter = common.trained_adapter(options.adapter, options.base_model, options.data, folder, epochs=epochs)
            flags = ["--folder", folder, "--adapter", adapter, "--base-model", options.base_model]
            flags += ["--data", options.data, "--questions", 6 if options.quick else options.questions]
            found = common.run_child(Path(__file__), ["--variant", "bases", *flags])
            found.pop("peak_gib")
            print_bases(found)
            return common.save("merge-bases", {"results": found}, options.out)
        found = compare_merges(options, Path(folder))
    print_merges(found)
    return common.save(f"merge-{options.shape}-{options.dtype}", found, options.out)


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the base")
    parser.add_argument("--tied", action="store_true", help="head tied to the embedding")
    parser.add_argument("--rslora", action="store_true", help="rank-stabilised scaling")
    parser.add_argument(
        "--folder", type=Path, default=common.ROOT / "downloads", help="where the checkpoint may lie for the while"
    )
    parser.add_argument("--bases", action="store_true", help="score both merge bases instead")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"))
    parser.add_argument("--adapter", default=str(common.ROOT / "model_output"), help="folder of a trained adapter")
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_synthetic.jsonl"))
    parser.add_argument("--questions", type=int, default=120, help="held-out questions for --bases")
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick and not options.bases:
        options.layers, options.repeats = options.layers or 1, 1
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
