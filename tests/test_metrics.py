"""Section 5: generation and scores. Run: pytest tests/test_metrics.py"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from conftest import make_model, pair
from sacrebleu.significance import PairedTest
from torch.nn import functional as F
from transformers import DynamicCache

import arciva_assistant_poc as arciva

PROMPTS = [
    "a?",
    "Wie exportiere ich meine Fotos am besten?",
    "How do I export?",
    "Where is the panel and how large is it?",
    "b",
]


def answers(model, tokenizer, cpu, batch_size, limit=24):
    return arciva.generate_answers(model, tokenizer, PROMPTS, cpu, max_new_tokens=limit, batch_size=batch_size)


@pytest.fixture
def stopping_model(chatml):
    """A random model that ends some answers early: its head prefers the end-of-turn token in some contexts."""
    model = make_model(vocabulary=len(chatml), tied=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight[chatml.eos_token_id] *= 2.2
    return model


def test_answers_one_at_a_time_equal_answers_in_a_batch(stopping_model, chatml, cpu):
    single = answers(stopping_model, chatml, cpu, 1)
    assert single == answers(stopping_model, chatml, cpu, 5) == answers(stopping_model, chatml, cpu, 2)
    assert len({a.tokens for a in single}) > 1  # some rows finished before others and left the batch


def test_greedy_answers_equal_those_of_generate(stopping_model, chatml, cpu):
    for prompt, answer in zip(PROMPTS, answers(stopping_model, chatml, cpu, 5), strict=True):
        ids = torch.tensor([arciva.encode_prompt(chatml, prompt)])
        expected = stopping_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=chatml.eos_token_id,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert answer.text == chatml.decode(expected, skip_special_tokens=True).strip()
        assert answer.cut == (chatml.eos_token_id not in expected.tolist())


def test_a_sliding_window_counts_no_padding(chatml, cpu):
    """With a window shorter than the prompts, answers in a batch still equal those of one prompt alone."""
    model = make_model("mistral", vocabulary=len(chatml), seed=3)
    model.config.sliding_window = 8
    assert any(DynamicCache(config=model.config).is_sliding)
    assert answers(model, chatml, cpu, 5) == answers(model, chatml, cpu, 1)


def test_what_all_prompts_share_is_read_once(stopping_model, chatml, cpu):
    prompts = [arciva.encode_prompt(chatml, p) for p in PROMPTS]
    shared, seen = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), []
    assert shared > 4
    hook = stopping_model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0].numel())
    )
    answers(stopping_model, chatml, cpu, len(prompts), limit=1)
    hook.remove()
    longest = max(map(len, prompts))
    assert sum(seen) == shared + len(prompts) * (longest - shared)


def test_perplexity_equals_a_direct_computation_over_single_pairs(chatml, cpu):
    model = make_model(vocabulary=len(chatml))
    items = [arciva.encode(chatml, pair(p, "Press Start export. " * (i + 1))) for i, p in enumerate(PROMPTS)]
    losses = arciva.score_losses(model, items, cpu, row_tokens=64, pad_id=chatml.pad_token_id, batch_tokens=150)
    total, count = 0.0, 0
    for row, item in zip(losses, items, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.input_ids])).logits[0, :-1]
        labels = torch.tensor(item.labels[1:])
        nll = F.cross_entropy(logits, labels, ignore_index=arciva.IGNORE_INDEX, reduction="sum").item()
        assert row[0] == pytest.approx(nll, rel=1e-5) and row[1] == item.supervised
        total, count = total + nll, count + item.supervised
    assert arciva.perplexity(losses) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_rouge_l_keeps_umlauts_and_counts_by_hand():
    # "die größe ändern" against "die größe wählen": LCS 2 of 3 words on both sides, F = 2/3.
    assert arciva.rouge_l("Die Größe ändern!", "die größe wählen") == pytest.approx(2 / 3)
    # Default rouge-score would see "gr e" and "gr e" in both and call these equal.
    assert arciva.rouge_l("Größe", "Grüße") == 0.0


def test_metrics_equal_hand_worked_values():
    assert arciva.exact_match("Open  “Export”.", "open Export") == 1.0
    assert arciva.exact_match("Open Export", "Open Import") == 0.0
    bleu = arciva.CorpusBleu().compute(predictions=["the cat sat on the mat"], references=["the cat sat on the mat"])
    assert bleu["bleu"] == pytest.approx(100) and bleu["chrf"] == pytest.approx(100)
    # Of 6, 5, 4 and 3 n-grams of the first four orders 5, 3, 2 and 1 are found; equal lengths, so no brevity penalty.
    bleu = arciva.CorpusBleu().compute(predictions=["the cat sat on a mat"], references=["the cat sat on the mat"])
    assert bleu["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_the_report_s_figures_equal_hand_worked_values():
    data = frame(2).assign(
        reference=["Größe ändern", "Export"],
        tuned_answer=["Größe ändern jetzt", ""],
        tuned_cut=[True, False],
        tuned_nll=[2.0, 6.0],
        answer_tokens=[1, 3],
    )
    scores = {
        name: score["tuned"]["value"]
        for name, score in arciva.score_group(data, seed=1).items()
        if isinstance(score, dict)
    }
    assert scores["perplexity"] == pytest.approx(
        math.exp(8 / 4)
    )  # by tokens; the mean over questions would be e² twice
    assert scores["bits_per_byte"] == pytest.approx(8 / math.log(2) / (15 + 6))  # ö, ß and ä are two bytes each
    assert scores["rouge_l"] == pytest.approx((2 * 2 / (2 + 3) + 0) / 2)
    assert (scores["cut_off"], scores["answer_words"], scores["exact_match"]) == (0.5, 1.5, 0.0)
    assert arciva.UnicodeRougeL().compute(predictions=["a b", "c"], references=["a b", "d"])["rouge_l"] == 0.5
    assert arciva.NormalisedExactMatch().compute(predictions=["a", "b"], references=["A!", "c"])["exact_match"] == 0.5


WORDS = "open the export panel and press start to save your photos without delay".split()


def sentences(count: int, seed: int, shortest: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 14))) for _ in range(count)]


@pytest.mark.parametrize(
    ("metric", "figure"),
    [
        (arciva.BLEU, arciva.bleu_figure),
        (arciva.SENTENCE_BLEU, lambda s: arciva.bleu_figure(s, effective_order=True)),
        (arciva.CHRF, arciva.chrf_figure),
    ],
)
def test_figures_of_whole_arrays_equal_sacrebleus(metric, figure):
    predictions, references = sentences(200, 1), sentences(200, 2, shortest=1)  # some answers are empty
    statistics = arciva.corpus_statistics(metric, predictions, references)
    single = [metric._compute_score_from_stats([int(x) for x in row]).score for row in statistics]
    assert figure(statistics) == pytest.approx(single, abs=1e-9) and 0.0 in single
    assert figure(statistics.sum(0)) == pytest.approx(metric.corpus_score(predictions, [references]).score)


def frame(n=40, seed=0) -> pd.DataFrame:
    """Predictions in which the tuned model is right three times in four and the base never."""
    rng = np.random.default_rng(seed)
    references = [f"open panel {i} and press start export" for i in range(n)]
    return pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(n)],
            "split": "test",
            "novelty": ["rephrased" if i % 2 else "unseen" for i in range(n)],
            "language": "en",
            "topic": "export",
            "kind": "how-to",
            "style": "plain",
            "family": [f"f{i}" for i in range(n)],
            "question": [f"q{i}" for i in range(n)],
            "reference": references,
            "base_answer": ["nothing at all here"] * n,
            "tuned_answer": [r if i % 4 else "wrong words entirely" for i, r in enumerate(references)],
            "base_cut": True,
            "tuned_cut": False,
            "base_nll": rng.uniform(20, 30, n),
            "tuned_nll": rng.uniform(1, 2, n),
            "answer_tokens": 8,
        }
    )


def test_the_report_compares_base_and_tuned_on_the_same_questions():
    report = arciva.build_report(frame(), arciva.Config())
    assert set(report["groups"]) == {"test/rephrased", "test/unseen"}
    exact = report["groups"]["test/unseen"]["exact_match"]
    assert (
        exact["tuned"]["value"] == 0.5 and exact["base"]["value"] == 0.0
    )  # of 0, 2, 4, … every other one is a multiple of four
    assert exact["paired"]["won"] == 0.5 and exact["paired"]["tied"] == 0.5 and exact["paired"]["lost"] == 0.0
    perplexity = report["groups"]["test/rephrased"]["perplexity"]
    assert perplexity["paired"]["won"] == 1.0 and perplexity["paired"]["p_value"] < 0.01
    assert "nc:6" in report["signatures"]["chrf"] and "13a" in report["signatures"]["bleu"]


def test_intervals_hold_the_value_and_equal_models_are_no_improvement():
    same = frame().assign(tuned_answer=lambda f: f["base_answer"], tuned_nll=lambda f: f["base_nll"], tuned_cut=True)
    for scores in arciva.build_report(same, arciva.Config())["groups"].values():
        assert "paired" not in scores["answer_words"]
        for name, metric in ((s.name, scores[s.name]) for s in arciva.METRICS if s.better != "neither"):
            assert metric["paired"]["tied"] == 1.0 and metric["paired"]["p_value"] == 1.0, name
            assert metric["tuned"]["low"] - 1e-9 <= metric["tuned"]["value"] <= metric["tuned"]["high"] + 1e-9


def test_the_bootstrap_interval_of_a_mean_agrees_with_the_normal_approximation():
    values = (np.arange(400) % 2).astype(float)
    data = frame(400).assign(tuned_answer=lambda f: np.where(values == 1, f["reference"], "wrong words entirely"))
    spec = next(m for m in arciva.METRICS if m.name == "exact_match")
    tuned = arciva.compare(data, spec, arciva.resample(400, 1, 2000))["tuned"]
    # sqrt(0.25 / 400) = 0.025, so 0.5 ± 0.049; 2,000 resamples place a bound within about 0.004.
    assert tuned["low"] == pytest.approx(0.451, abs=0.008) and tuned["high"] == pytest.approx(0.549, abs=0.008)
    # Five wordings of each fact that succeed together tell no more than one: the interval stays as wide, the p-value as large.
    repeated = pd.concat([data] * 5, ignore_index=True)
    again = arciva.score_group(repeated, seed=1)
    assert again["questions"] == 2000 and again["clusters"] == 400
    once = arciva.score_group(data, seed=1)
    for name in ("exact_match", "rouge_l", "chrf", "perplexity"):
        assert again[name]["tuned"] == pytest.approx(once[name]["tuned"]), name
        assert again[name]["paired"]["p_value"] == once[name]["paired"]["p_value"], name
    by_rows = arciva.score_group(repeated.drop(columns="family").assign(id=range(2000)), seed=1)["exact_match"]["tuned"]
    assert (tuned["high"] - tuned["low"]) / (by_rows["high"] - by_rows["low"]) == pytest.approx(5**0.5, rel=0.15)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 6, 8])
def test_few_families_prove_little_however_many_questions_they_have(clusters):
    data = frame(40).assign(
        family=lambda f: [i % clusters for i in range(len(f))], tuned_answer=lambda f: f["reference"]
    )
    paired = arciva.score_group(data, seed=0)["exact_match"]["paired"]
    assert paired["won"] == 1.0
    # Every change of sign but the two that agree makes the difference smaller; 1,000 draws find that share.
    assert paired["p_value"] == pytest.approx(2.0 ** (1 - clusters), abs=0.05)
    assert clusters > 5 or paired["p_value"] > 0.03


@pytest.mark.parametrize("better", [0.0, 0.06, 0.2])
def test_the_p_value_is_sacrebleus(better):
    references = sentences(80, 2, shortest=5)
    noise = np.random.default_rng(4)
    base = [" ".join(w for w in r.split() if noise.random() < 0.7) for r in references]
    tuned = [" ".join(w for w in r.split() if noise.random() < 0.7 + better) for r in references]
    theirs = PairedTest(
        [("base", base), ("tuned", tuned)], {"BLEU": sacrebleu.BLEU()}, [references], test_type="ar", n_samples=4000
    )()[1]["BLEU"]
    p = theirs[1].p_value
    data = frame(80).assign(reference=references, base_answer=base, tuned_answer=tuned)
    spec = next(m for m in arciva.METRICS if m.name == "bleu")
    ours = arciva.compare(data, spec, arciva.resample(80, 7, 4000))
    assert ours["tuned"]["value"] == pytest.approx(theirs[1].score)
    # Two estimates from 4,000 draws each: four standard errors of their difference, and the one that is always added.
    assert ours["paired"]["p_value"] == pytest.approx(p, abs=4 * (2 * p * (1 - p) / 4000) ** 0.5 + 1 / 4000)


def test_the_report_says_what_it_holds():
    report = arciva.build_report(frame().assign(language=["en", "de", "en", "de"] * 10), arciva.Config())
    assert report["schema_version"] == 2 and json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["by"]) == {"language", "topic", "kind", "style"} and set(report["by"]["language"]) == {"de", "en"}
    english = report["by"]["language"]["en"]
    assert sum(g["questions"] for g in english.values()) == 20 and set(english) <= {"rephrased", "unseen"}
    value = english["unseen"]["rouge_l"]["tuned"]
    assert value["low"] < value["value"] < value["high"]
    table = arciva.report_table(report)
    assert set(table.index.get_level_values("metric")) == {spec.name for spec in arciva.METRICS}
    words = table.xs("answer_words", level="metric")
    assert (words["p"] == "").all() and words["tuned"].str.contains(r"\[").all()
    slices = arciva.slice_table(report, "language", ("rouge_l", "bits_per_byte"))
    assert len(slices) == 2 * sum(len(v) for v in report["by"]["language"].values())
    # A slice of so few families that nothing could be shown is left out, and no slice is an empty table.
    families = english["unseen"]["clusters"]
    assert "en/unseen" in arciva.slice_table(report, "language", least=families).index.get_level_values("group")
    assert "en/unseen" not in arciva.slice_table(report, "language", least=families + 1).index.get_level_values("group")
    assert arciva.slice_table(report, "language", least=1_000).empty


def test_a_question_is_won_by_the_orders_that_it_has():
    """Of two-word answers corpus BLEU makes all zeros, which would be ties."""
    data = frame(4).assign(reference="press start", base_answer="press stop", tuned_answer="press start")
    assert arciva.score_group(data, seed=0)["bleu"]["paired"]["won"] == 1.0


def saved(folder: Path, predictions: pd.DataFrame, **settings) -> arciva.Config:
    """A configuration whose reports hold the evaluation of `predictions`."""
    config = arciva.Config(reports_dir=str(folder), **settings)
    arciva.save_predictions(predictions, arciva.build_report(predictions, config), config.reports_dir)
    return config


def weakened(predictions: pd.DataFrame) -> pd.DataFrame:
    """The same evaluation by a model that forgets the second half of every answer."""
    return predictions.assign(
        tuned_answer=[a[: len(a) // 2] for a in predictions["tuned_answer"]], tuned_nll=predictions["tuned_nll"] * 1.5
    )


def test_thresholds_accept_and_refuse(tmp_path):
    config = saved(tmp_path, frame())
    reached = arciva.load_report(str(tmp_path))["groups"]["test/rephrased"]
    assert arciva.shortfalls(config) == []
    for name in ("bleu", "rouge_l", "exact_match"):
        value = reached[name]["tuned"]["value"]
        assert arciva.shortfalls(replace(config, **{f"min_{name}": value})) == []
        (sentence,) = arciva.shortfalls(replace(config, **{f"min_{name}": value + 0.01}))
        assert sentence.startswith(f"{name} is ")
    worse = saved(tmp_path / "swapped", swapped(frame()), min_won=0.5)
    assert arciva.shortfalls(replace(config, min_won=0.5)) == [] and "won is" in arciva.shortfalls(worse)[0]
    with pytest.raises(arciva.ArcivaError, match="no suite results"):
        arciva.shortfalls(replace(config, min_checklists=0.5))


def test_falling_behind_an_accepted_model_is_refused_and_chance_is_not(tmp_path):
    accepted = saved(tmp_path / "accepted", frame())
    same = saved(tmp_path / "same", frame(), compare_to=accepted.reports_dir)
    worse = saved(tmp_path / "worse", weakened(frame()), compare_to=str(tmp_path / "accepted" / "metrics.json"))
    assert arciva.shortfalls(same) == []
    assert {s.split()[0] for s in arciva.shortfalls(worse)} >= {"perplexity", "bits_per_byte", "bleu", "rouge_l"}
    assert arciva.shortfalls(replace(accepted, compare_to=worse.reports_dir)) == []
    few = saved(tmp_path / "few", frame().head(10))
    with pytest.raises(arciva.ArcivaError, match="expected 20 or more"):
        arciva.shortfalls(replace(same, compare_to=few.reports_dir))


def test_falling_behind_on_unseen_questions_alone_is_refused(tmp_path):
    accepted = saved(tmp_path / "accepted", frame())
    part = frame()
    part = part.where(part["novelty"] == "rephrased", weakened(part))
    worse = saved(tmp_path / "worse", part, compare_to=accepted.reports_dir)
    assert arciva.shortfalls(worse) and all("test/unseen" in s for s in arciva.shortfalls(worse))


def swapped(predictions: pd.DataFrame) -> pd.DataFrame:
    """Base and tuned in each other's place."""
    return predictions.rename(
        columns=lambda c: c.replace("base_", "x_").replace("tuned_", "base_").replace("x_", "tuned_")
    )


