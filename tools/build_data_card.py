"""Write the data card, data/README.md: all figures are computed from the data files and the knowledge.

    python tools/build_data_card.py             write the card
    python tools/build_data_card.py --verify    fail unless the card equals a fresh build

The card is the Hub's dataset card: the YAML block on top is what the Hub reads. It names no date, so that the same data
give the same card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import build_corpus

import arciva_assistant_poc as arciva

CARD = ROOT / "data" / "README.md"
PERCENTILES = (5, 25, 50, 75, 95, 100)
# Upper bounds of the Hub's size categories.
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
GROUPS = ("what is", "not available", "off-topic")


@dataclass(frozen=True)
class Corpus:
    """One data file and what its split gives."""

    name: str  # name of the Hub configuration
    path: Path
    rows: list[dict]
    split: arciva.SplitReport

    @property
    def entries(self) -> dict[str, str]:
        """Kind of every entry that has a row in the file, by entry id."""
        return {row["id"].split("/")[0]: row["kind"] for row in self.rows}


def load_corpus(name: str, path: Path) -> Corpus:
    examples, _ = arciva.load_examples(str(path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Corpus(name, path, rows, arciva.split_examples(examples, arciva.Config().seed)[1])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: first column left, the others right; whole numbers with thousands separators."""
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), rule, *cells])


def front_matter(corpora: Sequence[Corpus]) -> str:
    largest = max(len(corpus.rows) for corpus in corpora)
    card = {
        "language": ["en", "de"],
        "license": "other",
        "license_name": "proprietary",
        "pretty_name": "Arciva assistant questions and answers",
        "task_categories": ["question-answering", "text-generation"],
        "size_categories": [next(name for bound, name in SIZES if largest < bound)],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "tags": ["synthetic", "product-support", "instruction-tuning"],
        "configs": [
            {"config_name": c.name, "data_files": c.path.name, **({"default": True} if i == 0 else {})}
            for i, c in enumerate(corpora)
        ],
    }
    return f"---\n{yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}---"


def count_table(title: str, key: Callable[[dict], str], corpora: Sequence[Corpus]) -> str:
    """Rows of each value in each file, most frequent in the last file first, with its share of German."""
    counts = [Counter(key(row) for row in corpus.rows) for corpus in corpora]
    german = [Counter(key(row) for row in corpus.rows if row["language"] == "de") for corpus in corpora]
    values = sorted(counts[-1], key=lambda value: (-counts[-1][value], value))
    head = [title, *(column for c in corpora for column in (c.name, "share", "German"))]
    body = [
        [value]
        + [
            cell
            for corpus, count, de in zip(corpora, counts, german, strict=True)
            for cell in (
                count[value],
                f"{count[value] / len(corpus.rows):.1%}",
                f"{de[value] / max(1, count[value]):.0%}",
            )
        ]
        for value in values
    ]
    return table(head, body)


def overview_table(corpora: Sequence[Corpus]) -> str:
    groups = [Counter(build_corpus.group_of(kind) for kind in corpus.entries.values()) for corpus in corpora]
    languages = [Counter(row["language"] for row in corpus.rows) for corpus in corpora]
    rows = [["rows", *(len(c.rows) for c in corpora)]]
    rows += [
        [f"rows in {name}", *(count[code] for count in languages)]
        for name, code in (("English", "en"), ("German", "de"))
    ]
    rows += [["share of German", *(f"{n['de'] / len(c.rows):.1%}" for c, n in zip(corpora, languages, strict=True))]]
    rows += [["entries", *(len(c.entries) for c in corpora)]]
    rows += [[f"entries, {group}", *(count[group] for count in groups)] for group in GROUPS]
    facts = set(build_corpus.load_facts())  # off-topic entries rest on none and carry an id of their own
    rows += [["facts used", *(len(facts & {f for r in c.rows for f in r["fact_ids"]}) for c in corpora)]]
    rows += [["different answers", *(len({r["response"] for r in c.rows}) for c in corpora)]]
    rows += [["near-duplicate questions", *(f"{build_corpus.near_duplicate_share(c.rows):.2%}" for c in corpora)]]
    return table(["", *(c.name for c in corpora)], rows)


def length_table(corpora: Sequence[Corpus]) -> str:
    """Percentiles of the words in questions and answers, by file and language."""
    rows = []
    for corpus in corpora:
        for field, name in (("instruction", "question"), ("response", "answer")):
            for code in ("en", "de"):
                counts = [len(build_corpus.words(row[field])) for row in corpus.rows if row["language"] == code]
                # An observed value, never a mean of two: the figure is the same in every version of numpy.
                found = np.percentile(counts, PERCENTILES, method="inverted_cdf")
                rows.append([f"{corpus.name}, {name}, {code}", *(int(value) for value in found)])
    return table(["words", *(f"{p} %" if p < 100 else "longest" for p in PERCENTILES)], rows)


