"""What a random split would have done to the figures: the same training, judged on a split that leaks and on ours.

    python benchmarks/leak.py                                          the nano base on the seed corpus
    python benchmarks/leak.py --data data/arciva_qa_extended.jsonl     the same on the whole corpus
    python benchmarks/leak.py --quick                                  a fifth of an epoch, a few questions

The nano base gets an adapter twice, with the same settings and equally many pairs of one corpus: once on our split, once on a random
split with as many held-out rows. The first table judges each on its own test questions, the random one's also by whether their very
answer or a near-copy of the question is in its training. It flatters the random split twice over: its held-out questions are easier,
and the nano base itself was built from text that holds out ours alone (see the column `base perplexity`). The second table is free of
both: the same questions, which neither training nor the base has read, answered by both; the difference is what leaked. Intervals are
95 % bootstrap intervals over questions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import pandas as pd

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common

import arciva_assistant_poc as arciva

OURS, RANDOM = "our split", "random split"
SHOWN = {"bleu": "BLEU", "rouge_l": "ROUGE-L", "exact_match": "exact match", "perplexity": "perplexity"}


def random_split(examples: list[arciva.Example], config: arciva.Config, held_out: int, train: int) -> list[str]:
    """A side for each example: `held_out` random rows, half of them for validation, and `train` of the rest.

    Rows beyond these are `aside`, so that both trainings see equally many pairs.
    """
    sides = arciva.random_sides(examples, config.seed, held_out)
    held = sorted((i for i, s in enumerate(sides) if s == "test"), key=lambda i: draw(config, "half", examples[i]))
    for i in held[: held_out // 2]:
        sides[i] = "validation"
    taught = sorted((i for i, s in enumerate(sides) if s == "train"), key=lambda i: draw(config, "train", examples[i]))
    for i in taught[train:]:
        sides[i] = "aside"
    return sides


def draw(config: arciva.Config, what: str, example: arciva.Example) -> float:
    return arciva.fraction(config.seed, "random split", what, example.id)


def our_split(examples: list[arciva.Example], config: arciva.Config) -> tuple[list[str], dict[str, str]]:
    """(side of each example, novelty by id) as training uses them; what was set aside is `aside`."""
    splits, _ = arciva.split_examples(examples, config.seed)
    sides = {row["id"]: side for side, dataset in splits.items() for row in dataset}
    novelty = {row["id"]: row["novelty"] for dataset in splits.values() for row in dataset}
    return [sides.get(e.id, "aside") for e in examples], novelty


def dataset_of(examples: list[arciva.Example], novelty: dict[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**asdict(e), "novelty": novelty[e.id]} for e in examples])


def random_novelty(examples: list[arciva.Example], sides: list[str], config: arciva.Config) -> dict[str, str]:
    """A random split knows no novelty, but training wants both halves of the validation side: they are drawn.

    Early stopping follows the first of them, as it follows the rephrased half of ours.
    """
    halves = {e.id: "rephrased" if draw(config, "novelty", e) < 0.5 else "unseen" for e in examples}
    return {e.id: "train" if s == "train" else halves[e.id] for e, s in zip(examples, sides, strict=True)}


def both_splits(config: arciva.Config) -> tuple[list[arciva.Example], dict[str, list[str]], dict[str, dict[str, str]]]:
    """(examples, sides of each split, novelty by id of each split), with equally many training pairs."""
    examples = sorted(arciva.load_examples(config.data)[0], key=lambda e: e.id)
    ours, novelty = our_split(examples, config)
    held_out = sum(side in ("validation", "test") for side in ours)
    naive = random_split(examples, config, held_out, ours.count("train"))
    return examples, {OURS: ours, RANDOM: naive}, {OURS: novelty, RANDOM: random_novelty(examples, naive, config)}


def child(options: argparse.Namespace) -> dict:
    """Train on one split, answer its held-out questions, and say of each what training had given away."""
    hardware = arciva.detect_hardware()
    config = settings(options, hardware)
    examples, sides, novelty = both_splits(config)
    own, other = sides[options.variant], sides[RANDOM if options.variant == OURS else OURS]
    splits = datasets.DatasetDict(
        {
            side: dataset_of([e for e, s in zip(examples, own, strict=True) if s == side], novelty[options.variant])
            for side in ("train", "validation", "test")
        }
    )
    arciva.seed_everything(config.seed)
    tokenizer = arciva.load_tokenizer(config.base_model)
    model = arciva.add_adapter(arciva.load_base_model(config, hardware), config)
    training = arciva.train_adapter(model, tokenizer, splits, config, hardware)
    held_out = datasets.concatenate_datasets([splits["validation"], splits["test"]])
    chosen = arciva.sample_rows(held_out, 2 * config.max_eval_rows, config.seed)
    frame = arciva.predict_split(model, tokenizer, held_out.select(chosen), config, hardware)
    pairs = arciva.near_duplicates([e.question for e in examples])
    rates = arciva.leak_rates(examples, own, pairs)
    frame = frame.merge(given_away(examples, own, other, pairs), on="id")
    return {
        "training_pairs": len(splits["train"]),
        "near_copies": rates[0],
        "known_answers": rates[1],
        "training": {k: v for k, v in asdict(training).items() if k not in ("history", "plan", "checkpoints")},
        "losses": [point["loss"] for point in training.history if "loss" in point],
        "gradient_norms": [point["grad_norm"] for point in training.history if "grad_norm" in point],
        "predictions": frame.to_dict("records"),
    }


def given_away(
    examples: list[arciva.Example], own: list[str], other: list[str], pairs: list[tuple[int, int]]
) -> pd.DataFrame:
    """Of each held-out question: its side, whether training held a near-copy or its answer, and whether the other split held it out."""
    held = [i for i, side in enumerate(own) if side in ("validation", "test")]
    taught = {e.messages[-1]["content"] for e, side in zip(examples, own, strict=True) if side == "train"}
    copies = {a for i, j in pairs for a, b in ((i, j), (j, i)) if own[b] == "train"}
    return pd.DataFrame(
        {
            "id": [examples[i].id for i in held],
            "side": [own[i] for i in held],
            "leaked": [i in copies or examples[i].messages[-1]["content"] in taught for i in held],
            "shared": [other[i] in ("validation", "test") for i in held],
        }
    )


def settings(options: argparse.Namespace, hardware: arciva.Hardware) -> arciva.Config:
    config, _ = arciva.configure(hardware, base_model=options.base_model, data=options.data, epochs=options.epochs)
    limit = 40 if options.quick else 10**9
    return replace(config, resume="never", checkpoint_dir=str(options.folder / "checkpoints"), max_eval_rows=limit)


def own_questions(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Each split's own test questions, by the name under which they are printed."""
    ours, naive = (frames[name].query("side == 'test'") for name in (OURS, RANDOM))
    return {
        f"{OURS}, rephrased": ours.query("novelty == 'rephrased'"),
        f"{OURS}, unseen": ours.query("novelty == 'unseen'"),
        f"{OURS}, all": ours,
        f"{RANDOM}, given away by its training": naive.query("leaked"),
        f"{RANDOM}, not given away": naive.query("not leaked"),
        f"{RANDOM}, all": naive,
    }


