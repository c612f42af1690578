"""Run with `pytest tests/test_dashboard_page.py`; needs a Chromium or Chrome on this machine, and skips itself without one.

The page is opened from a file in a real browser, once with ordinary answers and once with hostile ones.
"""

import csv
import html
import io
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import arciva_assistant_poc as arciva
from arciva_assistant_poc import render_page, script_json

TEMPLATE = (Path(__file__).resolve().parent.parent / "tools" / "dashboard_template.html").read_text(encoding="utf-8")
BROWSERS = (os.environ.get("CHROME"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if name and (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine (set CHROME to one)")

METRICS = [
    {"name": "rouge_l", "label": "ROUGE-L", "better": "higher", "digits": 2},
    {"name": "chrf", "label": "chrF", "better": "higher", "digits": 1},
    {"name": "bleu", "label": "BLEU", "better": "higher", "digits": 1},
    {"name": "exact_match", "label": "Exact match", "better": "higher", "digits": 2},
    {"name": "perplexity", "label": "Perplexity", "better": "lower", "digits": 2},
]
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
            "prompt": f"{kind} of {capability}, item {n}?", "base_answer": "No.", "tuned_answer": "Click Export.",
            "base_passed": rng.random() < 0.2, "tuned_passed": rng.random() < 0.7, "reasons": ["expected the word Export"],
        }
        for suite, kinds in (("checklists", ("minimum functionality", "invariance", "directional")), ("probes", ("absent feature", "answerable twin")))
        for capability in ("tagging", "search", "export")
        for kind in kinds
        for n in range(3)
    ]  # fmt: skip


def make_data(rows: int = 60, *, suites: bool = True, seed: int = 0, extra: tuple[dict, ...] = ()) -> dict:
    rng = random.Random(seed)
    figure = lambda value: {"value": value, "low": value * 0.9, "high": value * 1.1}  # noqa: E731
    summary = [
        {
            "group": group, "questions": 65, "metric": m["name"], "base": figure(base), "tuned": figure(tuned),
            "paired": {"won": 0.62, "tied": 0.3, "lost": 0.08, "p_value": p},
        }
        for group, p in (("test/rephrased", 0.001), ("test/unseen", 0.4), ("validation/rephrased", 0.001), ("validation/unseen", 0.3))
        for m in METRICS
        for base, tuned in [(90.0, 1.4) if m["name"] == "perplexity" else (0.1, 0.7) if m["name"] in ("rouge_l", "exact_match") else (10.0, 60.0)]
    ]  # fmt: skip
    return {
        "title": "Arciva assistant: answers", "generated": "2026-01-31 12:00 UTC", "note": "nano proves the pipeline, not the assistant",
        "summary": summary, "metrics": METRICS, "suites": {"items": make_items(rng)} if suites else None,
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
    assert table.count("<tr>") == 1 + 20 + 1 + 300  # both heads, 4 groups × 5 metrics, and the first 300 answers
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
    assert {x["id"]: x["review_metadata"]["label"] for x in exported} == dict(
        zip([r["id"] for r in rows], ("✅ Verified", "🗑️ Discarded", "✍️ Modified"), strict=True)
    )
    fixed = next(x for x in exported if x["id"] == rows[2]["id"])
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
@pytest.mark.parametrize("sandbox", ["", 'sandbox="allow-scripts allow-downloads"'])
def test_works_inside_a_notebooks_frame(browser, sandbox):
    """srcdoc frames have no address of their own; sandboxed ones have no storage either."""
    data = make_data(30)
    trouble = []
    page = browser.new_page()
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.set_content(
        f'<iframe {sandbox} style="width:100%;height:800px" srcdoc="{html.escape(render_page(data, TEMPLATE))}"></iframe>'
    )
    frame = page.frame_locator("iframe")
    frame.locator("#extremes a").first.click()
    frame.locator("#rows tr.detail [data-choice=good]").click()
    assert frame.locator("#labels").inner_text() == "Export labels (1)"
    frame.locator("#rows tr.detail a", has_text="Link to this answer").click()
    assert frame.locator("#rows tr.detail").count() == 1
    page.close()
    assert trouble == []


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
)


@needs_browser
def test_hostile_strings_are_shown_not_executed(open_page):
    rng = random.Random(1)
    rows = [
        make_row(n, rng, id=f"{n} {text}", topic=text, kind=text, style=text, question=f"{n}: {text}", reference=text, base_answer=text, tuned_answer=text)
        for n, text in enumerate(HOSTILE)
    ]  # fmt: skip
    data = make_data(8, extra=tuple(rows))
    data["title"] = data["note"] = data["suites"]["items"][0]["prompt"] = HOSTILE[0]
    data["suites"]["items"][0] |= {
        "suite": HOSTILE[1],
        "capability": HOSTILE[2],
        "type": HOSTILE[3],
        "reasons": [HOSTILE[0]],
    }
    page = open_page(data)
    page.select_option("#size", "100")
    for n in range(page.locator("#rows tr.row").count()):
        page.locator("#rows tr.row .toggle").nth(n).click()
    text = page.inner_text("body")
    for shown in (HOSTILE[0], HOSTILE[1], "U+202E", "U+2066", "U+200B", "U+001B", "U+E0041", "U+2028"):
        assert shown in text, shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b]", page.inner_text("main"))
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
    assert len(fetch(page, "#jsonl").splitlines()) == 8 + 45
    fetch(page, "#csv")


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


@needs_browser
def test_a_page_of_a_real_run_sorts_searches_and_links(open_page, cpu, tmp_path):
    """The embedded base with a fresh adapter answers held-out questions and suite items; nothing of the page is made up."""
    config = replace(
        arciva.configure(cpu, base_model=str(ROOT / "data" / "nano_base"))[0],
        data=str(ROOT / "data" / "arciva_qa_synthetic.jsonl"),
        max_eval_rows=12,
        max_new_tokens=12,
        reports_dir=str(tmp_path / "reports"),
    )
    tokenizer = arciva.load_tokenizer(config.base_model)
    model = arciva.add_adapter(arciva.load_base_model(config, cpu), config)
    examples, _ = arciva.load_examples(config.data)
    splits, _ = arciva.split_examples(examples, config.seed)
    predictions = arciva.predict(model, tokenizer, splits, config, cpu)
    report = arciva.build_report(predictions, config)
    items = arciva.load_suites(str(ROOT / "data" / "suites"))[:12]
    suites = arciva.run_suites(model, tokenizer, items, arciva.knowledge_vocabulary(examples), config, cpu)
    rated = arciva.write_dashboard(predictions, report, config.reports_dir, suites=suites)
    written = Path(config.reports_dir, "dashboard.html").read_text(encoding="utf-8")
    data = arciva.dashboard_data(rated, report, suites)
    assert render_page(data, TEMPLATE) == written
    page = open_page(data)
    page.select_option("#size", "100")
    assert sorted(shown_ids(page)) == sorted([*predictions["id"], *(item.id for item in items)])
    page.select_option("#sort-by", "rouge_l")
    page.select_option("#sort-who", "tuned")
    page.select_option("#sort-worst", "best")
    scores = rated.set_index("id")["tuned_rouge_l"]
    answered = [i for i in shown_ids(page) if i in scores.index]
    assert scores[answered].tolist() == sorted(scores, reverse=True)
    row = predictions.iloc[5]
    page.fill("#search", row["question"])
    wait_for_count(page, 1)
    assert shown_ids(page) == [row["id"]]
    assert page.inner_text("#rows tr.row").find(row["question"][:30]) >= 0
