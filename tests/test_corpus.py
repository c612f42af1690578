"""The knowledge, the corpus built from it and its card. Run: pytest tests/test_corpus.py"""

import copy
import json
import sys
from collections import Counter, defaultdict

import build_corpus
import build_data_card
import pytest
import yaml

import arciva_assistant_poc as arciva


@pytest.fixture(scope="module")
def entries() -> list[build_corpus.Entry]:
    found, problems = build_corpus.load_entries(build_corpus.knowledge_files())
    assert problems == []
    return found


@pytest.fixture(scope="module")
def facts() -> dict[str, dict]:
    return build_corpus.load_facts()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def extended() -> list[dict]:
    return rows_of(build_corpus.EXTENDED)


@pytest.fixture(scope="module")
def seed() -> list[dict]:
    return rows_of(build_corpus.SEED)


# What the corpus is


def test_the_knowledge_has_no_problem(entries, facts):
    overrides, broken = build_corpus.load_overrides()
    assert broken == []
    assert build_corpus.lint(entries, facts, overrides) == []


def test_the_data_files_are_what_the_knowledge_builds(entries):
    for path, text in build_corpus.build(entries).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python tools/build_corpus.py"


def test_verify_fails_on_a_file_that_is_missing_or_changed(entries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_corpus, "load_entries", lambda paths: (entries[:30], []))
    monkeypatch.setattr(build_corpus, "load_overrides", lambda: ({}, []))
    monkeypatch.setattr(build_corpus, "ROOT", tmp_path)
    monkeypatch.setattr(build_corpus, "EXTENDED", tmp_path / "extended.jsonl")
    monkeypatch.setattr(build_corpus, "SEED", tmp_path / "seed.jsonl")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["build_corpus.py", *arguments])
        return build_corpus.main()

    assert run("--verify") == 1
    assert run() == 0 and run("--verify") == 0
    with build_corpus.SEED.open("a", encoding="utf-8") as file:
        file.write("{}\n")
    assert run("--verify") == 1
    assert "seed.jsonl is not what the knowledge builds" in capsys.readouterr().err


def test_the_data_card_is_what_the_data_give():
    assert build_data_card.CARD.read_text(encoding="utf-8") == build_data_card.build()


def test_the_corpus_is_as_large_as_it_should_be(entries, extended, seed):
    kinds = Counter(build_corpus.group_of(entry.kind) for entry in entries)
    assert len(extended) >= 6_000
    assert kinds["what is"] >= 600 and kinds["not available"] >= 180 and kinds["off-topic"] >= 60
    assert 1_000 <= len(seed) <= 1_500


def test_about_a_third_is_german(extended, seed):
    for rows, least in ((extended, 0.28), (seed, 0.25)):
        assert least <= sum(row["language"] == "de" for row in rows) / len(rows) <= 0.35


def test_topics_and_styles_are_balanced(extended):
    topics, styles = (Counter(row[key] for row in extended) for key in ("topic", "style"))
    assert max(topics.values()) < 0.15 * len(extended) and min(topics.values()) > 0.01 * len(extended)
    assert set(styles) == set(build_corpus.STYLES)
    assert max(styles.values()) < 0.25 * len(extended) and min(styles.values()) > 0.03 * len(extended)
    for language in ("en", "de"):
        rows = [row for row in extended if row["language"] == language]
        found = Counter(row["style"] for row in rows)
        assert min(found[style] for style in build_corpus.STYLES) > 0.02 * len(rows), (language, found)