def shared_questions(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The questions that both splits hold out; as `base` the answers after training on ours, as `tuned` after the random one."""
    parts = ["answer", "cut", "nll"]
    ours = frames[OURS].query("shared").drop(columns=[f"base_{part}" for part in parts])
    ours = ours.rename(columns={f"tuned_{part}": f"base_{part}" for part in parts})
    naive = frames[RANDOM][["id", "leaked", *(f"tuned_{part}" for part in parts)]]
    both = ours.drop(columns="leaked").merge(naive, on="id")
    return {
        "all": both,
        "facts taught by both": both.query("novelty == 'rephrased'"),
        "facts unseen under our split": both.query("novelty == 'unseen'"),
        "the same, given away by the random split": both.query("novelty == 'unseen' and leaked"),
    }


def score(groups: dict[str, pd.DataFrame], seed: int) -> dict[str, dict]:
    """Every metric of every group that has questions."""
    return {name: arciva.score_group(frame, seed, 1000) for name, frame in groups.items() if len(frame)}


def line(name: str, scores: dict) -> dict:
    """One group as a line of the first table: the tuned model's figures with their intervals."""
    cells = {
        label: "{value:.3g} [{low:.3g}, {high:.3g}]".format(**scores[metric]["tuned"])
        for metric, label in SHOWN.items()
    }
    base = common.figure(scores["perplexity"]["base"]["value"])
    return {"trained and judged on": name, "questions": scores["questions"], **cells, "base perplexity": base}


def shared_lines(scores: dict[str, dict]) -> list[dict]:
    """The second table: the module's own, whose columns are base and tuned."""
    frame = arciva.report_table({"groups": scores}, list(SHOWN)).reset_index()
    names = {"group": "held out by both", "base": f"after {OURS}", "tuned": f"after {RANDOM}"}
    return frame.rename(columns=names).to_dict("records")


def describe(name: str, found: dict) -> str:
    """What was trained on, that it learned, and what it gave away."""
    training, losses = found["training"], found["losses"]
    return (
        f"{name}: {found['training_pairs']:,} training pairs, {training['steps']:,} steps, loss {losses[0]:.2f} → {losses[-1]:.2f}, "
        f"gradient norm at least {min(found['gradient_norms']):.2g}; of its held-out rows, training has a near-copy for "
        f"{found['near_copies']:.1%} and the very answer for {found['known_answers']:.1%}"
    )


def parent(options: argparse.Namespace) -> Path:
    """Both trainings one after the other; prints what each split makes of them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--folder", folder, "--base-model", options.base_model, "--data", options.data]
        flags += (["--epochs", options.epochs] if options.epochs else []) + ["--quick"] * options.quick
        both = {
            name: found[0]
            for name, found in common.interleave(Path(__file__), dict.fromkeys((OURS, RANDOM), flags), 1).items()
        }
    frames = {name: pd.DataFrame(found.pop("predictions")) for name, found in both.items()}
    own, shared = (
        score(own_questions(frames), arciva.Config().seed),
        score(shared_questions(frames), arciva.Config().seed),
    )
    print(common.describe(common.environment()), *(describe(name, found) for name, found in both.items()), sep="\n")
    print(f"\n{common.table([line(name, found) for name, found in own.items()])}")
    print(f"\n{common.table(shared_lines(shared))}")
    payload = {
        "data": Path(options.data).name,
        "seed": arciva.Config().seed,
        "trainings": both,
        "own": own,
        "shared": shared,
    }
    return common.save(f"leak-{Path(options.data).stem}", payload, options.out)


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_synthetic.jsonl"))
    parser.add_argument("--epochs", type=float, help="else the profile's")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = options.epochs or 0.2
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