def split_table(corpora: Sequence[Corpus]) -> str:
    def held(corpus: Corpus, side: str, novelty: str) -> int:
        return corpus.split.counts[side].get(novelty, 0)

    rows = [["train", *(held(c, "train", "train") for c in corpora)]]
    for side in ("validation", "test"):
        rows += [
            [f"{side}, {novelty}", *(held(c, side, novelty) for c in corpora)] for novelty in ("rephrased", "unseen")
        ]
    return table(
        ["rows", *(c.name for c in corpora)], [*rows, ["set aside", *(len(c.split.set_aside) for c in corpora)]]
    )


def leak_table(corpora: Sequence[Corpus]) -> str:
    rows = []
    for corpus in corpora:
        split = corpus.split
        near = [f"{rate:.1%}" for rate in (split.naive_near_duplicates, split.near_duplicates)]
        known = [f"{rate:.1%}" for rate in (split.naive_known_answers, split.known_answers)]
        rows += [[f"{corpus.name}: near-copy of the question in training", *near]]
        rows += [[f"{corpus.name}: the very answer in training (ours: unseen half)", *known]]
        taught = f"{split.known_rephrased:.1%}"
        rows += [[f"{corpus.name}: the same of the rephrased half, which asks for what was taught", "", taught]]
    return table(["share of held-out rows", "random split", "ours"], rows)


def hashes(corpora: Sequence[Corpus]) -> str:
    """sha256 of every data file and of everything the data are built from, as sha256sum writes it."""
    knowledge = sorted(p for p in build_corpus.KNOWLEDGE.iterdir() if p.suffix in (".yaml", ".jsonl"))
    files = {c.path.name: c.path for c in corpora} | {f"knowledge/{p.name}": p for p in knowledge}
    return "\n".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}" for name, path in files.items())


def search_terms() -> str:
    """What the file of search terms is and holds."""
    terms = yaml.safe_load((ROOT / "data" / "search_terms.yaml").read_text(encoding="utf-8"))
    found = [len(texts) for languages in terms.values() for texts in languages.values()]
    return (
        f"{sum(found):,} other ways to ask for {len(found)} passages, those that the seed corpus\n"
        "teaches, as the index of a help centre would: synonyms, other products' names, symptoms. The embedded nano base has read\n"
        "them as titles, which stands in for the vocabulary that a base from the hub brings along. They were written without sight of\n"
        "the held-out questions; those that were much like one (Jaccard index of 0.5 or more) were taken out, and a test keeps it so.\n"
        "Readers who had not written them changed 180 of the first 4,448."
    )


def second_readings() -> str:
    """Error rates that readers found who had not written what they read."""
    readings = yaml.safe_load((ROOT / "data" / "second_readings.yaml").read_text(encoding="utf-8"))
    rows = [
        f"| {r['what']} | {r['pairs']} | {r['false']} ({r['false'] / r['pairs']:.1%}) | {r['misleading']} ({r['misleading'] / r['pairs']:.1%}) |"
        for r in readings
    ]
    head = "| read | pairs read | false answers | misleading or beside the question |\n|---|---:|---:|---:|"
    text = "Somebody who had not written them judged pairs against the facts. What was found is mended in every entry it touched."
    return "\n".join([text, "", head, *rows])


def known_gaps(corpus: Corpus) -> list[str]:
    """What the corpus does not have, with its numbers."""
    facts = build_corpus.load_facts()
    topics = Counter(row["topic"] for row in corpus.rows)
    thinnest = sorted(topics.items(), key=lambda item: (item[1], item[0]))[:3]
    styles, german = (
        Counter(r["style"] for r in rows) for rows in (corpus.rows, [r for r in corpus.rows if r["language"] == "de"])
    )
    english_only = [
        f"{style} ({german[style]} of {styles[style]:,})"
        for style in sorted(styles)
        if german[style] < styles[style] / 7
    ]
    contributor = sum(
        any(facts.get(f, {}).get("audience") == "contributor" for f in r["fact_ids"]) for r in corpus.rows
    )
    used = {fact for row in corpus.rows for fact in row["fact_ids"]}
    unused = sum(fact not in used for fact in facts)
    several = sum("messages" in row for row in corpus.rows)
    return [
        "Written, not collected: no question was asked by a user, and how often a topic comes up is a guess.",
        f"Single turns: {several} of {len(corpus.rows):,} rows are conversations of several turns.",
        f"The thinnest topics are {', '.join(f'{name} ({count})' for name, count in thinnest)}.",
        f"{contributor:,} rows ({contributor / len(corpus.rows):.1%}) are for contributors.",
        f"German is {german.total() / len(corpus.rows):.0%} of the rows; no other language occurs.",
        *([f"Hardly any German in these styles: {', '.join(english_only)}."] if english_only else []),
        f"No row uses {unused:,} of the {len(facts):,} facts.",
        "An entry answers all its questions with the same few texts, so the number of rows says less than that of different answers.",
        "The facts are those of one version of Arciva; nothing here notices when the product changes.",
    ]


