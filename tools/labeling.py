"""The way to the labelling tool and back.

    python tools/labeling.py export --out to_review.jsonl                        the corpus, one JSON object a line
    python tools/labeling.py export data/arciva_qa_synthetic.jsonl --format instruction --out to_review.jsonl
    python tools/labeling.py import reviewed.jsonl more.jsonl                    merge what reviewers decided
    python tools/labeling.py import chats.jsonl --conversations data/conversations.jsonl
    python tools/labeling.py import labels.jsonl --fixes                         what was labelled on the dashboard

`import` reads rows whose `review_metadata.label` says Verified, Modified or Discarded. Verified rows stay as they are.
Modified words and discarded rows go to `data/knowledge/overrides.jsonl`, which `tools/build_corpus.py` applies, so the
authored knowledge stays as written. A line of it: `id` of the row, `question` and `answer` where they differ from the
authored ones, or `discard`; `reviewed`, the tool's timestamp; `replaces`, the revision of the authored row.

A review counts only if it was made of the words the corpus has now (`revision`, written by `export`), and two reviews
of one row count only if they agree: the newer one does not win by being newer. Whatever cannot be merged is reported
in one go, and then nothing is written (exit code 2) unless `--keep-going` leaves those rows out (exit code 0). Importing
a file again changes nothing.

Conversations of several turns that are not in the corpus become training rows with `--conversations FILE`. Discarded
ones stay in that file under their label; the loader leaves them out.

Labels from the dashboard (`source: dashboard`) judge a model's answer, not the row that was asked: "wrong" discards no
row. All of them are kept in `--generations FILE`. With `--fixes` the corrected answer of a training row also replaces
that row's answer, as a modified row's would. Held-out rows and suite items judge the model: theirs are counted, kept in
the file, and never enter the corpus.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import build_corpus

import arciva_assistant_poc as arciva

VERDICTS = ("verified", "modified", "discarded")
KEPT = ("language", "topic", "kind", "style", "fact_ids")
GENERATIONS = ROOT / "data" / "reviews" / "generations.jsonl"  # apart from data/*.jsonl, which is trained on
DISCARDED = ("discarded",)  # the outcome of a row that goes; any other outcome is the tuple of its turns


@dataclass(frozen=True)
class Review:
    """What one line of a reviewed file says about one row."""

    where: str  # file and line
    row: arciva.Row
    verdict: str  # verified, modified or discarded
    turns: tuple[str, ...]  # question, answer, question, answer …

    @property
    def outcome(self) -> tuple[str, ...]:
        return DISCARDED if self.verdict == "discarded" else self.turns

    @property
    def timestamp(self) -> str | None:
        stamp = (self.row.review_metadata or {}).get("timestamp")
        return None if stamp is None else str(stamp)

    @property
    def revision(self) -> str | None:
        return (self.row.model_extra or {}).get("revision")

    def __str__(self) -> str:
        return f"{self.verdict} in {self.where}" + (f" at {self.timestamp}" if self.timestamp else "")


@dataclass
class Merge:
    """What an import changes, and everything it could not merge."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


def clean(text: str) -> str:
    """Words as compared: line ends, outer space and the spelling of umlauts are the tool's, not the reviewer's."""
    return unicodedata.normalize("NFC", "\n".join(text.splitlines())).strip()


# Export


def revision_of(turns: Sequence[str]) -> str:
    """Eight hex digits that change with any word of a conversation."""
    return build_corpus.revision("\x1f".join(turns[:-1]), turns[-1])


def export_row(example: arciva.Example, form: str) -> dict:
    """The row as the labelling tool reads it, with all that leads back to it."""
    turns = [clean(m["content"]) for m in example.messages if m["role"] != "system"]
    if form == "messages":
        words = {"messages": example.messages}
    elif len(example.messages) == 2:
        words = {"instruction": turns[0], "input": "", "output": turns[1]}
    else:
        raise arciva.ArcivaError(f"{example.id} has several turns, which only --format messages can hold")
    return {"id": example.id, **words, **{k: getattr(example, k) for k in KEPT}, "revision": revision_of(turns)}


def export(corpus: Path, form: str) -> str:
    examples, _ = arciva.load_examples(str(corpus))
    return build_corpus.to_jsonl(export_row(example, form) for example in examples)


# Import: reading


