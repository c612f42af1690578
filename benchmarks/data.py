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
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common

from common import arciva

WORDING = ("question", "answer")
FAMILY = 10  # rows about the same facts: the extended corpus has as many per entry


class Speaker:
    """Makes up text in one language: each word follows the one before as often as it does in the corpus."""

    def __init__(self, texts: list[str]):
        self.lengths = [len(text.split()) for text in texts]
        self.following = defaultdict(list)
        for text in texts:
            words = text.split()
            for word, after in zip(words, words[1:], strict=False):
                self.following[word].append(after)
        self.words = sorted(self.following)

    def say(self, rng: random.Random, subject: list[str]) -> str:
        """A text of a length that occurs in the corpus, starting with the family's subject."""
        said, length = list(subject), max(4, rng.choice(self.lengths))
        while len(said) < length:
            said.append(rng.choice(self.following.get(said[-1]) or self.words))
        return " ".join(said)


def misspelt(text: str, rng: random.Random) -> str:
    """The text with two neighbouring letters swapped."""
    at = rng.randrange(len(text) - 1)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


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
    load, split, encode = (after - before for before, after in zip(clock, clock[1:], strict=False))
    tokens = sum(len(item.input_ids) for items in encoded.values() for item in items)
    counts = {"rows": len(examples), "tokens": tokens, "near_duplicates_aside": len(report.set_aside)}
    return {**counts, "load_s": load, "split_s": split, "encode_s": encode, "seconds": clock[-1] - clock[0]}
