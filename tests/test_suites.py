"""Section 6: suites that cannot be vacuous. Run: pytest tests/test_suites.py"""

import json
import math
import re
import threading
from collections import Counter, defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import export_lm_eval
import lm_eval
import numpy as np
import pandas as pd
import pytest
import run_suites
import yaml
from conftest import ROOT, corpus_rows, write_rows

import arciva_assistant_poc as arciva

NONSENSE = [name for name in run_suites.CANNED if name != "gold"]
KNOWLEDGE = ROOT / "data" / "knowledge"


@pytest.fixture(scope="module")
def items() -> list[arciva.SuiteItem]:
    return arciva.load_suites(str(ROOT / "data" / "suites"))


@pytest.fixture(scope="module")
def corpus() -> list[arciva.Example]:
    return arciva.load_examples(f"{ROOT}/data/arciva_qa_extended.jsonl")[0]


@pytest.fixture(scope="module")
def vocabulary(corpus):
    return arciva.knowledge_vocabulary(corpus, str(KNOWLEDGE))


@pytest.fixture(scope="module")
def results(items, vocabulary):
    return run_suites.canned_results(items, vocabulary)


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
    assert gold["passed"].mean() > 0.995, gold[~gold["passed"]][["id", "answer", "reasons"]].to_string()
    assert gold["unsupported"].mean() < 0.005, gold[gold["unsupported"] > 0][["id", "answer"]].to_string()


@pytest.mark.parametrize("name", NONSENSE)
def test_a_canned_answerer_fails_as_it_must(results, name):
    rates, passed = arciva.hallucination_summary(results[name]), results[name].groupby("type")["passed"].mean()
    right = {"refuse all": ["out-of-domain"], "deny all": ["absent", "other-product"]}.get(name, [])
    assert (passed[right] > 0.95).all(), passed
    assert (passed.drop(right) < 0.05).all(), passed
    assert rates["checklists"] < 0.03 and rates["false_refusal"] > 0.97
    # Of the probes a tenth asks for a refusal, and half ask for nothing but a denial.
    assert rates["balanced_accuracy"] < {"refuse all": 0.08, "deny all": 0.3}.get(name, 0.02)


def test_the_canned_table_is_printed(capsys):
    folders = ["--suites", f"{ROOT}/data/suites", "--data", f"{ROOT}/data/arciva_qa_synthetic.jsonl"]
    assert run_suites.run(["--canned", *folders]) == {}
    printed = capsys.readouterr().out
    assert all(name in printed for name in run_suites.CANNED) and "balanced_accuracy" in printed


def test_a_denial_is_said_and_not_only_worded():
    denial = [
        ("en", "Sorry! Arciva has no such thing."),
        ("en", "Arciva doesn’t do that."),
        ("en", "Batch renaming is unavailable."),
        ("en", "This is not supported."),
        ("en", "Of course not."),
        ("de", "Leider bietet Arciva das an keiner Stelle."),
        ("de", "Diese Funktion fehlt."),
    ]
    none = [
        ("en", "Yes, you only need to open the Magic menu and click it."),
        ("en", "No problem. Open Edit > Preferences > Faces and press Ctrl+Shift+9."),
        ("en", "Certainly! You cannot miss it."),
        ("en", "Nothing easier than that: tick the box."),
        ("en", "Not only photos, but also videos carry it."),
        ("en", "Open the dialog. Do not close it."),
        ("en", "Where is no box?"),
        ("en", "Use it without a plug-in."),
        ("de", "Ja, du musst nur das Menü öffnen."),
        ("de", "Kein Problem. Das geht ohne Weiteres im Menü."),
        ("de", "Natürlich geht das, nicht nur im Grid."),
    ]
    assert all(arciva.denies(answer, language) for language, answer in denial)
    assert not [answer for language, answer in none if arciva.denies(answer, language)]