def test_what_photographers_ask_most_is_deepest(entries):
    questions = defaultdict(list)
    for entry in entries:
        questions[entry.topic].append(len(entry.rows()))
    depth = {topic: sum(counts) / len(counts) for topic, counts in questions.items()}
    median = sorted(depth.values())[len(depth) // 2]
    assert min(depth[topic] for topic in ("tagging", "search", "filtering", "export")) > median, depth


def test_no_two_questions_are_equal_and_few_are_nearly(extended):
    asked = Counter(arciva.normalise(row["instruction"]) for row in extended)
    assert [question for question, count in asked.items() if count > 1] == []
    assert build_corpus.near_duplicate_share(extended) < 0.03


def test_the_near_duplicate_share_counts_what_repeats():
    questions = [
        "How do I export my photos to the disk?",
        "How do I export my photos to the disk",
        "Where is the trash?",
    ]
    rows = [{"id": f"entry/en/{i}", "instruction": question} for i, question in enumerate(questions)]
    # One of three repeats another; the same words in another entry would be another entry's question.
    assert build_corpus.near_duplicate_share(rows) == pytest.approx(1 / 3)
    rows[1]["id"] = "other/en/1"
    assert build_corpus.near_duplicate_share(rows) == 0


def test_the_seed_corpus_is_part_of_the_extended_one(extended, seed):
    by_id = {row["id"]: row for row in extended}
    assert len(by_id) == len(extended)
    assert all(by_id[row["id"]] == row for row in seed)
    assert {row["topic"] for row in seed} == {row["topic"] for row in extended}


def entries_of(rows: list[dict]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row["id"].rsplit("/", 2)[0]].append(row)
    return found


def test_the_seed_corpus_takes_whole_families(extended, seed):
    families = arciva.fact_families([arciva.example_from_row(arciva.Row.model_validate(row)) for row in extended])
    chosen = {families[row["fact_ids"][0]] for row in seed}
    members = {entry for entry, rows in entries_of(extended).items() if families[rows[0]["fact_ids"][0]] in chosen}
    assert members == set(entries_of(seed))


def test_the_seed_corpus_knows_enough_and_asks_for_each_entry_often_enough(entries, seed):
    assert len(entries_of(seed)) >= 300
    found = entries_of(build_corpus.seed_rows(entries))  # reviewers may discard some of these
    groups = Counter(build_corpus.group_of(rows[0]["kind"]) for rows in found.values())
    assert len(found) >= 300 and groups["not available"] >= 60 and groups["off-topic"] >= 20
    for entry, rows in found.items():
        assert 3 <= len(rows) <= build_corpus.SEED_WORDINGS, entry
        assert len({row["language"] for row in rows}) == 1, entry


def test_the_seed_corpus_takes_the_wordings_that_are_most_like_the_others():
    questions = {"plain": "How do I start the export?", "polite": "Please tell me how to start an export."}
    asked = questions | {"symptom": "Zip?", "keywords": "start export", "story": "Nothing leaves the house."}
    entry = make_entry(questions={"en": [asked], "de": []}, answers={"en": {"full": "Start export is here."}, "de": {}})
    kept = [row["style"] for row in build_corpus.typical_rows(entry.rows())]
    assert len(kept) == 4 and set(kept) >= {"plain", "polite", "keywords"}


def test_german_is_spread_over_the_seed_corpus_s_topics(entries, seed):
    can = {entry.id for entry in entries if sum(row["language"] == "de" for row in entry.rows()) >= 3}
    topics = defaultdict(list)
    for entry, rows in entries_of(seed).items():
        topics[rows[0]["topic"]].append((rows[0]["language"] == "de", entry in can))
    for topic, found in topics.items():
        german, able = (sum(column) for column in zip(*found, strict=True))
        if able >= len(found) / 2:  # elsewhere the corpus itself has little German
            assert abs(german - build_corpus.SEED_GERMAN * len(found)) <= 2, (topic, german, len(found))


@pytest.mark.parametrize(("key", "most"), [("topic", 0.06), ("kind", 0.06), ("style", 0.08), ("language", 0.02)])
def test_the_seed_corpus_has_the_extended_one_s_shares(extended, seed, key, most):
    whole, part = (
        {k: n / len(rows) for k, n in Counter(row[key] for row in rows).items()} for rows in (extended, seed)
    )
    assert sum(abs(whole[k] - part.get(k, 0)) for k in whole) / 2 <= most


def test_an_added_entry_moves_few_others_into_or_out_of_the_seed_corpus(entries):
    before = {entry.id for entry in build_corpus.seed_entries(entries)}
    more = [make_entry(topic="export"), *entries]
    after = {entry.id for entry in build_corpus.seed_entries(more)}
    assert len(before ^ after) <= 12
    # Nor does it change the language of those that stay, but of a few of its own topic.
    rows = ({row["id"] for row in build_corpus.seed_rows(found)} for found in (entries, more))
    assert len(set.symmetric_difference(*rows)) <= 12 * build_corpus.SEED_WORDINGS


def test_every_row_is_valid_and_rests_on_known_facts(extended, facts):
    for row in extended:
        arciva.Row.model_validate(row, strict=True)
        assert row["kind"] == "off-topic" or set(row["fact_ids"]) <= set(facts), row["id"]


# What keeps it stable


GOOD = {
    "id": "zz-good",
    "topic": "zz",
    "source": "zz.yaml",
    "kind": "where",
    "common": False,
    "fact_ids": ["zz-fact"],
    "must": ["Start export"],
    "questions": {
        "en": [{"plain": "Where is the zz button?"}, {"polite": "Can you show me the zz?"}, {"keywords": "zz"}],
        "de": [{"plain": "Wo ist der Knopf für zz?"}],
    },
    "answers": {
        "en": {"full": 'The button "Start export" is in the panel.'},
        "de": {"full": 'Der Knopf "Start export" ist im Panel.'},
    },
}
GOOD_FACTS = {
    "zz-fact": {"labels": ["Start export"], "topic": "zz"},
    "zz-absent": {"labels": [], "absent": True, "topic": "zz"},
}


def make_entry(**changes) -> build_corpus.Entry:
    """The good entry with some fields changed; `a.b` names a field within a field."""
    raw = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *outer, last = path.split(".")
        target = raw
        for name in outer:
            target = target[name]
        target[last] = value
    return build_corpus.Entry(**raw)


def test_an_added_entry_changes_no_other_row(entries):
    before, after = (
        {row["id"]: row for row in map(json.loads, build_corpus.build(found)[build_corpus.EXTENDED].splitlines())}
        for found in (entries, [make_entry(), *entries])
    )
    assert len(after) == len(before) + 4 and before.items() <= after.items()


def test_an_added_question_changes_no_other_row_of_its_entry():
    more = [*GOOD["questions"]["en"], {"typo": "were is the zz buton"}]
    before, after = ({row["id"]: row for row in e.rows()} for e in (make_entry(), make_entry(**{"questions.en": more})))
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_the_order_of_files_and_entries_changes_nothing(entries):
    assert build_corpus.build(entries[::-1]) == build_corpus.build(entries)


# What the lint can find


def test_the_lint_lets_a_good_entry_pass():
    assert build_corpus.lint([make_entry()], GOOD_FACTS) == []


LONG = "word " * 100
BAD = [
    ({"id": "ZZ_bad"}, "id must be kebab-case"),
    ({"id": "other-good"}, "id must be kebab-case and start with 'zz'"),
    ({"fact_ids": ["zz-fact", "nonsense"]}, "unknown fact ids ['nonsense']"),
    ({"fact_ids": []}, "no fact_ids"),
    ({"kind": "not-available"}, "no absent fact is named"),
    ({"questions.en": GOOD["questions"]["en"][:2]}, "en: 2 questions, expected 3 or more"),
    ({"questions.de": []}, "de: 0 questions, expected 1 or more"),
    ({"common": True}, "en: 3 questions, expected 6 or more"),
    ({"common": True}, "en: answers ['full'], expected full and short"),
    ({"questions.de": [], "answers.de": {}}, "de: answers [], expected full and short"),
    ({"questions.en": [*GOOD["questions"]["en"], {"premise": "Why is zz blue?"}]}, "en: a premise question without a premise answer"),
    ({"questions.de": [{"plain": "zz?"}]}, "de: question of 1 words"),
    ({"questions.de": [{"story": LONG}]}, "de: question of 100 words"),
    ({"answers.en": {"full": "The button is in the panel."}}, "en.full: lacks required 'Start export'"),
    ({"answers.en": {"full": f"Start export {LONG}"}}, "en.full: 102 words, expected 3 to 95"),
    ({"answers.en": {"full": 'Start export is behind "Send now".'}}, "en.full: quotes 'Send now', which no fact contains"),
    ({"kind": "not-available", "fact_ids": ["zz-absent", "zz-fact"]}, "en.full: does not open with a denial"),
    ({"kind": "not-available", "fact_ids": ["zz-absent", "zz-fact"]}, "de.full: does not open with a denial"),
    ({"answers.de": {"full": "Start export is the button that you have in the panel."}}, "de.full: does not read as de"),
    ({"answers.en": {"full": "Start export ist der Knopf, den du auf dem Panel siehst."}}, "en.full: does not read as en"),
    ({"answers.de": {"full": "Der Knopf „Start export“ ist im Panel."}}, "de.full: uses typographic quotes"),
    ({"questions.de": [{"plain": "where is the ZZ button"}]}, "zz-good, zz-good: the same question twice"),
    ({"questions.de": [{"plain": "Where is the button that you have for zz?"}]}, "de: question does not read as de"),
    ({"answers.en": {"full": "Start export…"}}, "en.full: 2 words, expected 3 to 95"),
    ({"answers.en": {"full": 'Yes, "Start export" is in the panel.'}}, "en.full: opens with a verdict on one question"),
    ({"answers.de": {"full": 'Nein, der Knopf "Start export" ist im Panel.'}}, "de.full: opens with a verdict on one question"),
    ({"answers.en": {"full": 'It is "Start export" in the panel.'}}, "en.full: opens with a pronoun"),
    ({"answers.de": {"full": 'Er heißt "Start export" und ist im Panel.'}}, "de.full: opens with a pronoun"),
    ({"answers.en": {"short": 'Open the panel. Click "Start export".', "full": LONG}}, "en.short: 2 sentences, a short answer is one"),
    ({"answers.en": {"short": 'Click "Start export" in the panel.', "full": "Start export there."}}, "the short answer is longer"),
    ({"answers.en": {"full": 'Click "tart expor" in the panel, Start export.'}}, "quotes 'tart expor', which no fact contains"),
    ({"common": True, "must": []}, "must is empty"),
    ({"common": True}, "de: 1 ways of asking, expected 3 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_the_lint_reports_what_breaks_a_rule(changes, words):
    problems = build_corpus.lint([make_entry(**changes)], GOOD_FACTS)
    assert any(words in problem for problem in problems), problems


def test_the_lint_reports_an_id_used_twice_and_everything_else_at_once():
    bad = make_entry(**{"answers.en": {"full": "Nothing."}, "fact_ids": ["nonsense"]})
    problems = "\n".join(build_corpus.lint([make_entry(), bad], GOOD_FACTS))
    for words in ("zz-good: id used 2 times", "lacks required", "unknown fact ids", "the same question twice"):
        assert words in problems


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("topic: zz\nentries: [", "zz.yaml: not readable as YAML"),
        (yaml.safe_dump({"topic": "zz", "entries": [{**GOOD, "kind": "poem"}]}), "zz.yaml: zz-good: kind"),
        (yaml.safe_dump({"topic": "zz", "entries": [{**GOOD, "extra": 1}]}), "zz.yaml: zz-good: extra"),
        (yaml.safe_dump({"topic": "zz", "entries": [{"id": "zz-empty"}]}), "zz.yaml: zz-empty: questions: Field required"),
        (yaml.safe_dump({"topic": "zz", "entries": [{**GOOD, "answers": {"en": GOOD["answers"]["en"]}}]}), "de: questions without a full"),
        (yaml.safe_dump({"topic": "zz", "entries": [{**GOOD, "answers": {"fr": {"full": "Oui."}}}]}), "zz-good: answers.fr"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_the_schema_is_named_with_its_entry(tmp_path, document, words):
    path = tmp_path / "zz.yaml"
    path.write_text(document, encoding="utf-8")
    found, problems = build_corpus.load_entries([path, tmp_path / "missing.yaml"])
    assert found == [] and any(words in problem for problem in problems), problems
    assert any("missing.yaml" in problem for problem in problems)


# What Arciva does not have


def claims(language: str, answer: str, form: str = "full") -> list[str]:
    return build_corpus.absent_claims(language, form, answer)


def test_every_absent_fact_has_terms_or_is_listed_unnamed(facts):
    terms = build_corpus.load_absent_terms()
    unnamed = terms.pop("unnamed")
    assert len(unnamed) == len(set(unnamed)) and not set(unnamed) & set(terms)
    assert set(unnamed) | set(terms) == {fact for fact, known in facts.items() if known.get("absent")}
    assert all(found and all(isinstance(term, str) for term in found) for found in terms.values())
    assert len(build_corpus.absent_patterns(build_corpus.KNOWLEDGE / build_corpus.ABSENT_TERMS)) == len(terms)


@pytest.mark.parametrize(
    ("language", "claim", "term", "fact"),
    [
        ("en", "Face recognition then groups the portraits.", "Face recognition", "be-no-face-recognition"),
        ("en", "Open the map view to see where they were taken.", "map view", "be-no-map"),
        ("en", "You can add a Watermark as well.", "Watermark", "be-no-watermark"),
        ("en", "1. Click the photo.\n2. Pick a date with the date picker.", "date picker", "ws-no-date-range-filter"),
        ("de", "Die Gesichtserkennung gruppiert danach die Porträts.", "Gesichtserkennung", "be-no-face-recognition"),
        ("de", "In der Kartenansicht siehst du die Orte.", "Kartenansicht", "be-no-map"),
        ("de", "Gelöschte Fotos liegen im Papierkorb.", "Papierkorb", "be-no-trash"),
        # A denial of something else in the same sentence excuses nothing.
        ("en", "Face recognition only runs on JPEG files.", "Face recognition", "be-no-face-recognition"),
        ("en", "You can add a watermark, but not a logo, in the export dialog.", "watermark", "be-no-watermark"),
        ("en", "Use the map view; it cannot show photos without GPS.", "map view", "be-no-map"),
        (
            "en",
            "If you do not see people, open face recognition in the panel.",
            "face recognition",
            "be-no-face-recognition",
        ),
        ("de", "Die Gesichtserkennung läuft nur bei JPEG-Dateien.", "Gesichtserkennung", "be-no-face-recognition"),
    ],
)
def test_a_planted_false_claim_is_found(entries, facts, language, claim, term, fact):
    entry = next(e for e in entries if e.id == "export-open").model_copy(deep=True)
    entry.answers[language]["full"] += f"\n{claim}"
    (problem,) = build_corpus.lint([entry], facts)
    sentence = claim.split("\n")[-1].removeprefix("2. ")
    assert problem.startswith(f"export.yaml: export-open: {language}.full: claims {term!r}, which Arciva does not have")
    assert f"({fact})" in problem and sentence in problem


@pytest.mark.parametrize(
    ("language", "denial"),
    [
        ("en", "Arciva has no face recognition."),
        ("en", "There isn't a map view, and watermarks cannot be added."),
        ("en", "Projects take the place of a landmap; masked balls and albumen prints are other words."),
        ("de", "Eine Gesichtserkennung gibt es nicht."),
        ("de", "Arciva hat weder Kartenansicht noch Papierkorb."),
        ("de", "Kartenansicht, Alben und Papierkorb gibt es nicht."),
        ("en", "Photos leave the project without a trash."),
        ("en", 'The section only says "Folder view coming soon."'),
    ],
)
def test_a_denial_of_a_missing_feature_and_a_longer_word_are_no_claims(language, denial):
    assert claims(language, denial) == []


def test_a_premise_answer_may_deny_in_the_sentence_before():
    answer = "Arciva does not do that. Face recognition is a feature of other programs."
    assert claims("en", answer, "premise") == []
    assert len(claims("en", answer)) == 1
    assert len(claims("en", "Yes, that works. Face recognition finds them.", "premise")) == 1


def test_a_reviewer_s_answer_is_searched_for_claims_too(tmp_path):
    line = {"id": make_entry().rows()[0]["id"], "answer": "Start export adds the watermark."}
    overrides, _ = load_overrides(tmp_path, line)
    (problem,) = build_corpus.lint([make_entry()], GOOD_FACTS, overrides)
    assert problem.startswith(f"overrides: {line['id']}: claims 'watermark'")


# Overrides


def load_overrides(tmp_path, *lines: dict | str) -> tuple[dict[str, build_corpus.Override], list[str]]:
    path = tmp_path / "overrides.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return build_corpus.load_overrides(path)


def test_overrides_change_drop_and_leave_rows(tmp_path):
    rows = make_entry().rows()
    overrides, problems = load_overrides(
        tmp_path,
        {
            "id": rows[0]["id"],
            "question": "Where did zz go?",
            "answer": "Start export is on the left.",
            "reviewed": "2026",
        },
        {"id": rows[1]["id"], "discard": True},
    )
    assert problems == []
    changed = build_corpus.apply_overrides(rows, overrides)
    assert changed == [
        rows[0] | {"instruction": "Where did zz go?", "response": "Start export is on the left."},
        *rows[2:],
    ]
    assert build_corpus.lint([make_entry()], GOOD_FACTS, overrides) == []
    assert build_corpus.load_overrides(tmp_path / "missing.jsonl") == ({}, [])


def test_a_discarded_row_moves_no_other_into_or_out_of_the_seed_corpus(entries):
    before = [json.loads(line) for line in build_corpus.build(entries, {})[build_corpus.SEED].splitlines()]
    override = build_corpus.Override(id=before[0]["id"], discard=True)
    files = build_corpus.build(entries, {override.id: override})
    assert [json.loads(line) for line in files[build_corpus.SEED].splitlines()] == before[1:]
    assert f'"{override.id}"' not in files[build_corpus.EXTENDED]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"id": "zz-good/en/00000000", "discard": True}, "zz-good/en/00000000: no such row"),
        ({"answer": "The button."}, "lacks required 'Start export'"),
        ({"answer": 'Start export, then "Send now".'}, "quotes 'Send now'"),
        ({"answer": "Start export is here.", "replaces": "00000000"}, "the knowledge has changed since the review"),
        ({"question": "Can you show me the ZZ"}, "the same question twice"),
    ],
)
def test_the_lint_reports_an_override_that_does_not_fit(tmp_path, override, words):
    overrides, broken = load_overrides(tmp_path, {"id": make_entry().rows()[0]["id"]} | override)
    assert broken == []
    assert any(words in problem for problem in build_corpus.lint([make_entry()], GOOD_FACTS, overrides))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: override: Invalid JSON"),
        ({"id": "a"}, "line 2: override: Value error, expected a question or an answer, or discard"),
        ({"id": "a", "answer": "b", "discard": True}, "and not both"),
        ({"id": "a", "answer": " "}, "is empty"),
        ({"id": "a", "anser": "b"}, "line 2: anser: Extra inputs"),
        ({"id": "zz", "discard": True}, "line 2: zz is overridden twice"),
    ],
)
def test_a_broken_override_is_named_by_its_line(tmp_path, line, words):
    _, problems = load_overrides(tmp_path, {"id": "zz", "discard": True}, line)
    assert any(words in problem for problem in problems), problems


