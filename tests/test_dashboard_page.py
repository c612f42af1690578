"""Run with `pytest tests/test_dashboard_page.py`; needs a Chromium or Chrome on this machine, and skips itself without one.

The page is opened from a file in a real browser, once with ordinary answers and once with hostile ones.
With DASHBOARD_SCREENSHOTS=folder the page of a real run is pictured there: light and dark, wide and as on a phone.
How the page does at 10,000 rows is printed by `pytest tests/test_dashboard_page.py -k ten_thousand`.
"""

import csv
import io
import json
import os
import random
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import execute_notebook
import labeling
import nbformat
import pytest
from conftest import ROOT
from test_labeling import built, knowledge  # noqa: F401

import arciva_assistant_poc as arciva
from arciva_assistant_poc import render_page, script_json

TEMPLATE = (Path(__file__).resolve().parent.parent / "tools" / "dashboard_template.html").read_text(encoding="utf-8")
BROWSERS = (os.environ.get("CHROME"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if name and (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine (set CHROME to one)")

METRICS = [
    {"name": name, "label": label, "better": better, "digits": digits}
    for name, (label, better, digits) in arciva.METRIC_LABELS.items()
]
UNSUPPORTED = {"name": "unsupported", "label": "Unsupported claims", "better": "lower", "digits": 0}
TEXT = "click the export button in your project panel and choose a folder for all of the selected photos"
WORDS = TEXT.split()


def make_row(n: int, rng: random.Random, **fields) -> dict:
    """A question whose tuned answer is mostly right and whose base answer is mostly not."""
    reference = [rng.choice(WORDS) for _ in range(rng.randint(6, 24))]
    garble = lambda share: " ".join(w if rng.random() > share else rng.choice(WORDS) for w in reference)  # noqa: E731
    quality = {"base": rng.random() * 0.4, "tuned": 0.3 + rng.random() * 0.69}
    scores = {
        f"{who}_{name}": value
        for who, q in quality.items()
        for name, value in {
            "rouge_l": q, "chrf": 100 * q, "bleu": 80 * q * q, "exact_match": float(q > 0.9), "perplexity": 1.1 / (q + 0.001),
            "bits_per_byte": 0.3 / (q + 0.001), "cut_off": float(q < 0.1), "answer_words": int(40 * q),
        }.items()
    }  # fmt: skip
    return {
        "id": f"fact-{n}/{('en', 'de')[n % 2]}/{n}",
        "split": ("test", "validation", "train")[n % 3],
        "novelty": ("rephrased", "unseen")[n // 3 % 2],
        "language": ("en", "de")[n % 2],
        "topic": ("export", "import", "search", "culling")[n % 4],
        "kind": ("how-to", "where", "limit")[n % 3],
        "style": ("plain", "terse")[n % 2],
        "question": f"Question {n}: how do I {' '.join(rng.choices(WORDS, k=6))}?",
        "reference": " ".join(reference),
        "base_answer": garble(0.9),
        "tuned_answer": garble(0.3),
        "base_cut": n % 2 == 0,
        "tuned_cut": False,
        **scores,
        **fields,
    }


def make_items(rng: random.Random) -> list[dict]:
    return [
        {
            "id": f"{suite}-{capability}-{kind}-{n}", "suite": suite, "capability": capability, "type": kind, "language": ("en", "de")[n % 2],
            "prompt": f"{kind} of {capability}, item {n}?", "reference": "Click the Export button.", "expect": "deny" if kind == "absent" else "answer",
            "held_out": kind == "absent" and n == 0, "twin": f"{suite}-{capability}-twin-{n}" if kind == "absent" else None,
            "same_as": f"{suite}-{capability}-minimum-{n}" if kind == "invariance" else None, "fact_ids": ["export-start"],
            "base_answer": "No.", "tuned_answer": "Click Export.", "base_passed": rng.random() < 0.2, "tuned_passed": rng.random() < 0.7,
            "base_reasons": "lacks button", "tuned_reasons": "does not say that it is not there", "base_unsupported": 0, "tuned_unsupported": n,
            "tuned_unsupported_claims": ["Send now", "42"][:n],
        }
        for suite, kinds in (("checklists", ("minimum", "invariance", "directional")), ("probes", ("absent", "twin")))
        for capability in ("tagging", "search", "export")
        for kind in kinds
        for n in range(3)
    ]  # fmt: skip


SUMMARY_GROUPS = (
    ("split", "test/rephrased", 0.001), ("split", "test/unseen", 0.4), ("split", "validation/rephrased", 0.001), ("split", "validation/unseen", None),
    ("language", "de, rephrased", 0.01), ("language", "en, rephrased", 0.2), ("language", "de, unseen", None), ("language", "en, unseen", 0.3),
)  # fmt: skip
FIGURES = {
    name: {who: {"value": v, "low": v - 0.05, "high": v + 0.05} for who, v in (("base", base), ("tuned", tuned))}
    | {"paired": {"difference": {"value": tuned - base, "low": -1, "high": 1}, "p_value": p}}
    for name, base, tuned, p in (
        ("checklists", 0.1, 0.6, 0.001), ("false_answer", 0.9, 0.4, 0.001), ("false_answer_held_out", 0.9, 0.5, 0.2), ("false_refusal", 0.2, 0.4, 0.01),
        ("balanced_accuracy", 0.45, 0.6, 0.04), ("unsupported_per_answer", 1.5, 0.7, 0.001),
    )
}  # fmt: skip


def make_data(rows: int = 60, *, suites: bool = True, seed: int = 0, extra: tuple[dict, ...] = ()) -> dict:
    rng = random.Random(seed)
    figure = lambda value: {"value": value, "low": value * 0.9, "high": value * 1.1}  # noqa: E731
    summary = [
        {
            "by": by, "group": group, "questions": 65, "metric": m["name"], "base": figure(base), "tuned": figure(tuned),
            "paired": {"won": 0.62, "tied": 0.3, "lost": 0.08, "p_value": p},
        }
        for by, group, p in SUMMARY_GROUPS
        for m in METRICS
        for base, tuned in [(90.0, 1.4) if m["name"] == "perplexity" else (0.1, 0.7) if m["name"] in ("rouge_l", "exact_match") else (10.0, 60.0)]
    ]  # fmt: skip
    return {
        "title": "Arciva assistant: answers", "generated": "2026-01-31 12:00 UTC", "note": "nano proves the pipeline, not the assistant",
        "adapter": "0123456789abcdef", "summary": summary, "metrics": [*METRICS, UNSUPPORTED] if suites else METRICS,
        "suites": {"figures": FIGURES, "items": make_items(rng)} if suites else None,
        "rows": [make_row(n, rng) for n in range(rows - len(extra))] + list(extra),
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page of `data`; when the test ends, fails on any console error, exception, dialog or network request."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    trouble = []

    def opener(data: dict, hash: str = ""):
        path = tmp_path / "dashboard.html"
        path.write_text(render_page(data, TEMPLATE), encoding="utf-8")
        page = context.new_page()
        page.on(
            "console",
            lambda m: trouble.append(f"console {m.type}: {m.text}") if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: trouble.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        local = ("file:", "data:", "blob:")
        page.on("request", lambda r: trouble.append(f"request: {r.url}") if not r.url.startswith(local) else None)
        page.goto(path.as_uri() + hash)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield opener
    context.close()
    assert trouble == []


def shown_ids(page) -> list[str]:
    return page.eval_on_selector_all("#rows tr.row", "rows => rows.map((r) => r.dataset.id)")


def wait_for_count(page, count: int) -> None:
    page.wait_for_function("n => document.getElementById('count').textContent.startsWith(n + ' of ')", arg=str(count))


def fetch(page, button: str) -> str:
    with page.expect_download() as waiting:
        page.click(button)
    return Path(waiting.value.path()).read_bytes().decode("utf-8")


# ── Rendering: no browser needed
def test_data_cannot_leave_its_script_element():
    text = script_json({"a": "</script><!--<script>&\u2028\u2029\ud800", "nan": float("nan"), "inf": float("inf")})
    assert not re.search("[<>&\u2028\u2029]", text) and text.isascii()
    assert json.loads(text) == {"a": "</script><!--<script>&\u2028\u2029\ud800", "nan": None, "inf": None}


def test_placeholders_within_the_data_are_not_filled_in():
    page = render_page({**make_data(1), "title": "/*ARCIVA_DATA*/ <!--ARCIVA_TABLE--> <b>"}, TEMPLATE)
    assert "<title>/*ARCIVA_DATA*/ &lt;!--ARCIVA_TABLE--&gt; &lt;b&gt;</title>" in page


def test_table_for_readers_without_scripts_is_escaped_and_short():
    hostile = make_row(0, random.Random(0), id="</noscript><script>alert(1)</script>", question="x" * 100_000)
    page = render_page(make_data(400, extra=(hostile,)) | {"rows": [hostile] * 400}, TEMPLATE)
    table = page.split("<noscript>")[1].split("</noscript>")[0]
    assert "<script" not in table and "&lt;/noscript&gt;" in table
    assert table.count("<tr>") == 1 + 4 * len(METRICS) + 1 + 300  # both heads, 4 groups with all metrics, 300 answers
    assert "x" * 201 not in table


# ── An ordinary page
@needs_browser
def test_sorts_by_any_metric_of_base_tuned_or_their_difference(open_page):
    def value(row: dict, metric: str, who: str) -> float:
        return row[f"tuned_{metric}"] - row[f"base_{metric}"] if who == "difference" else row[f"{who}_{metric}"]

    data = make_data(60, suites=False)
    page = open_page(data)
    page.select_option("#size", "100")
    for metric in METRICS:
        sign = -1 if metric["better"] == "lower" else 1
        for who in ("base", "tuned", "difference"):
            for order in ("worst", "best"):
                page.select_option("#sort-by", metric["name"])
                page.select_option("#sort-who", who)
                page.select_option("#sort-worst", order)
                direction = sign if order == "worst" else -sign
                expected = sorted(
                    data["rows"], key=lambda r, k=(metric["name"], who, direction): k[2] * value(r, *k[:2])
                )
                assert shown_ids(page) == [r["id"] for r in expected], (metric["name"], who, order)


@needs_browser
def test_column_heads_sort_and_say_so(open_page):
    page = open_page(make_data(suites=False))
    head = page.locator("#head th", has_text="ROUGE-L tuned")
    assert head.get_attribute("aria-sort") == "ascending"  # worst first
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.evaluate("document.activeElement.textContent") == "ROUGE-L tuned"  # focus stays through the redraw
    page.locator("#head button", has_text="Difference").click()
    assert page.locator("[aria-sort]").count() == 1 and page.input_value("#sort-who") == "difference"


@needs_browser
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "test"),
        ("novelty", "unseen"),
        ("language", "de"),
        ("topic", "culling"),
        ("kind", "limit"),
        ("style", "terse"),
    ],
)
def test_filters_questions(open_page, field, value):
    data = make_data(60, suites=False)
    page = open_page(data)
    page.select_option("#size", "100")
    page.locator(f"#filter-{field}").select_option(value)
    assert sorted(shown_ids(page)) == sorted(r["id"] for r in data["rows"] if r[field] == value)
    page.click("#reset")
    wait_for_count(page, 60)


@needs_browser
def test_filters_suite_items_by_suite_outcome_and_matrix_cell(open_page):
    data = make_data()
    items = data["suites"]["items"]
    items[0] |= {"base_passed": True, "tuned_passed": False}
    page = open_page(data)
    page.select_option("#size", "100")
    page.locator("#filter-suite").select_option("probes")
    assert sorted(shown_ids(page)) == sorted(i["id"] for i in items if i["suite"] == "probes")
    page.locator("#filter-outcomes").select_option("tuned failed")
    assert sorted(shown_ids(page)) == sorted(i["id"] for i in items if i["suite"] == "probes" and not i["tuned_passed"])
    page.locator(".matrix tr", has=page.locator("th", has_text="tagging")).first.locator("button").first.click()
    assert page.input_value("#filter-topic") == "tagging" and page.input_value("#filter-suite") == "checklists"
    assert {i.split("-")[1] for i in shown_ids(page)} == {"tagging"} and len(shown_ids(page)) == 3
    page.click("#reset")
    page.locator("#filter-outcomes").select_option("lost: base passed, tuned failed")
    assert sorted(shown_ids(page)) == sorted(i["id"] for i in items if i["base_passed"] and not i["tuned_passed"])


@needs_browser
def test_search_needs_all_words_in_any_field_and_ignores_case(open_page):
    special = make_row(
        999, random.Random(0), question="Where is GRÖSSE shown?", tuned_answer="Im Panel Übersicht, below zebra."
    )
    page = open_page(make_data(extra=(special,)))
    page.fill("#search", "größe zebra")  # "ß" is not "SS": nothing
    wait_for_count(page, 0)
    page.fill("#search", "grösse  ZEBRA")
    wait_for_count(page, 1)
    assert shown_ids(page) == [special["id"]]
    assert "No answer matches" not in page.inner_text("#rows")


@needs_browser
def test_permalink_opens_and_shows_the_row(open_page):
    data = make_data(60)
    wanted = sorted(data["rows"], key=lambda r: -r["tuned_rouge_l"])[
        0
    ]  # worst first: on the last page of the questions
    page = open_page(data, "#row=" + wanted["id"].replace("/", "%2F"))
    detail = page.locator("#rows tr.detail")
    assert detail.count() == 1 and wanted["reference"] in detail.inner_text()
    assert page.locator("#rows tr.open").get_attribute("data-id") == wanted["id"]
    page.locator("#rows tr.open").wait_for(state="visible")
    assert page.evaluate("document.querySelector('#rows tr.open').getBoundingClientRect().top") < 900
    other = next(r for r in data["rows"] if r["split"] == "test")
    page.locator("#filter-split").select_option("train")  # hides the next target: following a link clears the filters
    page.evaluate("hash => { location.hash = hash }", "row=" + other["id"])
    page.wait_for_function(
        "id => [...document.querySelectorAll('#rows tr.open')].some((r) => r.dataset.id === id)", arg=other["id"]
    )
    assert page.input_value("#filter-split") == ""


@needs_browser
def test_best_and_worst_lead_to_their_rows(open_page):
    data = make_data(60)
    page = open_page(data)
    page.locator("#extremes-metrics button", has_text="Perplexity").click()
    group = [r for r in data["rows"] if (r["split"], r["novelty"]) == ("test", "unseen")]
    worst = max(group, key=lambda r: r["tuned_perplexity"])
    box = page.locator("#extremes > div", has=page.locator("h3", has_text="test/unseen"))
    assert box.locator("a").first.inner_text() == worst["question"]
    box.locator("a").first.click()
    assert page.locator("#rows tr.open").get_attribute("data-id") == worst["id"]


@needs_browser
def test_suites_show_what_decides_and_lead_from_a_probe_to_its_twin(open_page):
    data = make_data(10)
    page = open_page(data)
    assert re.findall(r"\d+ % → \d+ %", page.inner_text("#tiles"))[:3] == ["10 % → 60 %", "90 % → 40 %", "90 % → 50 %"]
    assert page.locator("#tiles .gain").all_inner_texts() == ["60 %", "40 %", "60 %", "0.70"]
    assert page.locator("#tiles .loss").all_inner_texts() == ["40 %"]  # more false refusals
    page.locator("#filter-suite").select_option("probes")
    page.select_option("#sort-by", "unsupported")
    worst = page.locator("#rows tr.row").first
    item = next(i for i in data["suites"]["items"] if i["id"] == worst.get_attribute("data-id"))
    assert item["tuned_unsupported"] == 2 and item["type"] == "absent"
    worst.locator(".toggle").click()
    detail = page.locator("#rows tr.detail").first
    tuned = detail.locator(".answers > div", has_text="Tuned answer")
    assert tuned.locator("li").all_inner_texts() == [item["tuned_reasons"], "unsupported: Send now", "unsupported: 42"]
    assert "lacks button" in detail.locator(".answers > div", has_text="Base answer").inner_text()
    assert "Should be denied" in detail.inner_text() and item["reference"] in detail.inner_text()
    assert tuned.locator("mark.extra").count() == 0 and detail.locator("mark.missing").all_inner_texts() == ["the", "button."]  # fmt: skip
    detail.locator("a", has_text="Its answerable twin").click()
    assert page.evaluate("document.activeElement.closest('tr').dataset.id") == item["twin"]
    back = page.locator("#rows tr.detail a", has_text="The probe beside it")
    assert back.count() == 1
    page.locator("#filter-novelty").select_option("held-out probe")
    assert sorted(shown_ids(page)) == sorted(i["id"] for i in data["suites"]["items"] if i["held_out"])


@needs_browser
def test_the_summary_is_sliced_and_names_no_winner_without_a_p_value(open_page):
    page = open_page(make_data(10, suites=False))
    table = page.locator("#summary")
    assert table.locator("tbody tr").count() == len(METRICS) and "Better" in table.inner_text()
    page.locator("#summary-groups button", has_text="validation/unseen").click()
    assert "Too few to tell" in table.inner_text() and "p = " not in table.inner_text()
    page.locator("#summary-slices button", has_text="By language").click()
    page.locator("#summary-groups button", has_text="Perplexity").click()
    heads = table.locator("tbody th").all_inner_texts()
    assert [h.split("\n")[0] for h in heads] == ["de, rephrased", "en, rephrased", "de, unseen", "en, unseen"]


@needs_browser
def test_what_is_neither_good_nor_bad_is_not_called_worst(open_page):
    page = open_page(make_data(30, suites=False))
    page.select_option("#sort-by", "answer_words")
    assert page.locator("#sort-worst option").all_inner_texts() == ["Lowest first", "Highest first"]
    page.locator("#extremes-metrics button", has_text="Answer length").click()
    assert "Lowest" in page.inner_text("#extremes") and "Worst" not in page.inner_text("#extremes")


@needs_browser
def test_word_differences_against_the_reference_are_marked(open_page):
    row = make_row(
        0,
        random.Random(0),
        reference="Click Export, then Start.",
        tuned_answer="click the Export then stop",
        base_answer="",
    )
    page = open_page(make_data(1, suites=False, extra=(row,)))
    page.locator(".toggle").click()
    tuned, reference = (
        page.locator(".answers > div", has_text="Tuned answer"),
        page.locator(".answers > div", has_text="Reference"),
    )
    assert tuned.locator("mark.extra").all_inner_texts() == ["the", "stop"]
    assert reference.locator("mark.missing").all_inner_texts() == ["Start."]
    assert "(empty)" in page.locator(".answers > div", has_text="Base answer").inner_text()


@needs_browser
def test_downloads_hold_the_filtered_rows(open_page):
    formula = make_row(
        7, random.Random(0), id="formula", language="en", tuned_answer='=HYPERLINK("http://x")\nüber, "alles"'
    )
    data = make_data(60, suites=False, extra=(formula,))
    page = open_page(data)
    page.locator("#filter-language").select_option("en")
    chosen = {r["id"]: r for r in data["rows"] if r["language"] == "en"}
    lines = [json.loads(x) for x in fetch(page, "#jsonl").splitlines()]
    assert {x["id"]: x for x in lines} == chosen and len(lines) == len(chosen)
    text = fetch(page, "#csv")
    assert text.startswith("\ufeff")  # so that Excel reads UTF-8
    table = {x["id"]: x for x in csv.DictReader(io.StringIO(text[1:], newline=""))}
    assert set(table) == set(chosen) and list(table["formula"]) == list(data["rows"][0])
    assert table["formula"]["tuned_answer"] == "'" + formula["tuned_answer"]  # not run by a spreadsheet
    assert float(table["formula"]["tuned_rouge_l"]) == formula["tuned_rouge_l"]


@needs_browser
def test_labels_export_in_the_labelling_tools_format(open_page):
    data = make_data(3, suites=False)
    page = open_page(data)
    assert page.is_disabled("#labels")
    rows = [next(r for r in data["rows"] if r["id"] == i) for i in shown_ids(page)]
    for n, choice in enumerate(("good", "wrong", "fix")):
        page.locator("#rows tr.row .toggle").nth(n).click()
        page.locator("#rows tr.detail").nth(n).locator(f"[data-choice={choice}]").click()
    assert page.inner_text("#labels") == "Export labels (2)"  # a fix without a correction is none
    page.fill("textarea", "Corrected über.")
    exported = [json.loads(x) for x in fetch(page, "#labels").splitlines()]
    assert {x["row"]: x["review_metadata"]["label"] for x in exported} == dict(
        zip([r["id"] for r in rows], ("✅ Verified", "🗑️ Discarded", "✍️ Modified"), strict=True)
    )
    fixed = next(x for x in exported if x["row"] == rows[2]["id"])
    assert fixed["id"] == f"generation/0123456789abcdef/{rows[2]['id']}" and fixed["source"] == "dashboard"
    assert fixed["generated"] == rows[2]["tuned_answer"] and fixed["split"] == rows[2]["split"]
    assert {k: fixed[k] for k in ("topic", "kind", "style", "reference")} == {k: rows[2][k] for k in ("topic", "kind", "style", "reference")}  # fmt: skip
    assert fixed["messages"] == [
        {"role": "user", "content": rows[2]["question"]},
        {"role": "assistant", "content": "Corrected über."},
    ]
    assert fixed["review_metadata"] | {"timestamp": ""} == {"status": "reviewed", "label": "✍️ Modified", "timestamp": "", "format": "messages"}  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", fixed["review_metadata"]["timestamp"])
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.inner_text("#labels") == "Export labels (3)"  # kept for the next visit
    page.locator("#filter-label").select_option("fix")
    assert shown_ids(page) == [rows[2]["id"]]
    page.close()
    rows[0]["tuned_answer"] = "Another answer."  # the label was given to the one before
    assert open_page(data).inner_text("#labels") == "Export labels (2)"
    assert open_page(data | {"adapter": "fedcba9876543210"}).inner_text("#labels") == "Export labels"


@needs_browser
def test_a_browser_s_labels_come_back_through_the_labelling_tool(open_page, knowledge, tmp_path, capsys):  # noqa: F811
    """What a person judged is a model's answer: only a corrected one of a training row may change the corpus, when asked."""
    before, rng = built(), random.Random(0)
    words = {"tuned_answer": "Press it.", "base_answer": "No."}
    rows = [
        make_row(n, rng, **{k: r[k] for k in labeling.KEPT}, id=r["id"], question=r["instruction"], reference=r["response"], split=split, **words)
        for n, (r, split) in enumerate(zip(before.values(), ("train", "train", "train", "test", "test", "validation"), strict=True))
    ]  # fmt: skip
    data = make_data(0, extra=tuple(rows))
    data["suites"]["items"] = data["suites"]["items"][:1]
    page = open_page(data)
    page.select_option("#sort-by", "order")
    for n, choice in enumerate(("good", "wrong", "fix", "wrong", "fix", "good", "fix")):
        page.locator("#rows tr.row .toggle").nth(n).click()
        detail = page.locator("#rows tr.detail").nth(n)
        detail.locator(f"[data-choice={choice}]").click()
        if choice == "fix":
            detail.locator("textarea").fill('First choose a size, then press "Start export" in the panel.')
    labels, kept = tmp_path / "labels.jsonl", tmp_path / "generations.jsonl"
    labels.write_text(fetch(page, "#labels"), encoding="utf-8")
    assert len(labels.read_text(encoding="utf-8").splitlines()) == 7
    command = ["import", str(labels), "--generations", str(kept)]
    assert labeling.main(command) == 0 and built() == before
    assert "4 of them are of held-out rows or suite items: refused into the corpus" in capsys.readouterr().out
    lines = lambda path: sorted(path.read_text(encoding="utf-8").splitlines(), key=lambda x: json.loads(x)["id"])  # noqa: E731
    assert list(map(json.loads, lines(kept))) == list(map(json.loads, lines(labels)))  # nothing is lost
    assert labeling.main([*command, "--fixes"]) == 0
    assert [i for i in before if built()[i] != before[i]] == [rows[2]["id"]]
    assert "Start export" in built()[rows[2]["id"]]["response"]


@needs_browser
def test_keyboard_alone_is_enough(open_page):
    page = open_page(make_data(60))
    focused = lambda: page.evaluate("document.activeElement.id || document.activeElement.className")  # noqa: E731
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answers"
    page.keyboard.press("/")
    assert focused() == "search"
    page.keyboard.type("/question")  # a slash inside the field is text
    assert page.input_value("#search") == "/question"
    wait_for_count(page, 0)
    page.fill("#search", "")
    wait_for_count(page, 105)
    page.keyboard.press("Tab")
    assert focused() == "filter-split"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # visible focus
    page.locator("#rows .toggle").first.focus()
    ids = shown_ids(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#rows tr.open").get_attribute("data-id") == ids[1]
    assert page.locator("#rows tr.open .toggle").get_attribute("aria-expanded") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.choice") == "good"
    page.keyboard.press("Escape")
    assert page.locator("#rows tr.detail").count() == 0 and focused() == "toggle"
    for _ in range(24):
        page.keyboard.press("ArrowDown")
    assert page.inner_text("#page").startswith("Page 2")  # past the end of the page comes the next
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#page").startswith("Page 1")


@needs_browser
def test_controls_have_names_and_images_have_descriptions(open_page):
    page = open_page(make_data(60))
    page.locator("#rows .toggle").first.click()
    page.locator("[data-choice=fix]").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, textarea, a')].filter((e) =>
            !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("svg:not([aria-hidden]):not([aria-label])").count() == 0
    assert page.get_attribute("#count", "aria-live") == "polite"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_follows_the_colour_scheme(open_page, scheme):
    page = open_page(make_data(60))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#rows .toggle").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")


@needs_browser
def test_works_inside_a_notebooks_frame(browser, tmp_path):
    """A sandboxed frame made of a string has no address and no storage of its own, and reaches nothing around it."""
    quotes = make_row(0, random.Random(0), id="quotes", question="It's \"quoted\" &amp; 'more' & <b>bold</b>")
    data, trouble, path = make_data(30, extra=(quotes,)), [], tmp_path / "dashboard.html"
    path.write_text(render_page(data, TEMPLATE), encoding="utf-8")
    page = browser.new_page(accept_downloads=True)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.set_content("<p>cell</p>" + arciva.show_dashboard(path).data)
    frame = page.frame_locator("iframe")
    frame.locator(".skip").focus()
    page.keyboard.press("Enter")  # following it as a link would leave the page
    frame.locator("#search").fill("quoted bold")
    frame.locator("#count", has_text=re.compile("^1 of")).wait_for()
    assert quotes["question"] in frame.locator("#rows").inner_text()
    with page.expect_download() as waiting:
        frame.locator("#jsonl").click()
    assert json.loads(Path(waiting.value.path()).read_text(encoding="utf-8")) == quotes
    assert page.frames[1].evaluate("(() => { try { return parent.document.title } catch { return 'refused' } })()") == "refused"  # fmt: skip
    frame.locator("#extremes a").first.click()
    frame.locator("#rows tr.detail [data-choice=good]").click()
    assert frame.locator("#labels").inner_text() == "Export labels (1)"
    frame.locator("#rows tr.detail a", has_text="Link to this answer").click()
    assert frame.locator("#rows tr.detail").count() == 1
    page.close()
    assert trouble == []


def test_without_a_page_the_notebook_says_what_is_missing(tmp_path, capsys):
    assert arciva.show_dashboard(tmp_path / "dashboard.html") is None
    assert "needs the repository's template" in capsys.readouterr().out


@pytest.mark.parametrize("browser_found", [True, False])
def test_the_committed_notebook_shows_a_picture_instead_of_the_page(tmp_path, monkeypatch, browser_found):
    if browser_found and BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine")
    monkeypatch.setattr(execute_notebook, "BROWSERS", (BROWSER,) if browser_found else ())
    path = tmp_path / "dashboard.html"
    path.write_text(render_page(make_data(300), TEMPLATE), encoding="utf-8")
    cell = nbformat.v4.new_code_cell("show_dashboard(path)")
    cell.outputs = [
        nbformat.v4.new_output(
            "execute_result", {"text/html": arciva.show_dashboard(path).data, "text/plain": "<HTML>"}
        )
    ]
    execute_notebook.strip_noise(notebook := nbformat.v4.new_notebook(cells=[cell]))
    (output,) = notebook.cells[0].outputs
    assert "srcdoc" not in json.dumps(notebook) and "run this cell" in output.data["text/plain"]
    assert ("image/png" in output.data) == browser_found
    assert len(json.dumps(notebook)) < 500_000
    nbformat.validate(notebook)


# ── The quick look in the notebook
FRAME = arciva.pd.DataFrame([make_row(n, random.Random(n), rank="best") for n in range(60)])


def test_colab_gets_its_own_table(monkeypatch):
    shown = []
    colab, tables = types.ModuleType("google.colab"), types.ModuleType("google.colab.data_table")
    tables.DataTable = lambda frame, **settings: ("table", frame, settings)
    colab.data_table = tables
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google.colab.data_table", tables)
    monkeypatch.setattr(arciva, "in_colab", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    arciva.show_table(FRAME)
    assert shown == [("table", FRAME, {"include_index": False, "num_rows_per_page": 10})]


def test_jupyter_gets_widgets_that_say_how_many_rows_they_show(monkeypatch):
    widgets, shown = pytest.importorskip("ipywidgets"), []
    monkeypatch.setattr(arciva, "in_colab", lambda: False)
    monkeypatch.setattr(arciva, "running_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(arciva, "print", lambda words: shown.append(words), raising=False)
    arciva.show_table(FRAME)
    box = shown.pop()
    assert isinstance(box, widgets.VBox) and shown.pop(0) == "25 of 60 matching rows"
    language = next(w for w in box.children[0].children if w.description == "language")
    language.value = "de"
    assert shown[1] == "25 of 30 matching rows" and "<table" in shown[2].data
    search = next(w for w in box.children[1].children if w.description == "search")
    search.value = "Question 7:"
    assert shown[3] == "1 of 1 matching rows" and "Question 7:" in shown[4].data and "Question 9:" not in shown[4].data


def test_elsewhere_the_table_is_a_plain_one(monkeypatch):
    shown = []
    monkeypatch.setattr(arciva, "in_colab", lambda: False)
    monkeypatch.setattr("IPython.display.display", shown.append)
    arciva.show_table(FRAME)
    assert len(shown) == 1 and shown[0] is FRAME


@needs_browser
def test_an_empty_report_is_a_page_too(open_page):
    page = open_page({**make_data(0, suites=False), "summary": [], "metrics": []})
    assert "No answer matches" in page.inner_text("#rows")


@needs_browser
def test_without_scripts_a_plain_table_remains(browser, tmp_path):
    path = tmp_path / "plain.html"
    data = make_data(60)
    path.write_text(render_page(data, TEMPLATE), encoding="utf-8")
    page = browser.new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    assert data["rows"][5]["question"] in page.inner_text("body")
    page.close()


# ── A hostile page, and a large one
HOSTILE = (
    "</script><script>alert('broken out')</script>",
    "<img src=x onerror=alert('img')>",
    "<svg onload=alert(1)><!-- --><style>*{display:none}</style>",
    "safe \u202egnp.exe\u202c \u2066isolate\u2069 zero\u200bwidth \x1b[31m \U000e0041",
    "__proto__",
    "\ud800 lone, and \u2028 a line separator",
    '" onmouseover="alert(1)" x="',
    "javascript:alert(1)",
    "joined a\u200cb\u200dc\u034fd\u115fe\u180ef\u2800g\u3164h\uffa0i\ufe0fj\U000e0101k",
)
HIDDEN = "\u200b\u200c\u200d\u034f\u115f\u180e\u2800\u3164\uffa0\ufe0f\U000e0101\u202a-\u202e\u2066-\u2069"


@needs_browser
def test_hostile_strings_are_shown_not_executed(open_page):
    rng = random.Random(1)
    rows = [
        make_row(n, rng, id=f"{n} {text}", topic=text, kind=text, style=text, question=f"{n}: {text}", reference=text, base_answer=text, tuned_answer=text)
        for n, text in enumerate(HOSTILE)
    ]  # fmt: skip
    data = make_data(len(HOSTILE), extra=tuple(rows))
    data["title"] = data["note"] = data["suites"]["items"][0]["prompt"] = HOSTILE[0]
    data["suites"]["items"][0] |= {
        "suite": HOSTILE[1],
        "capability": HOSTILE[2],
        "type": HOSTILE[3],
        "tuned_reasons": HOSTILE[0],
        "twin": HOSTILE[4],
        "tuned_unsupported_claims": [HOSTILE[1]],
    }
    page = open_page(data)
    page.select_option("#size", "100")
    for n in range(page.locator("#rows tr.row").count()):
        page.locator("#rows tr.row .toggle").nth(n).click()
    text = page.inner_text("body")
    for shown in (HOSTILE[0], HOSTILE[1], "U+202E", "U+2066", "U+200B", "U+001B", "U+E0041", "U+2028"):
        assert shown in text, shown
    assert not re.search(f"[{HIDDEN}]", page.inner_text("main"))
    for shown in re.findall("[^ -~]", HOSTILE[-1]):
        assert f"U+{ord(shown):04X}" in text, shown
    assert page.locator("img, main style, main script").count() == 0
    for index in range(1, len(HOSTILE) + 1):  # every hostile value as a filter
        page.select_option("#filter-topic", index=index)
        assert "No answer matches" not in page.inner_text("#rows")
    page.click("#reset")
    for link in page.locator("#rows tr.detail a", has_text="Link to this answer").all():  # and as a permalink
        link.click()
        found = page.evaluate(
            "byKey.get(decodeURIComponent(location.hash.slice(1))) === rowEntry(document.activeElement.closest('tr'))"
        )
        assert found, page.url
    assert len(fetch(page, "#jsonl").splitlines()) == len(HOSTILE) + 45
    fetch(page, "#csv")


@needs_browser
def test_the_page_s_policy_runs_its_own_script_alone(browser, tmp_path):
    """Even if something of an answer became markup one day."""
    path = tmp_path / "broken.html"
    foreign = "<script>document.title = 'run'</script><img src='data:,' onerror=\"document.title = 'run'\">"
    path.write_text(render_page(make_data(3), TEMPLATE).replace("<main", foreign + "<main"), encoding="utf-8")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_timeout(200)
    assert page.title() == "Arciva assistant: answers" and sum("Content Security Policy" in s for s in said) == 2
    page.close()


@needs_browser
def test_a_megabyte_of_text_stays_folded_until_asked_for(open_page):
    long = "word " * 200_000 + "needle"
    row = make_row(
        0, random.Random(0), id="long", question="x" * 1_000_000, tuned_answer=long, base_answer="y" * 1_000_000
    )
    page = open_page(make_data(10, suites=False, extra=(row,)))
    assert page.evaluate("document.querySelector('#main').textContent.length") < 100_000
    page.fill("#search", "needle")  # the search still sees all of it
    wait_for_count(page, 1)
    page.locator("#rows .toggle").click()
    assert page.evaluate("document.querySelector('#main').textContent.length") < 100_000
    page.locator("button", has_text="Show all 1,000,006 characters").click()
    assert page.evaluate("document.querySelector('#rows').textContent.length") > 1_000_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@needs_browser
def test_ten_thousand_rows_keep_the_document_small(open_page, capsys):
    page = open_page(make_data(10_000))
    ready = int(page.get_attribute("html", "data-ready"))
    painted = "await new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"

    def clock(act: str) -> str:
        return (
            f"async () => {{ const t = performance.now(); {act}; {painted}; return Math.round(performance.now() - t) }}"
        )

    sort = page.evaluate(clock("document.querySelectorAll('#head button')[3].click()"))
    find = page.evaluate(clock("state.terms = ['folder', 'question']; update()"))
    nodes = page.evaluate("document.querySelectorAll('*').length")
    assert page.locator("#rows > tr").count() == 25
    page.select_option("#size", "100")
    page.click("#next")
    assert page.locator("#rows > tr").count() == 100
    with capsys.disabled():
        print(f"\n10,000 answers: ready after {ready} ms, sort {sort} ms, search {find} ms, {nodes:,} nodes")


@pytest.fixture(scope="module")
def real_run(cpu, tmp_path_factory):
    """Predictions, report and suite results of the embedded base, trained for a moment; nothing of its page is made up."""
    folder = tmp_path_factory.mktemp("run")
    rows = (ROOT / "data" / "arciva_qa_synthetic.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:80]), encoding="utf-8")
    config = replace(
        arciva.configure(cpu, base_model=str(ROOT / "data" / "nano_base"))[0],
        data=str(folder / "rows.jsonl"),
        epochs=1,
        evaluations_per_epoch=1,
        pairs_per_step=8,
        max_eval_rows=12,
        max_new_tokens=24,
        **{name: str(folder / name) for name in ("output_dir", "checkpoint_dir", "reports_dir")},
    )
    arciva.seed_everything(config.seed)
    tokenizer = arciva.load_tokenizer(config.base_model)
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    examples, _ = arciva.load_examples(config.data)
    splits, _ = arciva.split_examples(examples, config.seed)
    training = arciva.train_adapter(model, tokenizer, splits, config, cpu)
    arciva.save_adapter(model, tokenizer, training, splits, config)
    predictions = arciva.predict(model, tokenizer, splits, config, cpu)
    report = arciva.build_report(predictions, config)
    items = arciva.load_suites(str(ROOT / "data" / "suites"))
    some = [*items[:10], *[item for item in items if item.suite == "probes"][:10]]
    suites = arciva.run_suites(model, tokenizer, some, arciva.knowledge_vocabulary(examples), config, cpu)
    rated = arciva.write_dashboard(predictions, report, config.reports_dir, suites=suites)
    return config, rated, report, suites


def take_pictures(page, folder: Path) -> None:
    """Top, suites, list and an open answer, in light and dark, wide and as on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, size in {"wide": (1280, 900), "phone": (390, 844)}.items():
            page.set_viewport_size({"width": size[0], "height": size[1]})
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
            for part in ("header", "#suites", "#list", "#rows tr.open"):
                page.evaluate("part => document.querySelector(part).scrollIntoView()", part)
                page.screenshot(path=folder / f"{scheme}-{name}-{re.sub(r'[^a-z]+', '-', part).strip('-')}.png")
    page.set_viewport_size({"width": 1280, "height": 900})


@needs_browser
def test_a_page_of_a_real_run_does_all_that_a_made_up_one_does(open_page, real_run, tmp_path):
    config, rated, report, suites = real_run
    written = Path(config.reports_dir, "dashboard.html").read_text(encoding="utf-8")
    data = arciva.dashboard_data(rated, report, suites)
    assert render_page(data, TEMPLATE) == written
    assert data["adapter"] == arciva.adapter_fingerprint(config.output_dir) is not None
    assert (rated["base_answer"] != rated["tuned_answer"]).any()
    page = open_page(data)
    page.select_option("#size", "100")
    assert sorted(shown_ids(page)) == sorted([*rated["id"], *suites["tuned"]["id"]])
    for name in arciva.METRIC_LABELS:  # each of them is there for each answer
        page.select_option("#sort-by", name)
        page.select_option("#sort-worst", "best")
        scores = rated.set_index("id")[f"tuned_{name}"]
        answered = [i for i in shown_ids(page) if i in scores.index]
        lowest_first = arciva.METRIC_LABELS[name][1] == "lower"
        assert scores[answered].tolist() == sorted(scores, reverse=not lowest_first), name
    row = rated.iloc[5]
    page.fill("#search", row["question"])
    page.wait_for_function("n => state.shown.length < n", arg=len(rated))
    assert row["id"] in shown_ids(page) and row["question"][:30] in page.inner_text("#rows tr.row")
    page.click("#reset")
    page.locator("#filter-split").select_option("test")
    chosen = rated[rated["split"] == "test"]
    assert sorted(shown_ids(page)) == sorted(chosen["id"])
    lines = [json.loads(line) for line in fetch(page, "#jsonl").splitlines()]
    assert {x["id"]: x["tuned_answer"] for x in lines} == dict(zip(chosen["id"], chosen["tuned_answer"], strict=True))
    assert set(next(csv.DictReader(io.StringIO(fetch(page, "#csv")[1:], newline="")))) == set(rated.columns)
    page.keyboard.press("/")
    page.keyboard.type(chosen.iloc[0]["id"])
    wait_for_count(page, 1)
    page.locator("#rows .toggle").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.inner_text("#labels") == "Export labels (1)"
    assert json.loads(fetch(page, "#labels"))["id"] == f"generation/{data['adapter']}/{chosen.iloc[0]['id']}"
    address = page.evaluate("location.hash")
    linked = open_page(data, address)
    assert linked.locator("#rows tr.open").get_attribute("data-id") == chosen.iloc[0]["id"]
    take_pictures(linked, Path(os.environ.get("DASHBOARD_SCREENSHOTS", tmp_path / "pictures")))
