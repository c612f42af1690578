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
def terms() -> dict[str, list[str]]:
    return build_nano_base.load_search_terms()


@pytest.fixture(scope="module")
def loaded(terms) -> tuple[list[build_nano_base.Passage], set[str]]:
    return build_nano_base.load_passages(terms)


def split(path: Path) -> arciva.datasets.DatasetDict:
    return arciva.split_examples(arciva.load_examples(str(path))[0], arciva.Config().seed)[0]


def test_the_base_reads_no_held_out_question_nor_one_too_like_it(loaded):
    passages, held_out = loaded
    questions = set()
    for name in (build_corpus.SEED, build_corpus.EXTENDED):  # by another way than the builder's
        for side, rows in split(name).items():
            if side != "train":
                questions |= {arciva.normalise(turns[0]["content"]) for turns in rows["messages"]}
    assert questions <= held_out
    exact = collections.Counter()
    for seed in range(4):  # titles lose words by chance, and what is left could be another question
        read = build_nano_base.documents(passages, held_out, random.Random(seed), others=1.0 if seed < 2 else 0.1)
        titles = [arciva.normalise(document.title) for document in read]
        exact.update(titles)
        assert len(set(titles)) > 5_000 and not set(titles) & questions
    shingles = {question: arciva.shingles(question) for question in questions}
    of_gram = collections.defaultdict(set)
    for question, grams in shingles.items():
        for gram in grams:
            of_gram[gram].add(question)
    for title in exact:
        grams = arciva.shingles(title)
        for question in set().union(*(of_gram[gram] for gram in grams if gram in of_gram)):
            assert arciva.jaccard(grams, shingles[question]) < arciva.NEAR_DUPLICATE, (title, question)


def test_what_nobody_is_taught_stands_below_no_title(loaded):
    read = build_nano_base.documents(*loaded, random.Random(0), others=1.0)
    titled, plain = ({d.text for d in read if bool(d.title) is wanted} for wanted in (True, False))
    for name, least in ((build_corpus.SEED, 30), (build_corpus.EXTENDED, 300)):
        taught, unseen = set(), set()
        for side, rows in split(name).items():
            for row in rows:
                if side == "train" or row["novelty"] == "unseen":
                    (taught if side == "train" else unseen).add(row["messages"][-1]["content"])
        assert len(unseen) > least and not titled & (unseen - taught)
        assert any(text.endswith(tuple(unseen)) for text in plain)
    assert len(titled) > 1_000 and len(plain) > 1_000


def test_what_the_seed_corpus_teaches_is_read_in_every_pass(loaded):
    taught = collections.defaultdict(collections.Counter)
    for row in split(build_corpus.SEED)["train"]:
        taught[row["id"].rsplit("/", 1)[0]][row["messages"][-1]["content"]] += 1
    few, more = (build_nano_base.documents(*loaded, random.Random(0), others) for others in (0.0, 0.5))
    read = collections.Counter(d.text for d in few if d.title)
    for answers in taught.values():
        assert max(read[text] for text, n in answers.items() if n == max(answers.values())) >= 10
    assert len(read) < 2 * len(taught) < len({d.text for d in more if d.title})


def test_titles_are_questions_search_terms_and_excerpts(terms):
    text = "Press X to reject the photo; the card turns pale."
    passage = build_nano_base.Passage(
        "culling", [text], [("How do I throw it out?", text)], text, ["bin for bad ones"], True
    )
    titles = set()
    for seed in range(60):
        for document in build_nano_base.documents([passage], set(), random.Random(seed)):
            titles |= {document.title} if document.title else set()
            assert document.text in (text, f"culling: {text}")
    sources = ["How do I throw it out?", "bin for bad ones", text]
    within = {s: [t for t in titles if set(t.lower().split()) <= set(s.lower().split())] for s in sources}
    assert all(len(found) > 5 for found in within.values()) and set().union(*within.values()) == titles
    assert text not in titles  # an excerpt is less than the whole


def test_search_terms_are_rows_of_no_corpus_and_questions_of_no_suite(loaded, terms):
    found = [term for of in terms.values() for term in of]
    assert len(found) > 4_000
    asked = [e.question for e in arciva.load_examples(str(build_corpus.EXTENDED))[0]]
    assert not set(map(arciva.normalise, found)) & set(map(arciva.normalise, asked))
    prompts = [
        json.loads(line)["prompt"]
        for file in sorted((ROOT / "data" / "suites").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    for others, threshold in ((prompts, arciva.NEAR_DUPLICATE), (sorted(loaded[1]), 0.5)):
        pairs = arciva.near_duplicates([*others, *found], threshold)
        assert len(others) > 500 and not [(i, j) for i, j in pairs if i < len(others) <= j]


def test_a_title_too_like_a_held_out_question_is_not_read():
    titles = ["where do rejected photos go to?", "the bin for pictures", "Undo!"]
    held_out = {arciva.normalise(text) for text in ("Where do rejected photos go?", "undo")}
    assert build_nano_base.too_like(titles, held_out) == {titles[0], titles[2]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {fr: [one]}", "search_terms.yaml: a/fr"),
        ("a: {en: [no]}", "a/en/0: Input should be a valid string"),
        ("a: {en: ['??']}", "a/en/0: String should match pattern"),
        (
            "a: {en: one}",
            "a/en: Input should be a valid list; write entry, below it en or de, below that a list of texts.",
        ),
        ("a:\n  en:", "a/en: Input should be a valid list"),
        ("[a, b]", "the file: Input should be a valid dictionary"),
        ("", "the file: Input should be a valid dictionary"),
        ("a: {en: [one key, One key?]}", "'One key?' stands under a/en and a/en; keep one."),
        ("a: {en: [one key]}\nb: {de: [One key]}", "'One key' stands under a/en and b/de; keep one."),
        ("a: {en: [one]}\nb: {en: [two]}\na: {de: [eins]}", "a stands there 2 times; put its terms together."),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_the_search_terms_is_named(tmp_path, text, says):
    file = tmp_path / "search_terms.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)):
        build_nano_base.load_search_terms(file)


def test_search_terms_of_no_passage_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no-such-entry/en: no such passage; correct it or take it out\."):
        build_nano_base.load_passages({"no-such-entry/en": ["one"]})
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        build_nano_base.load_search_terms(tmp_path / "nowhere.yaml")


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


def test_the_committed_base_says_how_it_was_made():
    folder = Path(ROOT / "data" / "nano_base")
    tokenizer, phases = arciva.load_tokenizer(str(folder)), json.loads((folder / "training.json").read_text("utf-8"))
    assert phases and {phase["vocabulary"] for phase in phases} == {len(tokenizer)}
