"""The base that is trained from scratch: what it may read. Run: pytest tests/test_nano_base.py"""

import collections
import json
import random
import re
from pathlib import Path

import build_corpus
import build_nano_base
import pytest
from conftest import ROOT

import arciva_assistant_poc as arciva


@pytest.fixture(scope="module")
def held_out() -> set[str]:
    return build_nano_base.held_out_questions()


@pytest.fixture(scope="module")
def entries() -> list[build_corpus.Entry]:
    return build_corpus.load_entries(build_corpus.knowledge_files())[0]


@pytest.fixture(scope="module")
def terms(entries) -> dict[tuple[str, str], list[str]]:
    return build_nano_base.load_search_terms(entries)


def test_the_base_reads_no_held_out_question(entries, held_out, terms):
    for name in (build_corpus.SEED, build_corpus.EXTENDED):  # by another way than the builder's
        splits, _ = arciva.split_examples(arciva.load_examples(str(name))[0], arciva.Config().seed)
        for side in ("validation", "test"):
            assert {arciva.normalise(turns[0]["content"]) for turns in splits[side]["messages"]} <= held_out
    for seed in range(3):  # titles lose words by chance, and what is left could be another question
        read = build_nano_base.documents(entries, held_out, random.Random(seed), 1.0, terms)
        titles = {arciva.normalise(document.title) for document in read}
        assert len(titles) > 5_000 and not titles & held_out


def test_what_nobody_is_taught_stands_below_no_title(entries, held_out, terms):
    read = build_nano_base.documents(entries, held_out, random.Random(0), 1.0, terms)
    titled, plain = ({d.text for d in read if bool(d.title) is wanted} for wanted in (True, False))
    splits, _ = arciva.split_examples(arciva.load_examples(str(build_corpus.EXTENDED))[0], arciva.Config().seed)
    taught, unseen = set(), set()
    for side, rows in splits.items():
        for row in rows:
            if side == "train" or row["novelty"] == "unseen":
                (taught if side == "train" else unseen).add(row["messages"][-1]["content"])
    assert len(unseen) > 300 and not titled & (unseen - taught)
    assert len(titled) > 1_000 and len(plain) > 1_000 and any(text.endswith(tuple(unseen)) for text in plain)


def test_what_the_seed_corpus_teaches_is_read_in_every_pass(entries, held_out, terms):
    splits, _ = arciva.split_examples(arciva.load_examples(str(build_corpus.SEED))[0], arciva.Config().seed)
    taught = collections.defaultdict(collections.Counter)
    for row in splits["train"]:
        taught[row["id"].rsplit("/", 1)[0]][row["messages"][-1]["content"]] += 1
    read = collections.Counter(
        d.text for d in build_nano_base.documents(entries, held_out, random.Random(0), 0.0, terms) if d.title
    )
    for answers in taught.values():
        assert max(read[text] for text, n in answers.items() if n == max(answers.values())) >= 5
    more = {d.text for d in build_nano_base.documents(entries, held_out, random.Random(0), 0.5, terms) if d.title}
    assert len(read) < 2 * len(taught) < len(more)


def test_search_terms_are_rows_of_no_corpus_and_questions_of_no_suite(entries, held_out, terms):
    found = [term for of in terms.values() for term in of]
    assert len(found) > 4_000 and build_nano_base.readable_terms(terms, held_out) == terms
    asked = {arciva.normalise(row["instruction"]) for entry in entries for row in entry.rows()}
    assert not {arciva.normalise(term) for term in found} & asked
    prompts = [
        json.loads(line)["prompt"]
        for file in sorted((ROOT / "data" / "suites").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    pairs = arciva.near_duplicates([*prompts, *found])
    assert len(prompts) > 200 and not [(i, j) for i, j in pairs if i < len(prompts) <= j]


def test_a_search_term_too_like_a_held_out_question_is_not_read():
    terms = {("a", "en"): ["where do rejected photos go to?", "the bin for pictures"], ("b", "en"): ["Undo!"]}
    held_out = {arciva.normalise(text) for text in ("Where do rejected photos go?", "undo")}
    assert build_nano_base.readable_terms(terms, held_out) == {("a", "en"): ["the bin for pictures"], ("b", "en"): []}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no-such-entry: {en: [one]}", "no-such-entry/en names no passage; correct it or take it out."),
        ("tagging-no-permanent-tags: {fr: [one]}", "tagging-no-permanent-tags/fr names no passage"),
        ("tagging-no-permanent-tags: {en: [no]}", "lists False; write a text, in quotes if need be."),
        ("tagging-no-permanent-tags: {en: [one key, One key?]}", "stands under tagging-no-permanent-tags/en and"),
    ],
)
def test_a_mistake_in_the_search_terms_is_named(entries, tmp_path, text, says):
    file = tmp_path / "search_terms.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)):
        build_nano_base.load_search_terms(entries, file)


def test_titles_fall_apart_and_lose_words_but_never_gain_any():
    rng = random.Random(3)
    text = (
        "Where do I find the photos that I rejected yesterday, when I was still using the other view of this project?"
    )
    for _ in range(50):
        pieces = build_nano_base.cut(text, rng, 0.1)
        assert "".join(pieces) == text and len(pieces) > 1 and all(pieces)
        assert {w.lower() for w in build_nano_base.blur(text, rng).split()} <= {w.lower() for w in text.split()}
    assert build_nano_base.cut(text, rng, 0.0) == [text]


def test_passages_are_spelled_as_they_will_be_written():
    tokenizer = arciva.load_tokenizer(str(ROOT / "data" / "nano_base"))
    answer = "Press X to reject the photo."
    read = [build_nano_base.Document("How do I reject?", answer), build_nano_base.Document("", answer)]
    for item in build_nano_base.encode(tokenizer, read, random.Random(1)):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert item.input_ids[-len(ids) :] == ids and item.labels == item.input_ids


def test_a_page_joins_whole_passages_and_loses_none(monkeypatch):
    tokenizer = arciva.load_tokenizer(str(ROOT / "data" / "nano_base"))
    read = [
        build_nano_base.Document(f"Question {i}?", f"Answer {i}. " + "More of it. " * 9, opening_only=i % 2 == 1)
        for i in range(12)
    ]
    monkeypatch.setattr(build_nano_base, "PAGE_SHARE", 1.0)
    pages = build_nano_base.encode(tokenizer, read, random.Random(0))
    text = "".join(tokenizer.decode(page.input_ids) for page in pages)
    assert [f"Question {i}?" in text and f"Answer {i}." in text for i in range(12)] == [True] * 12
    for page in pages:
        *joined, _ = tokenizer.decode(page.input_ids).split("Question")[1:]
        assert len(page.input_ids) and all(part.rstrip().endswith(tokenizer.eos_token) for part in joined)


def test_the_committed_base_has_the_size_it_should_have():
    folder = Path(ROOT / "data" / "nano_base")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 20 * 2**20
    model, _ = arciva.empty_model(arciva.AutoConfig.from_pretrained(folder))
    assert 5e6 <= model.num_parameters() <= 10e6