def spoken(row: arciva.Row) -> tuple[str, ...]:
    return tuple(clean(turn.content) for turn in row.conversation() if turn.role != "system")


def read_verdict(row: arciva.Row) -> str:
    """The one verdict named by the label; `unreviewed` where it names none."""
    metadata = row.review_metadata or {}
    said = {
        key: set(re.findall(r"\w+", str(metadata.get(key, "")).casefold())) & set(VERDICTS)
        for key in ("label", "status")
    }
    if len(said["label"]) > 1 or (said["status"] and said["status"] != said["label"]):
        raise ValueError(
            f"label {metadata.get('label')!r} and status {metadata.get('status')!r} disagree; expected one verdict"
        )
    return next(iter(said["label"]), "unreviewed")


def check_forms(row: arciva.Row) -> None:
    """Refuse a row that holds two different sets of words: which one the reviewer meant is a guess."""
    if row.response is not None and row.output is not None and clean(row.response) != clean(row.output):
        raise ValueError("'response' and 'output' differ; expected one answer")
    if row.messages is not None and row.instruction is not None:
        pair = row.model_copy(update={"messages": None})
        if spoken(pair) != spoken(row):
            raise ValueError("'messages' and 'instruction' differ; expected one question and answer")


def line_ranges(numbers: Sequence[int]) -> str:
    """`3-5, 9` for 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_reviews(path: Path, merge: Merge) -> list[Review]:
    """Reviews of one file; broken lines and rows without a verdict become problems."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        merge.problems.append(f"{path.name}: cannot be read: {error}")
        return []
    reviews, unreviewed = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = arciva.parse_line(line)
            verdict = read_verdict(row)
            check_forms(row)
        except ValueError as error:
            merge.problems.append(f"{path.name}, line {number}: {error}")
            continue
        merge.counts[verdict] += 1
        if verdict == "unreviewed":
            unreviewed.append(number)
        else:
            reviews.append(Review(f"{path.name}, line {number}", row, verdict, spoken(row)))
    if unreviewed:
        merge.problems.append(f"{path.name}: {len(unreviewed)} rows without a verdict, line {line_ranges(unreviewed)}")
    return reviews


def agreed(reviews: Iterable[tuple[str, Review]], merge: Merge) -> list[tuple[str, Review]]:
    """One review for each id whose reviews agree; the others are conflicts, and none of theirs is taken."""
    by_id = defaultdict(list)
    for row_id, review in reviews:
        by_id[row_id].append(review)
    taken = []
    for row_id, found in by_id.items():
        if len({review.outcome for review in found}) > 1:
            merge.problems.append(f"{row_id}: reviewed differently: " + "; ".join(map(str, found)))
        else:
            taken.append((row_id, max(found, key=lambda review: review.timestamp or "")))
    return taken


# Import: rows of the corpus


@dataclass(frozen=True)
class Corpus:
    """The authored rows, and the rows as the overrides leave them."""

    entries: list[build_corpus.Entry]
    overrides: dict[str, build_corpus.Override]
    authored: dict[str, dict]
    current: dict[str, dict]
    asked: dict[str, str]  # normalised question → row id

    def outcome(self, row_id: str) -> tuple[str, ...]:
        row = self.current.get(row_id)
        return DISCARDED if row is None else (clean(row["instruction"]), clean(row["response"]))

    def find(self, review: Review) -> str | None:
        """Id of the row that was reviewed. A tool that drops ids leaves the question, which no two rows share."""
        if review.row.id is not None:
            return review.row.id if review.row.id in self.authored else None
        return self.asked.get(arciva.normalise(review.turns[0])) if len(review.turns) == 2 else None


def load_corpus() -> Corpus:
    """The knowledge as it stands; one that does not load is refused, for its rows would seem unknown."""
    entries, problems = build_corpus.load_entries(build_corpus.knowledge_files())
    overrides, broken = build_corpus.load_overrides()
    if problems or broken:
        raise arciva.ArcivaError("the knowledge does not load; mend it first:\n  " + "\n  ".join(problems + broken))
    rows = [row for entry in entries for row in entry.rows()]
    current = build_corpus.apply_overrides(rows, overrides)
    return Corpus(
        entries=entries,
        overrides=overrides,
        authored={row["id"]: row for row in rows},
        current={row["id"]: row for row in current},
        asked={arciva.normalise(row["instruction"]): row["id"] for row in [*rows, *current]},
    )


