"""Section 6: suites that cannot be vacuous. Run: pytest tests/test_suites.py"""

import re
from collections import Counter, defaultdict

import pytest
from conftest import ROOT

import arciva_assistant_poc as arciva

ANSWERERS = {
    "empty": lambda item: "",
    "echo": lambda item: item.prompt,
    "refuse all": lambda item: (
        "That is outside what I can help with. Das liegt außerhalb, dabei kann ich nicht helfen."
    ),
    "deny all": lambda item: "No, Arciva has no such feature. Nein, das gibt es nicht.",
    "always yes": lambda item: "Yes, open the menu and click it. Ja, öffne das Menü und klicke darauf.",
    "gold": lambda item: item.gold,
}


@pytest.fixture(scope="module")
def items() -> list[arciva.SuiteItem]:
    return arciva.load_suites(str(ROOT / "data" / "suites"))


@pytest.fixture(scope="module")
def corpus() -> list[arciva.Example]:
    return arciva.load_examples(f"{ROOT}/data/arciva_qa_extended.jsonl")[0]


@pytest.fixture(scope="module")
def results(items, corpus):
    vocabulary = arciva.knowledge_vocabulary(corpus, str(ROOT / "data" / "knowledge"))
    return {
        name: arciva.run_suite(items, lambda prompts, answer=answer: [answer(i) for i in items], vocabulary)
        for name, answer in ANSWERERS.items()
    }


def test_the_suites_are_as_large_as_they_must_be(items):
    count = Counter(i.suite for i in items)
    assert count["checklists"] >= 200
    probes = [i for i in items if i.suite == "probes" and i.type != "twin"]
    assert len(probes) >= 120
    assert {i.language for i in items} == {"en", "de"}
    assert {i.type for i in items} == set(arciva.SuiteItem.model_fields["type"].annotation.__args__)


def test_every_probe_has_an_answerable_twin_and_every_reference_exists(items):
    known = {i.id: i for i in items}
    assert len(known) == len(items)
    for item in items:
        assert item.same_as is None or item.same_as in known
        if item.suite == "probes" and item.type != "twin":
            assert known[item.twin].type == "twin" and known[item.twin].expect == "answer"
        assert (item.type == "invariance") == (item.same_as is not None)


def test_gold_answers_pass_and_claim_nothing_unsupported(results):
    gold = results["gold"]
    assert gold["passed"].mean() > 0.98, gold[~gold["passed"]][["id", "answer", "reasons"]].to_string()
    assert gold["unsupported"].mean() < 0.03, gold[gold["unsupported"] > 0][["id", "answer"]].to_string()


@pytest.mark.parametrize("name", ["empty", "echo", "refuse all", "deny all", "always yes"])
def test_a_canned_answerer_fails_as_it_must(results, name):
    wrong = results[name]
    assert wrong[wrong["suite"] == "checklists"]["passed"].mean() < 0.1
    assert arciva.hallucination_summary(wrong)["balanced_accuracy"] < 0.62


def test_refusing_everything_trades_false_answers_for_false_refusals(results):
    summary = arciva.hallucination_summary(results["deny all"])
    assert summary["false_answer"] < 0.6 and summary["false_refusal"] > 0.9
    assert arciva.hallucination_summary(results["gold"])["balanced_accuracy"] > 0.97


def test_every_item_has_a_check_that_some_wrong_answer_fails(results):
    wrong = [results[name].set_index("id")["passed"] for name in ANSWERERS if name not in ("gold", "empty")]
    fooled = [i for i in wrong[0].index if all(w[i] for w in wrong)]
    assert not fooled


def test_no_prompt_appears_in_the_corpus(items, corpus):
    questions = [e.question for e in corpus]
    taught = {arciva.normalise(q) for q in questions}
    assert not [i.id for i in items if arciva.normalise(i.prompt) in taught]
    pairs = arciva.near_duplicates([*questions, *(i.prompt for i in items)])
    assert not [(i, j) for i, j in pairs if i < len(questions) <= j]


def test_unsupported_claims_are_counted():
    vocabulary = 'Click "New project". Ctrl+N opens it. At most 50 photos.'
    assert arciva.unsupported_claims('Click "New project" or press Ctrl+N, up to 50.', vocabulary) == []
    claims = arciva.unsupported_claims('Open "Magic menu", press Ctrl+M, up to 70.', vocabulary)
    assert claims == ["Magic menu", "Ctrl+M", "70"]
    assert arciva.unsupported_claims("1. Open it.\n2. Close it.", vocabulary) == []
    assert arciva.unsupported_claims("70 is wrong", vocabulary, prompt="Is it 70?") == []


def test_a_bad_item_is_named_by_file_and_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(arciva.ArcivaError, match=re.escape("x.jsonl, line 1")):
        arciva.load_suites(str(tmp_path))


def test_a_folder_without_suites_is_said_not_hidden(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arciva, "REPOSITORY", tmp_path)
    assert arciva.load_suites(str(tmp_path / "none")) == []
    assert "skipped" in capsys.readouterr().out


def test_directional_items_ask_for_what_they_check(items):
    by_type = defaultdict(list)
    for item in items:
        by_type[item.type].append(item)
    assert all(i.answer_language or i.steps is not None for i in by_type["directional"])