def suite_results(passed: float, count: int = 40) -> pd.DataFrame:
    """A suite of which the first items are passed."""
    return pd.DataFrame(
        {
            "id": [f"i{n}" for n in range(count)],
            "family": [f"i{n}" for n in range(count)],
            "prompt": [f"p{n}" for n in range(count)],
            "suite": ["checklists" if n % 2 else "probes" for n in range(count)],
            "capability": "export",
            "type": ["minimum" if n % 2 else "twin" if n % 4 else "absent" for n in range(count)],
            "answer": "a",
            "held_out": False,
            "same_as": None,
            "variant": None,
            "flipped": None,
            "unsupported": 0,
            "passed": [n < passed * count for n in range(count)],
        }
    )


def test_falling_behind_on_suites_is_refused(tmp_path):
    accepted, worse = saved(tmp_path / "accepted", frame()), saved(tmp_path / "worse", frame())
    worse = replace(worse, compare_to=accepted.reports_dir)
    good, bad = suite_results(1.0), suite_results(0.0)
    arciva.save_suites({"base": bad, "tuned": good}, accepted.reports_dir)
    with pytest.raises(arciva.ArcivaError, match="no suite results"):
        arciva.shortfalls(worse)
    arciva.save_suites({"base": bad, "tuned": bad}, worse.reports_dir)
    assert [s.split()[0] for s in arciva.shortfalls(worse)] == ["checklists", "probes"]
    assert "went from 100.0% to 0.0% passed" in arciva.shortfalls(worse)[0]
    # Three items lost of forty are within chance.
    arciva.save_suites({"base": bad, "tuned": suite_results(0.93)}, worse.reports_dir)
    assert arciva.shortfalls(worse) == []
    # An item that says something else today is another item.
    other = bad.assign(prompt="changed")
    arciva.save_suites({"base": other, "tuned": other}, worse.reports_dir)
    with pytest.raises(arciva.ArcivaError, match="share no suite items"):
        arciva.shortfalls(worse)