def test_declining_is_about_the_assistant_and_not_about_the_product(corpus):
    for answer in (
        "I can only help with Arciva.",
        "Sorry, I don't know anything about that; I'm here for Arciva.",
        "That lies beyond what I can answer.",
        "Das weiß ich leider nicht. Dabei kann ich nicht helfen.",
        "Ich helfe nur bei Arciva.",
    ):
        assert arciva.declines(answer), answer
    for answer in (
        "You can only use passwords with at least 8 characters.",
        "Take the camera outside.",
        "Photos outside the project are not exported.",
        "Das liegt außerhalb des Projekts.",
    ):
        assert not arciva.declines(answer), answer
    answers = {(e.messages[-1]["content"], e.kind == "off-topic") for e in corpus}
    rates = {off: np.mean([arciva.declines(a) for a, kind in answers if kind == off]) for off in (True, False)}
    # What is left among the off-topic ones is small talk: greetings, thanks, comfort.
    assert rates[True] > 0.75 and rates[False] < 0.002, rates


def test_numbers_and_short_words_are_whole():
    assert arciva.contains("It takes 3 files.", "3") and not arciva.contains("It takes 13 files.", "3")
    assert not arciva.contains("From 0.2 to 2.5", "2") and arciva.contains("bis 2,5.", "2.5")
    assert arciva.contains("At most 12,000 pixels", "12000") and arciva.contains("needs 4GB", "4 GB")
    assert not arciva.contains("cr3 files", "3") and not arciva.contains("Allow it", "all")
    assert arciva.contains("Nach dem Neuladen", "neulad")


def test_a_wrong_number_fails_wherever_one_is_asked_for(items):
    digits, tried, fooled = re.compile(r"\d+"), 0, []
    for item in items:
        said = [[m for m in group if arciva.contains(item.gold, m)] for group in item.must]
        if not any(found and all(digits.search(m) for m in found) for found in said):
            continue
        for change in (lambda m: f"1{m[0]}3", lambda m: str(int(m[0]) + 7919), lambda m: m[0] + "0"):
            tried += 1
            answer = digits.sub(change, item.gold)
            fooled += [(item.id, answer)] if answer != item.gold and not arciva.failures(item, answer) else []
    assert tried > 200 and not fooled, fooled


def test_probes_ask_for_more_than_a_denial_where_they_can(items):
    assert all(i.must for i in items if i.type in ("premise", "number"))
    absent = [i for i in items if i.type == "absent"]
    assert sum(bool(i.must or i.must_not) for i in absent) > 0.6 * len(absent)


def test_refusing_everything_is_no_way_to_pass(results):
    denying, refusing = (arciva.hallucination_summary(results[name]) for name in ("deny all", "refuse all"))
    assert denying["false_answer"] < 0.55 and denying["false_refusal"] == 1.0
    assert refusing["false_answer"] > 0.85 and refusing["false_refusal"] == 1.0
    assert arciva.hallucination_summary(results["gold"])["balanced_accuracy"] > 0.99


def test_every_item_has_a_check_that_some_wrong_answer_fails(results):
    wrong = [results[name].set_index("id")["passed"] for name in NONSENSE if name != "empty"]
    fooled = [i for i in wrong[0].index if all(w[i] for w in wrong)]
    assert not fooled


def test_no_prompt_appears_in_the_corpus(items, corpus):
    questions = [e.question for e in corpus]
    taught = {arciva.normalise(q) for q in questions}
    assert not [i.id for i in items if arciva.normalise(i.prompt) in taught]
    pairs = arciva.near_duplicates([*questions, *(i.prompt for i in items)])
    assert not [(i, j) for i, j in pairs if i < len(questions) <= j]
    texts = [*questions, *(e.messages[-1]["content"] for e in corpus)]
    texts += [file.read_text(encoding="utf-8") for file in KNOWLEDGE.glob("*.yaml")]
    everything = "\n".join(map(arciva.normalise, texts))
    assert not [i.prompt for i in items if arciva.normalise(i.prompt) in everything]


