"""The base that is trained from scratch: what it may read. Run: pytest tests/test_nano_base.py"""

import random
from pathlib import Path

import build_corpus
import build_nano_base
import pytest
from conftest import ROOT

import arciva_assistant_poc as arciva


@pytest.fixture(scope="module")
def held_out() -> set[str]:
    return build_nano_base.held_out_questions()


def test_the_base_reads_no_held_out_question(held_out):
    for name in (build_corpus.SEED, build_corpus.EXTENDED):  # by another way than the builder's
        splits, _ = arciva.split_examples(arciva.load_examples(str(name))[0], arciva.Config().seed)
        for side in ("validation", "test"):
            assert {arciva.normalise(turns[0]["content"]) for turns in splits[side]["messages"]} <= held_out
    entries, _ = build_corpus.load_entries(build_corpus.knowledge_files())
    for seed in range(3):  # titles lose words by chance, and what is left could be another question
        read = build_nano_base.documents(entries, held_out, random.Random(seed), others=1.0)
        titles = {arciva.normalise(document.title) for document in read}
        assert len(titles) > 5_000 and not titles & held_out


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