def test_a_model_worse_than_its_base_is_refused(tmp_path):
    better = saved(tmp_path / "better", frame(), not_worse_than_base=True)
    assert arciva.shortfalls(better) == []
    worse = saved(tmp_path / "worse", swapped(frame()), not_worse_than_base=True)
    found = arciva.shortfalls(worse)
    assert {s.split()[0] for s in found} == {s.name for s in arciva.METRICS if s.better != "neither"}
    assert all(s.endswith("against its base") for s in found)
    assert arciva.shortfalls(replace(worse, not_worse_than_base=False)) == []
    arciva.save_suites({"base": suite_results(1.0), "tuned": suite_results(0.0)}, better.reports_dir)
    assert [s.split()[0] for s in arciva.shortfalls(better)] == ["checklists", "probes"]


def test_the_sign_test_is_exact():
    assert arciva.sign_test(0, 0) == 1.0 and arciva.sign_test(1, 0) == 1.0
    assert arciva.sign_test(0, 6) == pytest.approx(2 / 64) and arciva.sign_test(6, 0) == arciva.sign_test(0, 6)
    assert arciva.sign_test(1, 7) == pytest.approx(2 * 9 / 256) and arciva.sign_test(4, 4) == 1.0


def test_a_report_of_another_version_is_named(tmp_path):
    saved(tmp_path, frame())
    old = arciva.load_report(str(tmp_path)) | {"schema_version": 1}
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    with pytest.raises(arciva.ArcivaError, match="expected schema version 2"):
        arciva.load_report(str(tmp_path))
    assert arciva.load_report(str(tmp_path), missing_ok=True) is None