def objection(review: Review, row_id: str, corpus: Corpus) -> str | None:
    """Why a review of a corpus row cannot be taken, or None."""
    authored, now = corpus.authored[row_id], corpus.outcome(row_id)
    if len(review.turns) != 2:
        return "has several turns, but the corpus row has one question and one answer"
    for key in KEPT:
        said = getattr(review.row, key)
        if key in review.row.model_fields_set and said is not None and said != authored[key]:
            return f"says {key} {said!r}, the corpus {authored[key]!r}; change that in {row_id.split('/')[0]}'s entry"
    if review.outcome == now:
        return None
    if review.verdict == "discarded" and review.revision is None and review.turns != now:
        return "is discarded, but its words are not the corpus's; perhaps a model's answer was judged; export again"
    if review.revision is not None and (now == DISCARDED or review.revision != revision_of(now)):
        return "was made of other words than the corpus has now; export again"
    if review.verdict == "verified":
        return "is verified, but its words are not the corpus's; label it modified, or export again"
    if review.revision is None and row_id in corpus.overrides:
        return "differs from an earlier review; remove that line of overrides.jsonl, or export again"
    return None


def override_for(review: Review, authored: dict) -> build_corpus.Override | None:
    """The override that turns the authored row into the reviewed one; None where they are the same."""
    base = (clean(authored["instruction"]), clean(authored["response"]))
    if review.outcome == base:
        return None
    if review.outcome == DISCARDED:
        words = {"discard": True}
    else:
        changed = zip(("question", "answer"), review.turns, base, strict=True)
        words = {key: new for key, new, old in changed if new != old}
    replaces = build_corpus.revision(authored["instruction"], authored["response"])
    return build_corpus.Override(id=authored["id"], **words, reviewed=review.timestamp, replaces=replaces)


def lint_changes(changes: dict[str, build_corpus.Override | None], corpus: Corpus) -> dict[str, list[str]]:
    """What the corpus's own rules say against the changes, by row id."""
    facts = build_corpus.load_facts()
    changed = {row_id: override for row_id, override in changes.items() if override is not None}
    against = defaultdict(list)
    for problem in build_corpus.lint_overrides(corpus.entries, changed, facts):
        _, row_id, reason = problem.split(": ", 2)
        against[row_id].append(reason)
    asked = defaultdict(set)
    merged = {i: o for i, o in {**corpus.overrides, **changes}.items() if o is not None}
    for row in build_corpus.apply_overrides(corpus.authored.values(), merged):
        asked[arciva.normalise(row["instruction"])].add(row["id"])
    for ids in asked.values():
        for row_id in ids & set(changes) if len(ids) > 1 else ():
            against[row_id].append(f"asks what {', '.join(sorted(ids - {row_id}))} asks already")
    return against


def note_shared_answers(changes: dict[str, build_corpus.Override | None], corpus: Corpus, merge: Merge) -> None:
    """Point at the other rows that keep an answer a reviewer has changed."""
    sharing = defaultdict(list)
    for row_id, row in corpus.current.items():
        if row_id not in changes:
            sharing[row["response"]].append(row_id)
    for row_id, override in changes.items():
        others = sharing[corpus.authored[row_id]["response"]] if override and override.answer else []
        if others:
            merge.notes.append(
                f"{row_id}: {len(others)} other rows keep the answer it had; if it is wrong, mend the entry"
            )


def merge_rows(reviews: Sequence[Review], corpus: Corpus, merge: Merge) -> dict[str, build_corpus.Override]:
    """All overrides after the reviews; rows that cannot be merged are among the problems."""
    changes: dict[str, build_corpus.Override | None] = {}
    sources: dict[str, Review] = {}
    for row_id, review in agreed(((corpus.find(review), review) for review in reviews), merge):
        reason = objection(review, row_id, corpus)
        if reason:
            merge.problems.append(f"{review.where}: {row_id} {reason}")
        elif review.outcome != corpus.outcome(row_id):
            changes[row_id] = override_for(review, corpus.authored[row_id])
            sources[row_id] = review
    while against := lint_changes(changes, corpus):  # leaving a row out may bring back the question of another
        for row_id, reasons in sorted(against.items()):
            merge.problems += [f"{sources[row_id].where}: {row_id}: {reason}" for reason in reasons]
            del changes[row_id]
    note_shared_answers(changes, corpus, merge)
    merge.counts["rows changed"] = len(changes)
    return {i: override for i, override in {**corpus.overrides, **changes}.items() if override is not None}


