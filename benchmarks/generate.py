"""Answers per second: one at a time, in padded batches, and ours, on held-out questions.

    python benchmarks/generate.py           120 questions of the seed corpus, three times each
    python benchmarks/generate.py --quick   12 questions, once

All three are greedy, ask the same 4-bit model with the same adapter through the same prompts, stop at the same tokens and compute in
the same precision; `one-at-a-time` and `padded-batches` are transformers' `generate`. The answers must be equal: the share that is gets
printed, and where one is not, both with the place at which they part. Goal: 15 times one at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common

import arciva_assistant_poc as arciva

VARIANTS = ("one-at-a-time", "padded-batches", "ours")


def held_out_questions(config: arciva.Config, count: int) -> list[list[dict]]:
    """`count` conversations up to the answer, from validation and test together."""
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    rows = datasets.concatenate_datasets([splits["validation"], splits["test"]])
    return [rows[i]["messages"][:-1] for i in arciva.sample_rows(rows, count, config.seed)]


@torch.inference_mode()
def generate_padded(
    model, prompts: Sequence[list[int]], hardware: arciva.Hardware, *, max_new_tokens: int, stop: list[int], pad_id: int
) -> list[list[int]]:
    """Continuation ids by transformers' own `generate`, the stop token included where it came."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=hardware.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=hardware.device)
    settings = {"do_sample": False, "use_cache": True, "eos_token_id": stop, "pad_token_id": pad_id}
    with arciva.evaluation_precision(model, hardware):
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings).tolist()
    continued = [row[width:] for row in written]
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in continued]
    return [row[:end] for row, end in zip(continued, ends, strict=True)]


def answer_with_generate(model, tokenizer, questions, config, hardware, batch: int) -> list[arciva.Answer]:
    """The common loop: questions in the order of the data, `batch` at a time."""
    stop, answers = arciva.stop_token_ids(tokenizer), []
    limits = {"max_new_tokens": config.max_new_tokens, "stop": stop, "pad_id": tokenizer.pad_token_id}
    for at in range(0, len(questions), batch):
        prompts = [arciva.encode_prompt(tokenizer, q) for q in questions[at : at + batch]]
        for ids in generate_padded(model, prompts, hardware, **limits):
            ended = ids[-1] in stop
            text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
            answers.append(arciva.Answer(text, cut=not ended, tokens=len(ids)))
    return answers


def child(options: argparse.Namespace) -> dict:
    """Seconds and answers of one variant; the model is loaded and has answered two questions before the clock starts."""
    hardware = arciva.detect_hardware()
    given = {"base_model": options.base_model, "data": options.data, "output_dir": options.adapter}
    config, _ = arciva.configure(hardware, **given)
    model, tokenizer = arciva.load_tuned_model(config, hardware)
    questions = held_out_questions(config, options.questions)

    def answer(asked: list) -> list[arciva.Answer]:
        if options.variant == "ours":
            limits = {"max_new_tokens": config.max_new_tokens, "batch_size": config.generation_batch}
            return arciva.generate_answers(model, tokenizer, asked, hardware, **limits)
        batch = 1 if options.variant == "one-at-a-time" else options.batch
        return answer_with_generate(model, tokenizer, asked, config, hardware, batch)

    answer(questions[:2])
    started = time.perf_counter()
    answers = answer(questions)
    seconds = time.perf_counter() - started
    prompt_tokens = sum(len(arciva.encode_prompt(tokenizer, q)) for q in questions)
    tokens = {"prompt_tokens": prompt_tokens, "answer_tokens": sum(a.tokens for a in answers)}
    return {"seconds": seconds, **tokens, "cut": sum(a.cut for a in answers), "answers": [a.text for a in answers]}


def parent(options: argparse.Namespace) -> Path:
    """Every variant in its own processes; prints the table and what differs."""
    questions, repeats = (12, 1) if options.quick else (options.questions, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--base-model", options.base_model, "--data", options.data, "--questions", questions]
        epochs = 0.2 if options.quick else None
        adapter = common.trained_adapter(options.adapter, options.base_model, options.data, folder, epochs=epochs)
        flags += ["--adapter", adapter, "--batch", options.batch]
        results = common.interleave(Path(__file__), dict.fromkeys(VARIANTS, flags), repeats)
        trained = arciva.read_manifest(adapter)
    training = {k: trained["training"][k] for k in ("steps", "best_loss")} | {"epochs": trained["config"]["epochs"]}
    print(common.describe(common.environment()), f"adapter: {training}", sep="\n")
    print(f"\n{common.table([line(name, results) for name in VARIANTS])}\n")
    print("\n".join(differences(results)) or "every answer of every round is equal")
    seconds = {name: [r["seconds"] for r in results[name]] for name in ("one-at-a-time", "ours")}
    ratio = statistics.median(common.ratios(seconds["one-at-a-time"], seconds["ours"]))
    print(common.verdict("answers/s beside one at a time", ratio, 15))
    payload = {"questions": questions, "adapter": training, "results": results}
    return common.save("generate", payload, options.out)


def line(name: str, results: dict[str, list[dict]]) -> dict:
    """One variant as a line of the table."""
    found, slow = results[name], results["one-at-a-time"]
    rate = [len(r["answers"]) / r["seconds"] for r in found]
    useful = [(r["prompt_tokens"] + r["answer_tokens"]) / r["seconds"] for r in found]
    ratio = common.ratios(rate, [len(r["answers"]) / r["seconds"] for r in slow])
    equal = [a == b for r, s in zip(found, slow, strict=True) for a, b in zip(r["answers"], s["answers"], strict=True)]
    return {
        "variant": name,
        "seconds": common.spread([r["seconds"] for r in found]),
        "answers/s": common.spread(rate),
        "answer tokens/s": common.spread([r["answer_tokens"] / r["seconds"] for r in found]),
        "with prompts, tokens/s": common.spread(useful),
        "times one-at-a-time": common.spread(ratio),
        "equal answers": f"{sum(equal) / len(equal):.1%}",
        "cut off": found[0]["cut"],
        "peak GiB above imports": common.spread([r["peak_gib"] for r in found]),
    }


def differences(results: dict[str, list[dict]]) -> list[str]:
    """What differs from the first round of one at a time, at most three of each variant."""
    reference, lines = results["one-at-a-time"][0]["answers"], []
    for name, found in results.items():
        pairs = {
            (i, a, b) for r in found for i, (a, b) in enumerate(zip(reference, r["answers"], strict=True)) if a != b
        }
        for i, one, other in sorted(pairs)[:3]:
            same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
            lines.append(f"{name}, question {i}, from character {same}: {one[same:]!r} became {other[same:]!r}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--batch", type=int, default=40, help="questions in a padded batch")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"))
    parser.add_argument("--adapter", default=str(common.ROOT / "model_output"), help="folder of a trained adapter")
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_synthetic.jsonl"))
    options = parser.parse_args(arguments)
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
