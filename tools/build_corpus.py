"""Build the question-and-answer corpus from the authored knowledge, and check the knowledge.

    python tools/build_corpus.py                       write both data files
    python tools/build_corpus.py --check [FILE ...]    report every problem, write nothing
    python tools/build_corpus.py --verify              fail unless the data files equal a fresh build

`data/knowledge/<topic>.yaml` holds entries: facts they rest on, authored questions by style, authored answers by
form. A row of the corpus is one question with the form of answer that suits its style. What reviewers changed or
discarded is in `data/knowledge/overrides.jsonl`, one row id a line (see tools/labeling.py), and is applied last.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arciva_assistant_poc as arciva

KNOWLEDGE = ROOT / "data" / "knowledge"
ABSENT_TERMS = "absent_terms.yaml"
EXTENDED = ROOT / "data" / "arciva_qa_extended.jsonl"
SEED = ROOT / "data" / "arciva_qa_synthetic.jsonl"

STYLES = ("polite", "plain", "keywords", "symptom", "alias", "story", "premise", "typo")
# The answer's form follows the question: who types two words wants one sentence.
FORM_OF_STYLE = {"keywords": "short", "plain": "short", "typo": "short", "premise": "premise"}
KINDS = ("how-to", "where", "what", "shortcut", "troubleshoot", "limit", "not-available", "off-topic")
MIN_WORDS, MAX_WORDS = 3, {"short": 34, "full": 95, "premise": 80}
MIN_QUESTIONS = {True: {"en": 6, "de": 3}, False: {"en": 3, "de": 1}}
MIN_STYLES = {"en": 6, "de": 3}  # of a common entry: as many ways of asking

Language = Literal["en", "de"]
QUOTED = re.compile(r'"([^"\n]+)"')
# What makes a first sentence a denial; an answer about an absent feature opens with one.
DENIAL = {
    "en": re.compile(r"\b(no|not|none|cannot|never|neither|nothing|nowhere|lacks?|unavailable)\b|\w+n't\b", re.I),
    "de": re.compile(r"\b(nein|nicht|nichts|kein\w*|nie|niemals|weder|nirgends|fehlt|fehlen)\b", re.I),
}
# An answer serves every question of its form: yes or no would be wrong for the next one, a pronoun has nothing to stand for.
VERDICT = re.compile(r"(?:Yes|No|Ja|Nein|Doch)\b")
PRONOUN = {
    "en": re.compile(r"(?:It (?!makes|depends|is (?:not |im)possible)|They |Its |Their )"),
    "de": re.compile(
        r"(?:Er |Sie (?![A-ZÄÖÜ])|Ihr |Es (?:ist|heißt|hat|zeigt|setzt|richtet|liegt|steht|enthält|bietet|speichert) )"
    ),
}
# What denies a feature that a sentence names. "Only" and "without" do so just before its name: "without a watermark".
DENIAL_OF_TERM = {
    "en": re.compile(
        r"\b(no|not|none|cannot|never|neither|nor|nothing|nowhere|lacks?|instead of|rather than|ignored|missing|unavailable"
        r"|rejected as|outside (?:Arciva|what)|another product)\b|\w+n't\b|\bwithout (?:\w+ ){0,2}$",
        re.I,
    ),
    "de": re.compile(
        r"\b(nein|nicht|nichts|kein\w*|nie|niemals|weder|noch|nirgends|fehlt|fehlen|statt|anstatt|ignoriert|wirkungslos"
        r"|verworfen|außerhalb von Arciva|anderes Produkt)\b|\bohne (?:\w+ ){0,2}$",
        re.I,
    ),
}
# A denial reaches no further than its clause: "a watermark, but no logo" claims the watermark.
ENDS_BEFORE = re.compile(r"[;:]|\b(?:but|aber|sondern)\b", re.I)
ENDS_AFTER = re.compile(r"[,;:]|\b(?:but|aber|sondern|and|und|until|bis|which|that)\b", re.I)
CONDITION = re.compile(r"(?:If|When|Once|Wenn|Falls|Sobald)\b")
# Predicates that deny a whole list before them.
LIST_DENIAL = re.compile(
    r"\b(?:gibt es \w*\s?(?:nicht|kein)|(?:kennt|hat) (?:Arciva|die App) \w*\s?nicht|(?:lassen|lässt) sich [^,;]*nicht"
    r"|do(?:es)? not exist|(?:is|are) (?:not (?:available|supported|possible|part)|missing)|cannot be|fehl(?:t|en))\b"
    r"|n't (?:available|supported|exist)",
    re.I,
)
FUNCTION_WORDS = {
    "en": set(
        [
            "the",
            "a",
            "an",
            "is",
            "are",
            "you",
            "your",
            "of",
            "to",
            "in",
            "it",
            "and",
            "that",
            "this",
            "with",
            "for",
            "does",
            "has",
            "have",
            "can",
            "there",
            "from",
            "on",
            "by",
            "be",
            "as",
            "at",
            "if",
            "not",
            "its",
        ]
    ),
    "de": set(
        [
            "der",
            "die",
            "das",
            "ein",
            "eine",
            "einen",
            "einem",
            "einer",
            "ist",
            "sind",
            "du",
            "deine",
            "deinen",
            "dein",
            "und",
            "nicht",
            "mit",
            "für",
            "im",
            "in",
            "den",
            "dem",
            "des",
            "kann",
            "es",
            "gibt",
            "auf",
            "von",
            "zu",
            "zum",
            "zur",
            "wird",
            "werden",
            "bei",
            "oder",
            "nur",
            "sie",
            "auch",
            "aus",
        ]
    ),
}


class Entry(BaseModel):
    """One thing the assistant knows: its facts, the ways people ask for it, and what to answer."""

    model_config = ConfigDict(extra="forbid")

    id: str
    kind: Literal[KINDS]
    common: bool
    fact_ids: list[str]
    must: list[str]
    questions: dict[Language, list[dict[Literal[STYLES], str]]]
    answers: dict[Language, dict[Literal["full", "short", "premise"], str]]
    topic: str = ""
    source: str = ""

    @model_validator(mode="after")
    def has_an_answer_for_every_question(self) -> Entry:
        for language, questions in self.questions.items():
            if questions and not {"full", "short"} & set(self.answers.get(language, {})):
                raise ValueError(f"{language}: questions without a full or short answer")
        return self

    @property
    def rests_on(self) -> list[str]:
        """The facts behind the entry; what rests on none is a fact of its own."""
        return self.fact_ids or [self.id]

    def rows(self) -> list[dict]:
        """Corpus rows in authored order; a row's id depends on its entry and its words alone."""
        rows = []
        for language, questions in self.questions.items():
            for style, question in (pair for mapping in questions for pair in mapping.items()):
                question = question.strip()
                digest = hashlib.sha256(question.encode()).hexdigest()[:8]
                rows.append(
                    {
                        "id": f"{self.id}/{language}/{digest}",
                        "instruction": question,
                        "response": self.answer(language, style),
                        "language": language,
                        "topic": self.topic,
                        "kind": self.kind,
                        "style": style,
                        "fact_ids": self.rests_on,
                    }
                )
        return rows

    def form(self, language: str, style: str) -> str:
        """The form of answer that fits the question's style; the nearest one where that was not written."""
        steps = self.kind == "how-to" and style == "plain"  # who asks in a whole sentence how, wants the steps
        wanted = "full" if steps else FORM_OF_STYLE.get(style, "full")
        return next((form for form in (wanted, "full") if self.answers[language].get(form)), "short")

    def answer(self, language: str, style: str) -> str:
        return self.answers[language][self.form(language, style)].strip()