def build() -> str:
    """The whole card."""
    corpora = [load_corpus("seed", build_corpus.SEED), load_corpus("extended", build_corpus.EXTENDED)]
    seed = arciva.Config().seed
    gaps = "\n".join(f"- {gap}" for gap in known_gaps(corpora[-1]))
    return f"""{front_matter(corpora)}

<!-- Built by tools/build_data_card.py from the data; change that, not this. -->

# Arciva assistant: questions and answers

Questions about the photo library Arciva and their answers, in English and German, for training the assistant that helps
people inside the product. `{corpora[0].path.name}` (configuration `seed`, the default) is a subset of
`{corpora[1].path.name}` (configuration `extended`): three in ten of the entries, with all entries that
share a fact, each with three or four typical wordings in one language, mostly of one answer. Topics, kinds, styles and languages
have about the shares they have in the whole.

{overview_table(corpora)}

An entry is one thing the assistant knows: what Arciva does, what it does *not* have (the answer says so first), or
what is none of its business. Near-duplicates are questions whose character 5-grams overlap another one of their entry
by a Jaccard index of {arciva.NEAR_DUPLICATE} or more. No two questions are equal once case and punctuation are removed.

## Origin

Synthetic. A language model wrote the questions and answers one by one from facts that were read off the product's
source code; no template was filled, and no user data, support ticket or private photo went in. `knowledge/` holds the
source: `facts.yaml` the facts with the labels, shortcuts and numbers an answer may quote, the other files the authored
entries. `tools/build_corpus.py` checks every entry (required terms, quoted labels, denials, language, length) and
builds both data files; `knowledge/overrides.jsonl`, where there is one, carries what reviewers changed or discarded.

`search_terms.yaml` is no part of either file. It lists {search_terms()}

No licence has been granted: `proprietary` stands here until the owner chooses one.

## A row

`id` (entry, language, hash of the authored question), `instruction`, `response`, `language`, `topic`, `kind`, `style`
of the question, `fact_ids` (the facts the answer rests on).

```json
{json.dumps(next(r for r in corpora[0].rows if r["kind"] == "shortcut" and r["language"] == "en"), ensure_ascii=False, indent=2)}
```

## Topics

{count_table("topic", lambda row: row["topic"], corpora)}

## Kinds

{count_table("kind", lambda row: row["kind"], corpora)}

## Styles

How the question is put; a terse one gets one sentence, a wrong premise gets corrected.

{count_table("style", lambda row: row["style"], corpora)}

## Lengths

{length_table(corpora)}

## Split

The files are not split; the recipe is, and every loader gets the same sides from it. Facts that one row uses together
form a family. A tenth of the families is held out whole (*unseen*: nothing of these facts is in training, in either
language), and a ninth of the remaining questions one by one (*rephrased*: the facts are taught, this wording is not).
Both halves are shared between validation and test. Sides follow from hashes alone, so the order of rows changes
nothing and added rows move no other. Training rows that nearly repeat a held-out wording are set aside, and so are
held-out rows whose facts are only partly taught. With `--seed {seed}`, the default:

{split_table(corpora)}

What a random split of the same sizes would have given away, and what this one does:

{leak_table(corpora)}

## Second reading

{second_readings()}

## Known gaps

{gaps}

## Hashes

Run `sha256sum -c` on these lines in the data folder.

```
{hashes(corpora)}
```
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="fail unless the card equals a fresh build")
    args = parser.parse_args(arguments)
    try:
        text = build()
        if not args.verify:
            arciva.write_atomic(CARD, text)
            print(f"{len(text):,} characters  {CARD}")
            return 0
    except arciva.ArcivaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not CARD.exists() or CARD.read_text(encoding="utf-8") != text:
        print(f"{CARD} is not what the data give; run python tools/build_data_card.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