# The card


def small_corpus(name: str, rows: list[dict], path) -> build_data_card.Corpus:
    split = arciva.SplitReport(
        counts={"train": {"train": 2}, "validation": {"unseen": 1}, "test": {}}, set_aside=["x"],
        naive_near_duplicates=0.25, naive_known_answers=0.5, near_duplicates=0.0, known_answers=0.0,
        known_rephrased=1.0,
    )  # fmt: skip
    path.write_text(build_corpus.to_jsonl(rows), encoding="utf-8")
    return build_data_card.Corpus(name, path, rows, split)


def test_the_card_s_figures_are_counted(tmp_path):
    corpus = small_corpus("seed", make_entry().rows(), tmp_path / "a.jsonl")
    overview = build_data_card.overview_table([corpus])
    for line in (
        "| rows | 4 |",
        "| rows in German | 1 |",
        "| share of German | 25.0% |",
        "| entries, what is | 1 |",
        "| different answers | 2 |",
    ):
        assert line in overview
    # Three English rows and a German one, all of one topic.
    assert "| zz | 4 | 100.0% | 25% |" in build_data_card.count_table("topic", lambda row: row["topic"], [corpus])
    # English questions of 5, 6 and 1 words: the median is 5, the longest 6.
    assert "| seed, question, en | 1 | 1 | 5 | 6 | 6 | 6 |" in build_data_card.length_table([corpus])
    split = build_data_card.split_table([corpus])
    assert "| validation, unseen | 1 |" in split and "| test, unseen | 0 |" in split and "| set aside | 1 |" in split
    assert "| 25.0% | 0.0% |" in build_data_card.leak_table([corpus])


def test_the_card_s_front_matter_names_both_files_and_the_size():
    text = build_data_card.CARD.read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["language"] == ["en", "de"] and front["size_categories"] == ["10K<n<100K"]
    files = {config["config_name"]: config["data_files"] for config in front["configs"]}
    assert files == {"seed": build_corpus.SEED.name, "extended": build_corpus.EXTENDED.name}
    assert [config["config_name"] for config in front["configs"] if config.get("default")] == ["seed"]


def test_a_card_that_is_out_of_date_fails_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_data_card, "build", lambda: "the card\n")
    monkeypatch.setattr(build_data_card, "CARD", tmp_path / "README.md")
    assert build_data_card.main(["--verify"]) == 1
    assert build_data_card.main([]) == 0 and build_data_card.main(["--verify"]) == 0
    build_data_card.CARD.write_text("the old card\n")
    assert build_data_card.main(["--verify"]) == 1
    assert "run python tools/build_data_card.py" in capsys.readouterr().err