class Override(BaseModel):
    """What a reviewer made of one row: other words, or none."""

    model_config = ConfigDict(extra="forbid")

    id: str
    question: str | None = None
    answer: str | None = None
    discard: bool = False
    reviewed: str | None = None  # the labelling tool's timestamp
    replaces: str | None = None  # revision of the authored row: a later edit of the knowledge is not hidden unseen

    @model_validator(mode="after")
    def says_one_thing(self) -> Override:
        changed = self.question is not None or self.answer is not None
        if changed == self.discard:
            raise ValueError("expected a question or an answer, or discard: true, and not both")
        if any(text is not None and not text.strip() for text in (self.question, self.answer)):
            raise ValueError("a question or answer is empty; to drop the row use discard: true")
        return self


def load_facts() -> dict[str, dict]:
    return yaml.load((KNOWLEDGE / "facts.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def load_absent_terms(path: Path | None = None) -> dict[str, list[str]]:
    """Terms that name what Arciva does not have, by absent fact, and the facts `unnamed`; no file means no terms."""
    path = path or KNOWLEDGE / ABSENT_TERMS
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) if path.exists() else {}


@functools.cache
def absent_patterns(path: Path) -> dict[str, re.Pattern]:
    """One pattern per absent fact that has terms; whole words in any case, after the fact's id."""
    terms = load_absent_terms(path)
    return {
        fact: re.compile(rf"(?<!\w)(?:{'|'.join(found)})(?!\w)", re.I)
        for fact, found in terms.items()
        if fact != "unnamed"
    }


def load_entries(paths: Iterable[Path]) -> tuple[list[Entry], list[str]]:
    """Entries of the given files and every schema problem found, as `file: entry: reason`."""
    entries, problems = [], []
    for path in paths:
        try:
            document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        except (OSError, yaml.YAMLError) as error:
            problems.append(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}")
            continue
        for number, raw in enumerate((document or {}).get("entries") or [], 1):
            try:
                entry = Entry(**{**raw, "topic": document["topic"], "source": path.name})
            except ValidationError as error:
                name = raw.get("id", f"entry {number}") if isinstance(raw, dict) else f"entry {number}"
                for detail in error.errors():
                    where = ".".join(map(str, detail["loc"]))
                    problems.append(f"{path.name}: {name}: {where}: {detail['msg']}")
                continue
            entries.append(entry)
    return entries, problems


def load_overrides(path: Path | None = None) -> tuple[dict[str, Override], list[str]]:
    """Overrides by row id and every problem of the file; no file means no overrides."""
    path = path or KNOWLEDGE / "overrides.jsonl"
    overrides, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.exists() else [], 1):
        if not line.strip():
            continue
        try:
            override = Override.model_validate_json(line)
        except ValidationError as error:
            problems += [
                f"{path.name}: line {number}: {'.'.join(map(str, d['loc'])) or 'override'}: {d['msg']}"
                for d in error.errors()
            ]
            continue
        if override.id in overrides:
            problems.append(f"{path.name}: line {number}: {override.id} is overridden twice")
        overrides[override.id] = override
    return overrides, problems