def test_each_invariance_says_what_it_varies(items):
    known, count = {i.id: i for i in items}, Counter(i.variant for i in items if i.type == "invariance")
    assert set(count) == {"typo", "casing", "polite", "language"} and min(count.values()) >= 10
    for item in items:
        assert (item.variant is not None) == (item.type == "invariance"), item.id
        if item.variant:
            original = known[item.same_as]
            assert (item.variant == "language") == (item.language != original.language), item.id
            assert (item.variant == "casing") == item.prompt.isupper(), item.id
            assert item.prompt != original.prompt


def test_flips_are_counted_by_variant(items, vocabulary):
    def careless(prompts):  # knows every answer, but reads no capitals
        gold = {i.prompt: i.gold for i in items}
        return ["No idea." if p.isupper() else gold[p] for p in prompts]

    results = arciva.run_suite(items, careless, vocabulary)
    summary = arciva.suite_summary({"tuned": results}, None)
    assert summary["tuned"]["flips"] == {"casing": 1.0, "language": 0.0, "polite": 0.0, "typo": 0.0}
    shouted = sum(i.variant == "casing" for i in items) / sum(i.type == "invariance" for i in items)
    assert summary["tuned"]["rates"]["flips"]["value"] == pytest.approx(shouted)


def test_a_german_answer_without_function_words_is_german(items):
    item = next(i for i in items if i.answer_language == "de").model_copy(update={"must": [], "expect": "answer"})
    assert arciva.failures(item, "Drücke Taste 9.") == []
    assert arciva.failures(item, "Press the key 9.") == ["is not in de"]


@pytest.mark.parametrize("name", ["arciva_qa_synthetic", "arciva_qa_extended"])
def test_facts_of_held_out_probes_are_in_no_training_row(items, name):
    held_out = {fact for item in items if item.held_out for fact in item.fact_ids}
    examples, _ = arciva.load_examples(f"{ROOT}/data/{name}.jsonl")
    splits, _ = arciva.split_examples(examples, arciva.Config().seed)
    assert len([i for i in items if i.held_out and i.type == "absent"]) >= 8
    assert not held_out & {fact for row in splits["train"]["fact_ids"] for fact in row}


KNOWN = ('Click "New project". Ctrl+N, or Cmd+N, opens it. At most 50 photos, at 2.5. See Workspace > Image Details.',)


@pytest.mark.parametrize(
    "answer",
    [
        'Click "New project" or press Ctrl+N, up to 50.',
        "Klicke auf **New project** oder drücke Strg + N.",
        "Press ⌘N for a “project”.",
        "1. Open it.\n2. Close it.",
        "Bis 2,5; siehe Workspace > Image Details.",
        "Is it 70? No.",
    ],
)
def test_what_the_knowledge_or_the_question_has_is_supported(answer):
    assert arciva.unsupported_claims(answer, arciva.build_vocabulary([], KNOWN), prompt="Are there 70?") == []


@pytest.mark.parametrize(
    ("answer", "claim"),
    [
        ('Open "Magic menu".', "Magic menu"),
        ("Open **Magic menu**.", "Magic menu"),
        ("Open 'Magic menu' first.", "Magic menu"),
        ("Open “Magic menu”.", "Magic menu"),
        ("Öffne „Magic menu“.", "Magic menu"),
        ("Öffne »Magic menu«.", "Magic menu"),
        ('Click "New proj".', "New proj"),
        ('Click "project new".', "project new"),
        ("Choose File > Export As and wait.", "File > Export As"),
        ("It is Edit → Preferences → Faces.", "Edit → Preferences → Faces"),
        ("Press ⌘K.", "⌘K"),
        ("Press Ctrl + Q.", "Ctrl + Q"),
        ("Press Option+F.", "Option+F"),
        ("Drücke Umschalt+F.", "Umschalt+F"),
        ("ctrl+q does it.", "ctrl+q"),
        ("Press F9.", "F9"),
        ("Press Ctrl+Alt+N.", "Ctrl+Alt+N"),
        ("Press K now.", "K"),
        ("The limit is 70.", "70"),
        ("The limit is 5.", "5"),
        ("The limit is 500.", "500"),
        ("It is 25.", "25"),
    ],
)
def test_what_the_knowledge_does_not_have_is_an_unsupported_claim(answer, claim):
    assert arciva.unsupported_claims(answer, arciva.build_vocabulary([], KNOWN)) == [claim]


