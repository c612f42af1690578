"""How loading, splitting and encoding grow with the corpus, up to 100,000 rows.

    python benchmarks/data.py           12,500 to 100,000 rows, three times each
    python benchmarks/data.py --quick   1,000 and 2,000 rows, once

The rows are made up: words of the extended corpus follow each other as they do there, in families of ten questions about the same
facts, with three answers each; three in a hundred questions repeat a sibling with a typo, so that the search for near-duplicates
finds some. Goal for 100,000 rows: under 60 s and under 1 GiB above the imports; a constant time per row means linear growth.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common

import arciva_assistant_poc as arciva

WORDING = ("question", "answer")
FAMILY = 10  # rows about the same facts: the extended corpus has as many per entry


class Speaker:
    """Makes up text in one language: each word follows the one before as often as it does in the corpus."""

    def __init__(self, texts: list[str]):
        self.lengths = [len(text.split()) for text in texts]
        self.following = defaultdict(list)
        for text in texts:
            words = text.split()
            for word, after in pairwise(words):
                self.following[word].append(after)
        self.words = sorted(self.following)

    def say(self, rng: random.Random, subject: list[str]) -> str:
        """A text of a length that occurs in the corpus, starting with the family's subject."""
        said, length = list(subject), max(4, rng.choice(self.lengths))
        while len(said) < length:
            said.append(rng.choice(self.following.get(said[-1]) or self.words))
        return " ".join(said)


def misspelt(text: str, rng: random.Random) -> str:
    """The text with one letter typed twice: three quarters and more of its character 5-grams stay."""
    at = rng.randrange(len(text))
    return text[:at] + text[at] + text[at:]


def speakers(source: str) -> dict[tuple[str, str], Speaker]:
    """A speaker for the questions and the answers of each language of a corpus."""
    texts = defaultdict(list)
    for example in arciva.load_examples(source)[0]:
        texts[example.language, "question"].append(example.question)
        texts[example.language, "answer"].append(example.messages[-1]["content"])
    return {key: Speaker(found) for key, found in texts.items()}


def family(number: int, voices: dict[tuple[str, str], Speaker], rng: random.Random) -> list[dict]:
    """Ten rows about one or two facts, in one language."""
    language = "de" if rng.random() < 0.3 else "en"
    question, answer = (voices[language, part] for part in WORDING)
    subject = rng.sample(question.words, 3)
    answers = [answer.say(rng, subject[:2]) for _ in range(3)]
    facts = [f"fact-{number}", *([f"fact-{number}-detail"] if rng.random() < 0.5 else [])]
    rows = []
    for i in range(FAMILY):
        known = rows[-1]["instruction"] if rows and rng.random() < 0.03 else None
        text = misspelt(known, rng) if known else question.say(rng, rng.sample(subject, 2))
        row = {"id": f"family-{number}/{language}/{i}", "instruction": text, "response": rng.choice(answers)}
        rows.append({**row, "language": language, "topic": f"topic-{number % 20}", "kind": "how-to", "fact_ids": facts})
    return rows


def write_corpus(path: Path, rows: int, source: str, seed: int) -> None:
    """A JSONL file of `rows` made-up rows."""
    voices, rng = speakers(source), random.Random(seed)
    made = (row for number in range(-(-rows // FAMILY)) for row in family(number, voices, rng))
    with path.open("w", encoding="utf-8") as stream:
        for row, _ in zip(made, range(rows), strict=False):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(data: str, base_model: str) -> dict:
    """Seconds of each stage on one file, and what came out."""
    clock = [time.perf_counter()]
    examples, _ = arciva.load_examples(data)
    clock.append(time.perf_counter())
    splits, report = arciva.split_examples(examples, arciva.Config().seed)
    clock.append(time.perf_counter())
    tokenizer = arciva.load_tokenizer(base_model)
    encoded = {side: arciva.encode_split(tokenizer, splits[side], arciva.Config().max_length)[0] for side in splits}
    clock.append(time.perf_counter())
    load, split, encode = (after - before for before, after in pairwise(clock))
    tokens = sum(len(item.input_ids) for items in encoded.values() for item in items)
    counts = {"rows": len(examples), "tokens": tokens, "near_duplicates_aside": len(report.set_aside)}
    return {**counts, "load_s": load, "split_s": split, "encode_s": encode, "seconds": clock[-1] - clock[0]}


def child(options: argparse.Namespace) -> dict:
    """The variant's name is its number of rows; with --make it writes them."""
    if options.make:
        write_corpus(options.file, int(options.variant), options.data, seed=0)
        return {}
    return measure(str(options.file), options.base_model)


def parent(options: argparse.Namespace) -> Path:
    """Every size in its own process, over some rounds; prints a line per size."""
    script, results = Path(__file__), {}
    sizes = [1_000, 2_000] if options.quick else options.rows
    with tempfile.TemporaryDirectory() as folder:
        flags = {str(n): ["--file", f"{folder}/{n}.jsonl", "--data", options.data] for n in sizes}
        flags = {n: [*given, "--base-model", options.base_model] for n, given in flags.items()}
        for size, given in flags.items():
            common.run_child(script, ["--variant", size, "--make", *given])
        results = common.interleave(script, flags, 1 if options.quick else options.repeats)
    print(common.describe(common.environment()), common.table([line(found) for found in results.values()]), sep="\n\n")
    print("", *verdicts(results[str(sizes[-1])]), sep="\n")
    return common.save("data", {"results": results}, options.out)


def verdicts(found: list[dict]) -> list[str]:
    """How the goals for 100,000 rows stand, at the largest size."""
    seconds, peak = (statistics.median(r[key] for r in found) for key in ("seconds", "peak_gib"))
    if found[0]["rows"] < 100_000:
        return ["the goals are for 100,000 rows: undecided"]
    rows = f"{found[0]['rows']:,} rows"
    return [
        common.verdict(f"seconds for {rows}", seconds, 60, at_most=True),
        common.verdict(f"GiB for {rows}", peak, 1, at_most=True),
    ]


def line(found: list[dict]) -> dict:
    """One size as a line of the table."""
    stages = {f"{s} s": common.spread([r[f"{s}_s"] for r in found]) for s in ("load", "split", "encode")}
    return {
        "rows": f"{found[0]['rows']:,}",
        "tokens": f"{found[0]['tokens']:,}",
        **stages,
        "total s": common.spread([r["seconds"] for r in found]),
        "ms per row": common.spread([1e3 * r["seconds"] / r["rows"] for r in found]),
        "peak GiB above imports": common.spread([r["peak_gib"] for r in found]),
        "set aside": found[0]["near_duplicates_aside"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[12_500, 25_000, 50_000, 100_000], help="sizes")
    parser.add_argument("--data", default=str(common.ROOT / "data/arciva_qa_extended.jsonl"), help="whose words to use")
    parser.add_argument("--base-model", default=str(common.ROOT / "data/nano_base"), help="whose tokenizer to use")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return common.run(options, lambda: child(options), lambda: parent(options))


if __name__ == "__main__":
    sys.exit(main())