def revision(question: str, answer: str) -> str:
    """Eight hex digits that change with a row's words."""
    return hashlib.sha256(f"{question}\x1f{answer}".encode()).hexdigest()[:8]


def apply_overrides(rows: Iterable[dict], overrides: dict[str, Override]) -> list[dict]:
    """The rows as reviewed. A row keeps its id whatever its words become; a discarded one is left out."""
    reviewed = []
    for row in rows:
        override = overrides.get(row["id"])
        if override is None:
            reviewed.append(row)
        elif not override.discard:
            question, answer = override.question or row["instruction"], override.answer or row["response"]
            reviewed.append({**row, "instruction": question.strip(), "response": answer.strip()})
    return reviewed


def knowledge_files() -> list[Path]:
    return sorted(p for p in KNOWLEDGE.glob("*.yaml") if p.name not in {"facts.yaml", ABSENT_TERMS})


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:[-'’]\w+)*", text)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def sentences(text: str) -> list[str]:
    """Sentences and lines of an answer; a step's number stands alone."""
    return [s for s in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+(?=[A-ZÄÖÜ])|\n+", text.strip()) if s.strip()]


def denied(language: str, sentence: str, term: re.Match) -> bool:
    """Whether the clause of `sentence` that holds `term` denies it; what stands in quotes is a label and claims nothing."""
    before, after = sentence[: term.start()], sentence[term.end() :]
    if before.count('"') % 2:
        return True
    clause = ENDS_BEFORE.split(before)[-1]
    if CONDITION.match(sentence):
        clause = clause.rpartition(",")[2]
    parts = (clause, term[0], ENDS_AFTER.split(after)[0])
    return any(DENIAL_OF_TERM[language].search(part) for part in parts) or bool(LIST_DENIAL.search(after))


def absent_claims(language: str, form: str, answer: str) -> list[str]:
    """Sentences that name what Arciva does not have and do not deny it.

    A premise answer may deny first and name the thing in its second sentence.
    """
    found, before = {}, False
    for sentence in sentences(answer.replace("’", "'")):
        for fact, pattern in absent_patterns(KNOWLEDGE / ABSENT_TERMS).items():
            for match in pattern.finditer(sentence):
                if not denied(language, sentence, match) and not (form == "premise" and before):
                    found.setdefault((match[0].lower(), sentence), (match[0], fact))
        before = bool(DENIAL_OF_TERM[language].search(sentence))
    return [
        f"claims {term!r}, which Arciva does not have ({fact}): {sentence!r}"
        for (_, sentence), (term, fact) in found.items()
    ]


def lint_entry(entry: Entry, facts: dict[str, dict]) -> list[str]:
    """Problems of one entry: what its answers must carry, may quote, and how they open."""
    found = []
    if not re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", entry.id) or not entry.id.startswith(entry.topic):
        found.append(f"id must be kebab-case and start with {entry.topic!r}")
    unknown = [f for f in entry.fact_ids if f not in facts]
    if unknown:
        found.append(f"unknown fact ids {unknown}")
    if not entry.fact_ids and entry.kind != "off-topic":
        found.append("no fact_ids")
    absent = any(facts.get(f, {}).get("absent") for f in entry.fact_ids)
    if entry.common and not entry.must and not absent and any(facts.get(f, {}).get("labels") for f in entry.fact_ids):
        found.append("must is empty: name what every answer has to carry")
    if entry.kind == "not-available" and not absent:
        found.append("kind is not-available, but no absent fact is named")
    for language in ("en", "de"):
        questions, forms = entry.questions.get(language, []), entry.answers.get(language, {})
        if len(questions) < MIN_QUESTIONS[entry.common][language]:
            found.append(
                f"{language}: {len(questions)} questions, expected {MIN_QUESTIONS[entry.common][language]} or more"
            )
        if not forms or (entry.common and not {"full", "short"} <= set(forms)):
            found.append(f"{language}: answers {sorted(forms)}, expected full and short")
        asked = {style for mapping in questions for style in mapping}
        if "premise" in asked and "premise" not in forms and entry.kind not in ("not-available", "off-topic"):
            found.append(f"{language}: a premise question without a premise answer")
        if entry.common and len(asked) < (least := MIN_STYLES[language]):
            found.append(f"{language}: {len(asked)} ways of asking, expected {least} or more")
        if {"short", "full"} <= set(forms) and len(words(forms["short"])) > len(words(forms["full"])):
            found.append(f"{language}: the short answer is longer than the full one")
        for form, answer in forms.items():
            found += [f"{language}.{form}: {p}" for p in lint_answer(entry, language, form, answer, facts)]
        for mapping in questions:
            for style, question in mapping.items():
                if not 2 <= len(words(question)) <= 75 and style != "keywords":
                    found.append(f"{language}: question of {len(words(question))} words: {question[:50]!r}")
                if style != "keywords" and other_language(question, language):
                    found.append(f"{language}: question does not read as {language}: {question[:50]!r}")
    return found


def other_language(text: str, language: str) -> bool:
    """Whether the function words outside of quoted labels are rather those of the other language."""
    tokens = [w.lower() for w in words(QUOTED.sub("", text))]
    score = {lang: sum(t in vocabulary for t in tokens) for lang, vocabulary in FUNCTION_WORDS.items()}
    return score["de" if language == "en" else "en"] > score[language] + 1


def unknown_labels(entry: Entry, answer: str, facts: dict[str, dict]) -> list[str]:
    """Quoted labels that are no fact's label as a whole, nor whole words of one of the entry's own facts."""
    own = "\n".join(str(label) for fact in entry.fact_ids for label in facts.get(fact, {}).get("labels", []))
    return [
        quoted
        for quoted in QUOTED.findall(answer)
        if quoted not in all_labels(facts) and not re.search(rf"(?<!\w){re.escape(quoted)}(?!\w)", own)
    ]


def all_labels(facts: dict[str, dict]) -> set[str]:
    return {str(label) for fact in facts.values() for label in fact["labels"]}


def lint_answer(entry: Entry, language: str, form: str, answer: str, facts: dict[str, dict]) -> list[str]:
    """Problems of one answer, as reasons."""
    answer, count = answer.strip(), len(words(answer))
    found = [f"lacks required {term!r}" for term in entry.must if term not in answer]
    if not MIN_WORDS <= count <= MAX_WORDS[form]:
        found.append(f"{count} words, expected {MIN_WORDS} to {MAX_WORDS[form]}")
    found += [f"quotes {label!r}, which no fact contains" for label in unknown_labels(entry, answer, facts)]
    if entry.kind == "not-available" and not DENIAL[language].search(first_sentence(answer)):
        found.append(f"does not open with a denial: {first_sentence(answer)[:60]!r}")
    if form != "premise" and VERDICT.match(answer):
        found.append(f"opens with a verdict on one question: {answer[:60]!r}")
    if form != "premise" and PRONOUN[language].match(answer):
        found.append(f"opens with a pronoun: {answer[:60]!r}")
    if form == "short" and entry.kind != "off-topic" and len(sentences(answer)) > 1:
        found.append(f"{len(sentences(answer))} sentences, a short answer is one: {answer[:60]!r}")
    if other_language(answer, language):
        found.append(f"does not read as {language}: {answer[:60]!r}")
    if re.search(r"[„“”‚‘]", answer):
        found.append("uses typographic quotes; labels stand in straight ones")
    return found + absent_claims(language, form, answer)


def lint_overrides(entries: list[Entry], overrides: dict[str, Override], facts: dict[str, dict]) -> list[str]:
    """Problems of the reviewers' overrides: rows that are gone or were rewritten since, and answers that break a rule."""
    authored = {row["id"]: (entry, row) for entry in entries for row in entry.rows()}
    found = []
    for override in overrides.values():
        if override.id not in authored:
            found.append(f"overrides: {override.id}: no such row; remove the line, or bring the row's question back")
            continue
        entry, row = authored[override.id]
        if override.replaces not in (None, revision(row["instruction"], row["response"])):
            found.append(
                f"overrides: {override.id}: the knowledge has changed since the review; review again or remove the line"
            )
        if override.answer is not None:
            form = entry.form(row["language"], row["style"])
            reasons = lint_answer(entry, row["language"], form, override.answer, facts)
            found += [f"overrides: {override.id}: {reason}" for reason in reasons]
    return found


def lint(entries: list[Entry], facts: dict[str, dict], overrides: dict[str, Override] | None = None) -> list[str]:
    """Every problem of the knowledge, one line each, as `file: entry: reason`."""
    overrides = overrides or {}
    problems = [f"{e.source}: {e.id}: {p}" for e in entries for p in lint_entry(e, facts)]
    problems += [f"{i}: id used {n} times" for i, n in Counter(e.id for e in entries).items() if n > 1]
    asked = defaultdict(list)
    for entry in entries:
        for row in apply_overrides(entry.rows(), overrides):
            asked[arciva.normalise(row["instruction"])].append(entry.id)
    problems += [f"{', '.join(ids)}: the same question twice: {q!r}" for q, ids in asked.items() if len(ids) > 1]
    return problems + lint_overrides(entries, overrides, facts)


def near_duplicate_share(rows: list[dict]) -> float:
    """Share of questions that nearly repeat another question of their own entry, in [0, 1]."""
    by_entry = defaultdict(list)
    for row in rows:
        by_entry[row["id"].rsplit("/", 1)[0]].append(row["instruction"])
    repeated = sum(len({j for _, j in arciva.near_duplicates(questions)}) for questions in by_entry.values())
    return repeated / len(rows)


SEED_ENTRIES = 315
SEED_WORDINGS = 4
SEED_GERMAN = 0.33  # of the entries; not all have enough German wordings


def group_of(kind: str) -> str:
    """What an entry is about: what is, what is not available, or what is off-topic."""
    return {"not-available": "not available", "off-topic": "off-topic"}.get(kind, "what is")


def fact_families(entries: list[Entry]) -> list[list[Entry]]:
    """Entries that share facts, together, as the split keeps them; families in the order of a hash of their names."""
    names = arciva.fact_families([SimpleNamespace(fact_ids=entry.rests_on) for entry in entries])
    families = defaultdict(list)
    for entry in sorted(entries, key=lambda e: e.id):
        families[names[entry.rests_on[0]]].append(entry)
    return [families[name] for name in sorted(families, key=lambda n: (arciva.fraction("seed", n), n))]


def seed_entries(entries: list[Entry]) -> list[Entry]:
    """Entries of the seed corpus: whole families, about `SEED_ENTRIES` in all.

    Each group has its share of entries, and each topic its share of the group's questions: what is asked most is deepest. What a
    stratum's last family has too many or too few is made up for in the next one. An added entry moves others only within its own
    group and where that difference is carried on.
    """
    strata, asked, size = defaultdict(list), Counter(), Counter()
    for family in fact_families(entries):
        group, topic = group_of(family[0].kind), family[0].topic
        strata[group, topic].append(family)
        size[group] += len(family)
        asked[group, topic] += sum(len(entry.rows()) for entry in family)
    chosen, wanted, taken = [], 0.0, 0
    for (group, topic), families in sorted(strata.items()):
        of_group = asked[group, topic] / sum(n for (name, _), n in asked.items() if name == group)
        wanted += SEED_ENTRIES * size[group] / len(entries) * of_group
        for family in families:
            if taken + len(family) / 2 > wanted:
                break
            chosen += family
            taken += len(family)
    return chosen


def word_pieces(text: str) -> set[str]:
    """Four-letter pieces of the words: what wordings share beyond whole words."""
    return {w[i : i + 4] for w in arciva.normalise(text).split() for i in range(max(1, len(w) - 3))}


def typical_rows(rows: list[dict]) -> list[dict]:
    """The most typical `SEED_WORDINGS` of an entry's wordings in one language, those first that ask for its most frequent answer.

    Four wordings of one answer are the fewest of which one can be held out and the others still tell what is meant. The typical
    ones share most word pieces with the others; symptoms and stories in words of their own come in with the extended corpus.
    """
    answers = Counter(row["response"] for row in rows)
    pieces = {row["id"]: word_pieces(row["instruction"]) for row in rows}
    shared = Counter(piece for own in pieces.values() for piece in own)
    # Six pieces more keep a wording of two words from being the most typical one.
    typical = {i: sum(shared[piece] - 1 for piece in own) / (len(own) + 6) for i, own in pieces.items()}
    ranked = sorted(rows, key=lambda row: (-answers[row["response"]], row["response"], -typical[row["id"]], row["id"]))
    return ranked[:SEED_WORDINGS]


def seed_rows(entries: list[Entry]) -> list[dict]:
    """Rows of the seed corpus: each entry in one language, German as often as its share asks for within every topic."""
    strata, found = defaultdict(list), []
    for entry in seed_entries(entries):
        spoken = {language: [r for r in entry.rows() if r["language"] == language] for language in ("en", "de")}
        strata[group_of(entry.kind), entry.topic].append((arciva.fraction("seed language", entry.id), spoken))
    for stratum, members in strata.items():
        german = int(SEED_GERMAN * len(members) + arciva.fraction("seed language", *stratum))
        # By hash, so that an added entry changes the language of one other at most.
        for _, spoken in sorted(members, key=lambda member: (len(member[1]["de"]) < 3, member[0])):
            enough = len(spoken["de"]) >= 3
            found += typical_rows(spoken["de" if enough and (german > 0 or len(spoken["en"]) < 3) else "en"])
            german -= enough
    return found


def to_jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build(entries: list[Entry], overrides: dict[str, Override] | None = None) -> dict[Path, str]:
    """Content of both data files, rows ordered by id, as reviewed. The overrides are those of the knowledge unless given."""
    overrides = load_overrides()[0] if overrides is None else overrides
    extended = sorted((row for entry in entries for row in entry.rows()), key=lambda r: r["id"])
    # Overrides come after the choice, so that a discarded row moves no other into or out of the seed corpus.
    seed = sorted(seed_rows(entries), key=lambda r: r["id"])
    return {EXTENDED: to_jsonl(apply_overrides(extended, overrides)), SEED: to_jsonl(apply_overrides(seed, overrides))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", nargs="*", metavar="FILE", type=Path, help="report every problem of these files, or of all"
    )
    parser.add_argument("--verify", action="store_true", help="fail unless the data files equal a fresh build")
    args = parser.parse_args()
    entries, problems = load_entries(args.check or knowledge_files())
    overrides, broken = load_overrides()
    if args.check:  # some of the files: rows of the others are not gone
        ids = {entry.id for entry in entries}
        overrides = {i: o for i, o in overrides.items() if i.split("/")[0] in ids}
    problems += broken + lint(entries, load_facts(), overrides)
    rows = apply_overrides((row for entry in entries for row in entry.rows()), overrides)
    absent = sum(e.kind == "not-available" for e in entries)
    print(
        f"{len(entries)} entries ({absent} not available), {len(rows)} questions {dict(Counter(r['language'] for r in rows))}"
    )
    if rows:
        print(f"{near_duplicate_share(rows):.2%} of the questions nearly repeat another one of their entry")
    if problems:
        print("\n".join(problems))
        print(f"{len(problems)} problems", file=sys.stderr)
        return 1
    if args.check is not None:
        return 0
    for path, text in build(entries, overrides).items():
        if args.verify and not (path.exists() and path.read_text(encoding="utf-8") == text):
            print(
                f"{path.relative_to(ROOT)} is not what the knowledge builds; run python tools/build_corpus.py",
                file=sys.stderr,
            )
            return 1
        if not args.verify:
            arciva.write_atomic(path, text)
        print(f"{text.count(chr(10)):6,} rows  {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