# Import: conversations


def load_conversations(path: Path) -> dict[str, dict]:
    """Rows of the conversations file by id; a broken file is refused, for rewriting it would lose what is broken."""
    rows, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.exists() else [], 1):
        if not line.strip():
            continue
        try:
            row = arciva.parse_line(line)
        except ValueError as error:
            problems.append(f"{path.name}, line {number}: {error}")
            continue
        if row.id is None or row.id in rows:
            problems.append(f"{path.name}, line {number}: id {row.id!r} is missing or used twice")
        rows[row.id] = json.loads(line)
    if problems:
        raise arciva.ArcivaError(f"{path} is broken; mend it first:\n  " + "\n  ".join(problems))
    return rows


def conversation_row(row_id: str, review: Review) -> dict:
    """The training row of a reviewed conversation, with all its fields."""
    row = review.row.model_dump(exclude_unset=True)
    row.pop("revision", None)
    row["messages"] = [turn | {"content": clean(turn["content"])} for turn in row["messages"]]
    return {**row, "id": row_id, "fact_ids": review.row.fact_ids}


def merge_conversations(reviews: Sequence[Review], stored: dict[str, dict], merge: Merge) -> dict[str, dict]:
    """All conversations after the reviews; a stored one changes only for a review that was made of its words."""
    facts, rows = build_corpus.load_facts(), dict(stored)
    named = ((review.row.id or f"conversation-{revision_of(review.turns)}", review) for review in reviews)
    for row_id, review in agreed(named, merge):
        unknown = [fact for fact in review.row.fact_ids if fact not in facts]
        if unknown:
            merge.problems.append(f"{review.where}: {row_id}: unknown fact ids {unknown}")
            continue
        if row_id in stored:
            kept = arciva.Row.model_validate(stored[row_id])
            outcome = DISCARDED if kept.verdict() == "discarded" else spoken(kept)
            if outcome == review.outcome:
                continue
            if review.revision != revision_of(spoken(kept)):
                merge.problems.append(
                    f"{review.where}: {row_id} differs from what is stored; export that and review again"
                )
                continue
        rows[row_id] = conversation_row(row_id, review)
        merge.counts["conversations changed"] += 1
    return rows


# Import: labels from the dashboard


def judges_generation(row: arciva.Row) -> bool:
    """Whether the row is a model's answer, labelled on the dashboard; the id says so even where a tool drops the source."""
    return (row.model_extra or {}).get("source") == "dashboard" or (row.id or "").startswith("generation/")


def may_train(row: arciva.Row) -> bool:
    """Whether the labelled answer belongs to a training row; what is held out or in a suite judges the model."""
    extra = row.model_extra or {}
    return extra.get("split") == "train" and extra.get("suite") is None


def as_corpus_review(review: Review) -> Review:
    """A corrected generation as a review of the row that was asked, made of the words that the row had then."""
    asked, extra = review.turns[0], review.row.model_extra
    words = {"id": str(extra.get("row")), "revision": revision_of((asked, clean(str(extra.get("reference")))))}
    return replace(review, row=review.row.model_copy(update=words))