def test_a_report_on_another_adapter_accepts_nothing(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"yesterday's")
    config = saved(tmp_path / "reports", frame(), output_dir=str(adapter), min_rouge_l=0.0)
    assert arciva.shortfalls(config) == [] and arciva.report_of_adapter(config)["adapter"]
    (adapter / "adapter_model.safetensors").write_bytes(b"today's")
    with pytest.raises(arciva.ArcivaError, match="judges another adapter"):
        arciva.shortfalls(config)
    assert arciva.report_of_adapter(config, missing_ok=True) is None
    with pytest.raises(arciva.ArcivaError, match="judges another adapter"):
        arciva.run_pipeline(config, ["dashboard"])
    (adapter / "adapter_model.safetensors").unlink()  # reports alone can be shown
    assert arciva.report_of_adapter(config)


def test_an_evaluation_leaves_no_suite_results_of_an_earlier_model(tmp_path):
    (tmp_path / "suites_tuned.jsonl").write_text("{}")
    saved(tmp_path, frame())
    assert not list(tmp_path.glob("suites*"))


def test_an_acceptance_that_cannot_be_decided_is_refused_before_training(tmp_path, monkeypatch):
    accepted = saved(tmp_path / "accepted", frame())
    arciva.check_acceptance(replace(accepted, reports_dir=str(tmp_path / "new"), compare_to=accepted.reports_dir))
    for compare_to, words in (
        (accepted.reports_dir, "own"),
        (str(tmp_path / "misspelt"), "expected the reports folder"),
    ):
        with pytest.raises(arciva.ArcivaError, match=words):
            arciva.check_acceptance(replace(accepted, compare_to=compare_to))
    monkeypatch.setattr(arciva, "suite_files", list)
    with pytest.raises(arciva.ArcivaError, match="no suites"):
        arciva.check_acceptance(replace(accepted, min_checklists=0.5))