def test_a_denial_that_invents_something_fails(items, vocabulary):
    probe = next(i for i in items if i.type == "other-product" and i.language == "en")
    answer = 'No, not there. Open "Magic menu" and press Ctrl+Alt+Q.'
    row = arciva.run_suite([probe], lambda _: [answer], vocabulary).iloc[0]
    assert row["unsupported_claims"] == ["Magic menu", "Ctrl+Alt+Q"] and row["unsupported"] == 2
    assert not row["passed"] and "Magic menu" in row["reasons"]


def test_the_vocabulary_is_the_knowledges_whatever_corpus_a_run_has(corpus, vocabulary):
    alone = arciva.knowledge_vocabulary([], str(KNOWLEDGE))
    for kind in ("labels", "paths", "shortcuts", "numbers"):
        assert getattr(vocabulary, kind) - getattr(alone, kind) == frozenset(), kind


def test_the_corpus_claims_nothing_that_the_knowledge_does_not_have(corpus):
    answers = list({e.messages[-1]["content"] for e in corpus})
    facts = yaml.safe_load((KNOWLEDGE / "facts.yaml").read_text(encoding="utf-8"))
    labels = arciva.build_vocabulary([str(label) for f in facts.values() for label in f.get("labels", [])], [])
    whole = arciva.knowledge_vocabulary([], str(KNOWLEDGE))
    rates = {
        name: np.mean([bool(arciva.unsupported_claims(a, v)) for a in answers])
        for name, v in (("whole", whole), ("labels", labels))
    }
    # The index of facts alone, without any authored answer, already knows nearly all that the answers name.
    assert rates["whole"] < 0.002 and rates["labels"] < 0.03, rates


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


@pytest.fixture
def server(items):
    """A chat-completions server that knows the gold answers, and wants a key."""
    gold, asked = {item.prompt: item.gold for item in items}, []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            known = self.headers["Authorization"] == "Bearer secret" and self.path == "/v1/chat/completions"
            text = gold[body["messages"][-1]["content"]] if known else ""
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "1", "created": 0, "model": body["model"], "object": "chat.completion", "choices": [choice]}
            data = json.dumps(
                reply | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
            ).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/v1", asked
    served.shutdown()


def test_a_served_model_is_scored_like_any_other(server, items, results, tmp_path, monkeypatch, capsys):
    url, asked = server
    monkeypatch.setenv("THE_KEY", "secret")
    flags = ["--endpoint", url, "--name", "served", "--key-from", "THE_KEY", "--out", str(tmp_path)]
    folders = ["--suites", f"{ROOT}/data/suites", "--data", f"{ROOT}/data/arciva_qa_extended.jsonl"]
    assert arciva.run_main(lambda: run_suites.run([*flags, *folders])) == 0
    assert sorted(a["messages"][1]["content"] for a in asked[: len(items)]) == sorted(i.prompt for i in items)
    assert all(a["messages"][0]["content"] == arciva.SYSTEM_PROMPT and a["temperature"] == 0 for a in asked)
    rates = json.loads((tmp_path / "suites.json").read_text())["tuned"]["rates"]
    assert rates["balanced_accuracy"]["value"] == arciva.hallucination_summary(results["gold"])["balanced_accuracy"]
    said = len(asked)
    assert arciva.run_main(lambda: run_suites.run([*flags, *folders, "--min-checklists", "40"])) == 2
    assert "min_checklists is 40.0, expected a figure from 0 to 1" in capsys.readouterr().err
    assert len(asked) == said  # before anything is asked
    reached = {"min_checklists": 0.4, "min_balanced_accuracy": 1.0}
    monkeypatch.setattr(arciva, "reached_on_suites", lambda results: reached)
    missed = [*flags, *folders, "--min-checklists", "0.5", "--min-balanced-accuracy", "0.5"]
    assert arciva.run_main(lambda: run_suites.run(missed)) == 2
    assert "not accepted: checklists is 0.4, below 0.5" in capsys.readouterr().err
    monkeypatch.setenv("THE_KEY", "wrong")
    assert arciva.run_main(lambda: run_suites.run([*flags, *folders])) == 2
    assert "answered 401" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(arciva.ArcivaError, match="cannot reach"):
        run_suites.ask_endpoint("http://127.0.0.1:9/v1", "x", None, max_new_tokens=8)(["a?"])
    with pytest.raises(arciva.ArcivaError, match="no model in"):
        run_suites.run(["--model", str(tmp_path / "nothing"), "--suites", f"{ROOT}/data/suites"])