def load_generations(path: Path) -> list[dict]:
    """The labels of earlier imports; a broken file is refused, for rewriting it would lose what is broken."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise arciva.ArcivaError(f"{path} is broken; mend it first: {error}") from error


def merge_generations(reviews: Sequence[Review], stored: list[dict], merge: Merge, fixes: bool) -> list[dict]:
    """All labels of generations, each once, by id and time; says what becomes of the new ones."""
    rows = {
        json.dumps(row, sort_keys=True): row
        for row in [*stored, *(r.row.model_dump(exclude_unset=True) for r in reviews)]
    }
    aside = sum(not may_train(review.row) for review in reviews)
    fixable = sum(may_train(review.row) and review.verdict == "modified" for review in reviews)
    if reviews:
        merge.notes.append(f"{len(reviews)} labels of generations: kept as such, they discard no row of the corpus")
    if aside:
        merge.notes.append(f"{aside} of them are of held-out rows or suite items: refused into the corpus")
    if fixable:
        done = "replace theirs, unless a problem says why not" if fixes else "could replace theirs: --fixes"
        merge.notes.append(f"{fixable} of them are corrected answers to training rows and {done}")
    return sorted(
        rows.values(), key=lambda row: (str(row.get("id")), str((row.get("review_metadata") or {}).get("timestamp")))
    )


def import_reviews(
    paths: Sequence[Path], conversations: Path | None, generations: Path = GENERATIONS, *, fixes: bool = False
) -> tuple[Merge, dict[Path, str]]:
    """What the reviewed files amount to: the report, and the new content of the files that change."""
    corpus, merge = load_corpus(), Merge()
    rows, chats, judged = [], [], []
    for review in (review for path in paths for review in read_reviews(path, merge)):
        if judges_generation(review.row):
            judged.append(review)
            if not (fixes and may_train(review.row) and review.verdict == "modified"):
                continue
            review = as_corpus_review(review)
        if corpus.find(review) is not None:
            rows.append(review)
        elif len(review.turns) > 2 and conversations is not None:
            chats.append(review)
        else:
            hint = "; --conversations FILE takes conversations" if len(review.turns) > 2 else ""
            name = "no id, and the question" if review.row.id is None else f"id {review.row.id!r}"
            merge.problems.append(f"{review.where}: {name} is not in the corpus{hint}")
    overrides = merge_rows(rows, corpus, merge)
    lines = [overrides[i].model_dump(exclude_defaults=True) for i in sorted(overrides)]
    files = {build_corpus.KNOWLEDGE / "overrides.jsonl": lines}
    if conversations is not None:
        stored = merge_conversations(chats, load_conversations(conversations), merge)
        files[conversations] = [stored[i] for i in sorted(stored)]
    if judged:
        files[generations] = merge_generations(judged, load_generations(generations), merge, fixes)
    texts = {path: build_corpus.to_jsonl(content) for path, content in files.items()}
    before = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in texts}
    return merge, {path: text for path, text in texts.items() if text != before[path]}


# Commands


def run_export(args: argparse.Namespace) -> int:
    text = export(args.corpus, args.format)
    if args.out is None:
        sys.stdout.write(text)
    else:
        arciva.write_atomic(args.out, text)
        print(f"{text.count(chr(10)):,} rows  {args.out}")
    return 0


def run_import(args: argparse.Namespace) -> int:
    merge, files = import_reviews(args.files, args.conversations, args.generations, fixes=args.fixes)
    print(", ".join(f"{count:,} {name}" for name, count in merge.counts.items()))
    for problem in merge.problems:
        print(problem, file=sys.stderr)
    if merge.problems and not args.keep_going:
        print(f"{len(merge.problems)} problems, nothing written; --keep-going merges the rest", file=sys.stderr)
        return 2
    for path, text in files.items():
        arciva.write_atomic(path, text)
        print(f"wrote {path}")
    rebuild = set(files) - {args.generations}
    last = ["now run python tools/build_corpus.py"] if rebuild else [] if files else ["nothing to change"]
    print("\n".join(merge.notes + last))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a corpus as the labelling tool reads it")
    out.add_argument(
        "corpus", nargs="?", type=Path, default=build_corpus.EXTENDED, help="JSONL; the extended corpus unless given"
    )
    out.add_argument(
        "--format", choices=("messages", "instruction"), default="messages", help="how the words stand in a row"
    )
    out.add_argument("--out", type=Path, help="file to write; standard output unless given")
    out.set_defaults(run=run_export)
    back = commands.add_parser("import", help="merge files that the labelling tool wrote back")
    back.add_argument("files", nargs="+", type=Path, metavar="FILE")
    back.add_argument("--conversations", type=Path, metavar="FILE", help="where conversations of several turns go")
    back.add_argument(
        "--generations", type=Path, metavar="FILE", default=GENERATIONS, help="where labels from the dashboard go"
    )
    back.add_argument(
        "--fixes", action="store_true", help="let corrected answers from the dashboard replace those of training rows"
    )
    back.add_argument("--keep-going", action="store_true", help="merge what can be merged in spite of problems")
    back.set_defaults(run=run_import)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except arciva.ArcivaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