def test_what_an_answer_recites_is_judged_by_the_facts_behind_it():
    turns = [("full", "Press X.", ["a"]), ("short", "X does it.", ["a", "b"]), ("other", "Press Y.", ["c"])]
    examples = [
        arciva.Example(
            id=name, messages=[{"role": "user", "content": name}, {"role": "assistant", "content": answer}],
            language="en", topic="t", kind="k", style="s", fact_ids=facts, extra="{}",
        )
        for name, answer, facts in turns
    ]  # fmt: skip
    answers = ["press x", "X does it.", "Press Y.", "Press Z.", ""]
    asked = pd.DataFrame({"tuned_answer": answers, "fact_ids": [["b"], ["b"], ["b"], ["b"], ["b"]]})
    expected = ["another fact", "right fact", "another fact", "neither", "neither"]
    assert arciva.recited(asked, examples).tolist() == expected


def test_predictions_survive_the_disk(tmp_path):
    texts = ["5", "0012", "</script>", "Größe\n2. weiter"]
    data = frame(4).assign(tuned_answer=texts, id=["1", "0012", "2026-01-02", "1e3"], topic="7", family=["01"] * 4)
    arciva.save_predictions(data, arciva.build_report(frame(), arciva.Config()), str(tmp_path))
    pd.testing.assert_frame_equal(arciva.load_predictions(str(tmp_path)), data, check_dtype=False)
    with pytest.raises(arciva.ArcivaError, match="evaluate stage"):
        arciva.load_predictions(str(tmp_path / "none"))