REPLY = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}]}


@pytest.fixture
def scripted():
    """A server that gives the next of some (status, body) replies to each request, the last of them for ever."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            status, body = replies.pop(0) if len(replies) > 1 else replies[0]
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield (
        run_suites.ask_endpoint(f"http://127.0.0.1:{served.server_port}/v1", "x", None, max_new_tokens=8),
        replies,
        asked,
    )
    served.shutdown()


@pytest.mark.parametrize("body", [{}, "<html>hello</html>", "", {"choices": []}, {"choices": [{"index": 0}]}, [1]])
def test_an_answer_that_is_no_completion_is_one_sentence(scripted, body):
    ask, replies, _ = scripted
    replies.append((200, body))
    with pytest.raises(arciva.ArcivaError, match="not with a chat completion"):
        ask(["a?"])


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not(scripted, monkeypatch):
    ask, replies, asked = scripted
    monkeypatch.setattr(run_suites, "WAITS", (0, 0, 0))
    replies += [(429, {}), (503, {}), (200, REPLY)]
    assert ask(["a?"]) == ["fine"] and len(asked) == 3
    replies[:] = [(500, {})]
    with pytest.raises(arciva.ArcivaError, match="answered 500"):
        ask(["a?"])
    assert len(asked) == 3 + 4
    replies[:] = [(404, {})]
    with pytest.raises(arciva.ArcivaError, match="answered 404"):
        ask(["a?"])
    assert len(asked) == 8


@pytest.fixture
def few_suites(tmp_path, items):
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "few.jsonl").write_text("".join(i.model_dump_json() + "\n" for i in [*items[:3], *items[-4:]]))
    return [
        "--suites",
        str(folder),
        "--data",
        str(write_rows(tmp_path / "data.jsonl", corpus_rows())),
        "--max-new-tokens",
        "4",
    ]


def test_a_folder_with_a_model_is_scored(tiny_base, few_suites, tmp_path):
    out = tmp_path / "out"
    run_suites.run(["--model", str(tiny_base), *few_suites, "--out", str(out)])
    summary = json.loads((out / "suites.json").read_text(), parse_constant=pytest.fail)
    assert summary["schema_version"] == 2 and summary["adapter"] is None and "base" not in summary
    # Among so few items no probe is held out of training: there is nothing to give a share of, and null says so.
    assert set(summary["tuned"]["rates"]["balanced_accuracy"]) == {"value", "low", "high"}
    assert len(pd.read_json(out / "suites_tuned.jsonl", lines=True)) == 7


def test_an_adapter_is_scored_beside_its_base(tiny_config, few_suites, tmp_path, cpu):
    tiny_config = replace(tiny_config, epochs=0.2, evaluations_per_epoch=1)
    tokenizer = arciva.load_tokenizer(tiny_config.base_model)
    model = arciva.add_adapter(arciva.load_base_model(tiny_config, cpu), tiny_config)
    splits, _ = arciva.split_examples(arciva.load_examples(tiny_config.data)[0], tiny_config.seed)
    training = arciva.train_adapter(model, tokenizer, splits, tiny_config, cpu)
    arciva.save_adapter(model, tokenizer, training, splits, tiny_config)
    out = tmp_path / "out"
    run_suites.run(["--adapter", tiny_config.output_dir, *few_suites, "--out", str(out)])
    summary = json.loads((out / "suites.json").read_text())
    assert summary["adapter"] == arciva.adapter_fingerprint(tiny_config.output_dir)
    assert summary["paired"]["checklists"]["p_value"] == 1.0 and set(arciva.load_suite_results(str(out))) == {
        "base",
        "tuned",
    }


def test_suite_results_survive_the_disk_as_valid_json(items, vocabulary, tmp_path):
    probe = next(i for i in items if i.type == "absent")  # alone it leaves most rates without anything to count
    results = arciva.run_suite([probe], lambda _: ["0012"], vocabulary)
    arciva.save_suites({"base": results, "tuned": results}, str(tmp_path), "abc")
    summary = json.loads((tmp_path / "suites.json").read_text(), parse_constant=pytest.fail)
    assert summary["adapter"] == "abc" and len(summary["suites"]) == 12
    assert summary["tuned"]["rates"]["checklists"] == {"value": None, "low": None, "high": None}
    assert summary["tuned"]["rates"]["false_answer"]["value"] == 1.0
    assert arciva.load_suite_results(str(tmp_path))["tuned"]["answer"].tolist() == ["0012"]


def test_rates_come_with_intervals_over_families(results):
    scores = arciva.suite_scores(results["always yes"], results["gold"])
    assert scores["checklists"]["base"] == {"value": 0, "low": 0, "high": 0}
    assert scores["balanced_accuracy"]["paired"]["p_value"] < 0.002
    half = results["gold"].assign(passed=lambda f: f["family"].map(lambda name: len(name) % 2 == 0))
    rate = arciva.suite_scores(half, half)["checklists"]
    naive = 1.96 * (rate["base"]["value"] * (1 - rate["base"]["value"]) / (half["suite"] == "checklists").sum()) ** 0.5
    # Items on one fact succeed together here, so an interval over items would be too narrow.
    assert (rate["base"]["high"] - rate["base"]["low"]) / 2 > 1.15 * naive
    assert rate["paired"]["p_value"] == 1.0


def test_the_harness_agrees_with_our_figures(tmp_path, cpu):
    nano, count = ROOT / "data" / "nano_base", 8
    tokenizer = arciva.load_tokenizer(str(nano))
    model = arciva.AutoModelForCausalLM.from_pretrained(nano, dtype="float32")
    items = arciva.load_suites(str(ROOT / "data" / "suites"))[:count]
    found = arciva.generate_answers(model, tokenizer, [i.prompt for i in items], cpu, max_new_tokens=24, batch_size=8)
    # Every other gold answer is what the model says: an exact match of a half, not of none, has to be found.
    items = [
        i.model_copy(update={"gold": a.text} if n % 2 else {})
        for n, (i, a) in enumerate(zip(items, found, strict=True))
    ]
    suites = tmp_path / "suites"
    suites.mkdir()
    (suites / "some.jsonl").write_text("".join(i.model_dump_json() + "\n" for i in items), encoding="utf-8")
    out = tmp_path / "tasks"
    assert export_lm_eval.main(["--suites", str(suites), "--out", str(out)]) == 0
    measured = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(nano), "dtype": "float32", "device": "cpu"},
        tasks=list(export_lm_eval.tasks(out)),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(out), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 24},
    )["results"]
    encoded = []
    for item in items:
        prompt = arciva.encode_prompt(tokenizer, item.prompt)
        answer = tokenizer(item.gold, add_special_tokens=False)["input_ids"]
        # The harness scores no end of turn, but the line break that ends the prompt.
        assert tokenizer.decode(prompt[-1:]) == "\n"
        masked = [arciva.IGNORE_INDEX] * (len(prompt) - 1)
        encoded.append(arciva.Encoded(prompt + answer, masked + prompt[-1:] + answer))
    losses = arciva.score_losses(model, encoded, cpu, row_tokens=256, pad_id=tokenizer.pad_token_id)
    gold = measured["arciva_gold"]
    assert math.log(gold["perplexity,none"]) == pytest.approx(np.mean(losses[:, 0]), rel=1e-4)
    exact = np.mean([arciva.exact_match(a.text, i.gold) for a, i in zip(found, items, strict=True)])
    assert measured["arciva_answers"]["exact_match,none"] == pytest.approx(exact) == 0.5
