"""Section 6: suites that cannot be vacuous. Run: pytest tests/test_suites.py"""

import json
import math
import re
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import export_lm_eval
import lm_eval
import numpy as np
import pytest
import run_suites
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


@pytest.mark.parametrize("name", ["arciva_qa_synthetic", "arciva_qa_extended"])
def test_facts_of_held_out_probes_are_in_no_training_row(items, name):
    held_out = {fact for item in items if item.held_out for fact in item.fact_ids}
    examples, _ = arciva.load_examples(f"{ROOT}/data/{name}.jsonl")
    splits, _ = arciva.split_examples(examples, arciva.Config().seed)
    assert len([i for i in items if i.held_out and i.type == "absent"]) >= 8
    assert not held_out & {fact for row in splits["train"]["fact_ids"] for fact in row}


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
    assert sorted(a["messages"][1]["content"] for a in asked) == sorted(i.prompt for i in items)
    assert all(a["messages"][0]["content"] == arciva.SYSTEM_PROMPT and a["temperature"] == 0 for a in asked)
    rates = json.loads((tmp_path / "suites.json").read_text())["tuned"]["passed"]
    assert rates == pytest.approx(results["gold"].groupby("suite")["passed"].mean().to_dict())
    monkeypatch.setenv("THE_KEY", "wrong")
    assert arciva.run_main(lambda: run_suites.run([*flags, *folders])) == 2
    assert "answered 401" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(arciva.ArcivaError, match="cannot reach"):
        run_suites.ask_endpoint("http://127.0.0.1:9/v1", "x", None, max_new_tokens=8)(["a?"])
    with pytest.raises(arciva.ArcivaError, match="no model in"):
        run_suites.run(["--model", str(tmp_path / "nothing"), "--suites", f"{ROOT}/data/suites"])


def test_the_harness_agrees_with_our_figures(tmp_path, cpu):
    nano, suites, count = ROOT / "data" / "nano_base", ROOT / "data" / "suites", 16
    out = tmp_path / "tasks"
    assert export_lm_eval.main(["--suites", str(suites), "--out", str(out)]) == 0
    measured = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(nano), "dtype": "float32", "device": "cpu"},
        tasks=list(export_lm_eval.tasks(out)),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(out), include_defaults=False),
        apply_chat_template=True,
        limit=count,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 24},
    )["results"]
    tokenizer = arciva.load_tokenizer(str(nano))
    model = arciva.AutoModelForCausalLM.from_pretrained(nano, dtype="float32")
    items = arciva.load_suites(str(suites))[:count]
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
    found = arciva.generate_answers(model, tokenizer, [i.prompt for i in items], cpu, max_new_tokens=24, batch_size=8)
    exact = np.mean([arciva.exact_match(a.text, i.gold) for a, i in zip(found, items, strict=True)])
    assert measured["arciva_answers"]["exact_match,none"] == pytest.approx(exact)
