"""Section 3: loading and splitting. Run: pytest tests/test_data.py"""

import itertools
import json
import random

import pytest
from conftest import ROOT, corpus_rows, pair, write_rows

import arciva_assistant_poc as arciva

SEED_CORPUS = str(ROOT / "data" / "arciva_qa_synthetic.jsonl")


@pytest.fixture(scope="module")
def corpus() -> list[arciva.Example]:
    return arciva.load_examples(SEED_CORPUS)[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: row"),
        ('{"instruction": "a"}', "expected 'instruction' with 'response'"),
        ('{"instruction": "a", "response": "  "}', "empty"),
        ('{"instruction": 3, "response": "b"}', "instruction: Input should be a valid string"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "end with the assistant"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role"),
        ('{"instruction": "a", "response": "b", "language": "fr"}', "language"),
        ('{"instruction": "a", "response": "\\ud83d"}', "lone surrogate"),
        ('{"instruction": "a", "response": "b", "source": "dashboard", "split": "test"}', "must not be trained on"),
        (
            '{"id": "generation/x/y", "instruction": "a", "response": "b", "split": "train", "suite": "probes"}',
            "must not be",
        ),
        ('{"id": "fact-0/en/0", "instruction": "a", "response": "b"}', "was used in"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, line, words):
    path = write_rows(tmp_path / "rows.jsonl", corpus_rows(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(arciva.ArcivaError, match=r"rows\.jsonl, line 2") as caught:
        arciva.load_examples(str(path))
    assert words in str(caught.value)


def test_all_bad_rows_are_reported_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 3)
    with pytest.raises(arciva.ArcivaError, match="3 bad rows"):
        arciva.load_examples(str(path))


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"instruction": "Größe?", "response": "Ja."}'.encode("cp1252"))
    with pytest.raises(arciva.ArcivaError, match=r"rows.jsonl is not UTF-8"):
        arciva.load_examples(str(path))


@pytest.mark.parametrize(("content", "words"), [(None, "no data at"), ("", "holds no rows"), ("\n\n", "holds no rows")])
def test_a_missing_or_empty_file_says_what_to_do(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(arciva.ArcivaError, match=words):
        arciva.load_examples(str(path))


def test_the_shipped_corpus_is_found_from_anywhere_and_colab_is_told_how_to_bring_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arciva.load_examples(arciva.Config().data)[0]
    monkeypatch.setattr(arciva, "REPOSITORY", tmp_path)  # a notebook opened alone
    monkeypatch.setattr(arciva, "in_colab", lambda: True)
    with pytest.raises(arciva.ArcivaError, match=r"upload it with the file browser, or mount Drive .* or set DATA"):
        arciva.load_examples(arciva.Config().data)


@pytest.mark.parametrize("address", ["https://exa mple/x", "http://localhost:1/rows.jsonl", "https://[::1/x"])
def test_an_address_that_gives_nothing_is_one_sentence(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(arciva.ArcivaError, match="cannot download"):
        arciva.load_examples(address)


def test_reviewed_rows_are_kept_changed_and_discarded_by_their_label(tmp_path):
    labels = ["✅ Verified", "✍️ Modified", "🗑️ Discarded", None]
    rows = [
        {"messages": pair(f"q{i}", f"a{i}"), "review_metadata": {"label": label} if label else None, "unknown": [i]}
        for i, label in enumerate(labels)
    ]
    examples, verdicts = arciva.load_examples(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert verdicts == {"verified": 1, "modified": 1, "discarded": 1, "unreviewed": 1}
    assert [e.question for e in examples] == ["q0", "q1", "q3"]
    assert json.loads(examples[0].extra) == {"unknown": [0]}


def test_output_is_read_as_response_and_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('﻿{"instruction": "Wie geht das?", "output": "Das ist nicht möglich."}\r\n', encoding="utf-8")
    examples, _ = arciva.load_examples(str(path))
    assert examples[0].messages[-1]["content"] == "Das ist nicht möglich."
    assert examples[0].language == "de"


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.8, 1.0])
def test_near_duplicates_equal_the_brute_force(threshold):
    rng = random.Random(0)
    words = "export import photo stack tag search filter panel size name colour rating".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(150)]
    texts += [t + rng.choice(["", "s", "?", " now"]) for t in texts[:60]] + ["", "a"]
    rng.shuffle(texts)
    sets = [arciva.shingles(t) for t in texts]
    expected = [
        (i, j) for i, j in itertools.combinations(range(len(texts)), 2) if arciva.jaccard(sets[i], sets[j]) >= threshold
    ]
    assert len(expected) > 30
    assert arciva.near_duplicates(texts, threshold) == expected


def sides_by_id(examples, seed=42):
    splits, report = arciva.split_examples(examples, seed)
    return {i: side for side, dataset in splits.items() for i in dataset["id"]}, report


def test_unseen_rows_share_no_fact_with_training(corpus):
    splits, _ = arciva.split_examples(corpus, 42)
    taught = {f for facts in splits["train"]["fact_ids"] for f in facts}
    held_out = [row for side in ("validation", "test") for row in splits[side]]
    assert {r["novelty"] for r in held_out} == {"rephrased", "unseen"}
    for row in held_out:
        assert (set(row["fact_ids"]) <= taught) == (row["novelty"] == "rephrased")
        assert row["novelty"] == "rephrased" or not set(row["fact_ids"]) & taught


def test_no_held_out_wording_has_a_near_copy_in_training(corpus):
    splits, report = arciva.split_examples(corpus, 42)
    train = [arciva.shingles(m[-2]["content"]) for m in splits["train"]["messages"]]
    for side in ("validation", "test"):
        for messages in splits[side]["messages"]:
            question = arciva.shingles(messages[-2]["content"])
            assert all(arciva.jaccard(question, other) < arciva.NEAR_DUPLICATE for other in train)
    assert report.near_duplicates == 0.0
    assert report.known_answers == 0.0


def test_what_a_split_gives_away_is_counted_over_its_held_out_rows(corpus):
    answers = ["A", "B", "A", "C", "D"]
    examples = [
        arciva.replace(
            corpus[0], id=str(i), messages=[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": a}]
        )
        for i, a in enumerate(answers)
    ]
    sides = ["train", "test", "validation", "train", "test"]
    # Row 1 has a near-copy in training, rows 2 and 4 are alike but both held out; row 2's answer is row 0's.
    assert arciva.leak_rates(examples, sides, [(0, 1), (2, 4)]) == pytest.approx((1 / 3, 1 / 3))
    assert arciva.leak_rates(examples, ["train"] * 5, [(0, 1)]) == (0, 0)


def test_a_fact_whose_only_training_row_was_set_aside_is_unseen(corpus):
    """A held-out wording and its near-copy are all there is about a fact: nothing is left to teach it."""
    question = "How many photos at most may I put into one single collection before the grid becomes slow, roughly? "
    answer = {"role": "assistant", "content": "As many as you like."}
    copies = [
        arciva.replace(
            corpus[0],
            id=f"lone/{i}",
            fact_ids=["lone-fact"],
            messages=[{"role": "user", "content": f"{question}{i}"}, answer],
        )
        for i in range(100, 160)
    ]
    sides = arciva.assign_sides(copies, 42)
    held_out, taught = (
        next(e for e, s in zip(copies, sides, strict=True) if (s == "train") is t) for t in (False, True)
    )
    splits, report = arciva.split_examples([*corpus, held_out, taught], 42)
    novelty = {row["id"]: row["novelty"] for side in splits.values() for row in side}
    assert report.set_aside == [taught.id] and novelty[held_out.id] == "unseen"


def test_the_naive_split_leaks_and_is_measured(corpus):
    splits, report = arciva.split_examples(corpus, 42)
    assert report.naive_known_answers > 0.2
    taught = {row["messages"][-1]["content"] for row in splits["train"]}
    asked = [row for side in ("validation", "test") for row in splits[side] if row["novelty"] == "rephrased"]
    known = sum(row["messages"][-1]["content"] in taught for row in asked)
    assert report.known_rephrased == pytest.approx(known / len(asked)) and known > len(asked) / 2


def test_the_shares_are_about_eighty_ten_ten(corpus):
    sides, report = sides_by_id(corpus)
    share = {side: sum(s == side for s in sides.values()) / len(corpus) for side in ("train", "validation", "test")}
    assert 0.74 < share["train"] < 0.86
    assert 0.06 < share["validation"] < 0.14 and 0.06 < share["test"] < 0.14
    for side in ("validation", "test"):
        assert min(report.counts[side].values()) >= 25


def test_the_order_of_rows_changes_nothing(corpus):
    shuffled = random.Random(1).sample(corpus, len(corpus))
    assert sides_by_id(corpus)[0] == sides_by_id(shuffled)[0]


def test_an_added_row_moves_no_other(corpus):
    before = sides_by_id(corpus)[0]
    rows = [
        {"instruction": f"Entirely new question {i} {'zyx' * i}", "response": f"new {i}", "fact_ids": [f"zz-new-{i}"]}
        for i in range(40)
    ]
    rows += [
        {"instruction": f"Quite another wording {e.id}", "response": "x", "fact_ids": e.fact_ids} for e in corpus[:40]
    ]
    rows += [
        {"instruction": e.question + "!", "response": "near copy", "fact_ids": e.fact_ids} for e in corpus[100:140]
    ]
    added = [arciva.example_from_row(arciva.Row(**row)) for row in rows]
    after = sides_by_id([*corpus, *added])[0]
    # A near copy of a held-out wording may be set aside; no row ever changes its side.
    assert {i: after[i] for i in before if i in after} == {i: side for i, side in before.items() if i in after}
    assert len(set(before) - set(after)) <= 2


def test_too_little_data_is_refused(tmp_path):
    examples, _ = arciva.load_examples(str(write_rows(tmp_path / "rows.jsonl", corpus_rows(3))))
    with pytest.raises(arciva.ArcivaError, match="add data"):
        arciva.split_examples(examples, 42)