def test_an_evaluation_leaves_nothing_of_an_earlier_model_beside_it(tmp_path):
    for name in ("suites.json", "suites_tuned.jsonl", "dashboard.html", "dashboard.csv"):
        (tmp_path / name).write_text("of an earlier model")
    arciva.save_predictions(frame(4), arciva.build_report(frame(), arciva.Config()), str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.jsonl", "metrics.json", "metrics.csv"}


def test_best_and_worst_are_ordered_by_the_metric():
    rated = arciva.rate_generations(frame())
    picked = arciva.best_and_worst(rated, "tuned_rouge_l", count=3)
    for _, group in picked.groupby(["split", "novelty"]):
        assert (
            group[group["rank"] == "best"]["tuned_rouge_l"].min()
            >= group[group["rank"] == "worst"]["tuned_rouge_l"].max()
        )
    worst_perplexity = arciva.best_and_worst(rated, "tuned_perplexity", count=1).query("rank == 'worst'")[
        "tuned_perplexity"
    ]
    assert worst_perplexity.max() == rated["tuned_perplexity"].max()
    assert sacrebleu.__version__ in arciva.build_report(frame(), arciva.Config())["signatures"]["bleu"]


def test_model_output_is_escaped_in_the_notebooks_table():
    shown = arciva.styled_table(frame(2).assign(tuned_answer="<img src=x onerror=alert(1)>")).data
    assert "<img" not in shown and "&lt;img" in shown


def test_training_rows_enter_no_held_out_figure():
    data = pd.concat([frame(), frame().assign(split="train", novelty="train")])
    assert all("train" not in group for group in arciva.build_report(data, arciva.Config())["groups"])


def test_predicting_generates_for_base_and_tuned(tiny_config, cpu):
    config = replace(tiny_config, epochs=4, max_eval_rows=6)
    tokenizer = arciva.load_tokenizer(config.base_model)
    splits, _ = arciva.split_examples(arciva.load_examples(config.data)[0], config.seed)
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    before = arciva.predict(model, tokenizer, splits, config, cpu)
    # An adapter starts as zero: base and tuned must agree to the last digit.
    assert before["base_answer"].tolist() == before["tuned_answer"].tolist()
    assert np.array_equal(before["base_nll"], before["tuned_nll"])
    arciva.train_adapter(model, tokenizer, splits, config, cpu)
    after = arciva.predict(model, tokenizer, splits, config, cpu)
    assert np.allclose(after["base_nll"], before["base_nll"])
    assert after["tuned_nll"].sum() < after["base_nll"].sum()
    assert set(after["split"]) == {"train", "validation", "test"}
    # One made-up fact a row: its family is the fact that its id names.
    assert after["family"].tolist() == [i.split("/")[0] for i in after["id"]]
