"""The notebook as a document and as a program. Run: pytest tests/test_notebook.py"""

import ast
import copy
import json
import re

import execute_notebook
import jupytext
import nbformat
import pytest
from conftest import ROOT

NOTEBOOK, SCRIPT = ROOT / "arciva_assistant_poc.ipynb", ROOT / "arciva_assistant_poc.py"
SECTIONS = [
    "Environment Configuration",
    "Library Imports & Global Configuration",
    "Data Ingestion & Splits",
    "QLoRA Fine-Tuning",
    "Metrics",
    "Evaluation Suites",
    "Interactive Dashboard",
    "fp16 Merge & Artifacts",
]


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cells(document):
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in document.cells]


def test_the_script_is_the_notebook():
    assert cells(jupytext.read(NOTEBOOK)) == cells(jupytext.read(SCRIPT))


def test_the_eight_sections_stand_in_order(notebook):
    headings = [
        h for c in notebook.cells if c.cell_type == "markdown" for h in re.findall(r"(?m)^## \d\. (.+)$", c.source)
    ]
    assert headings == SECTIONS


def test_the_committed_outputs_belong_to_the_committed_code_and_data(notebook):
    assert notebook.metadata["executed_code"] == execute_notebook.code_hash(notebook)
    assert notebook.metadata["executed_input"] == execute_notebook.input_hash()
    ran = [c for c in notebook.cells if c.cell_type == "code" and "skip-execution" not in c.metadata.get("tags", [])]
    assert [c.execution_count for c in ran] == list(range(1, len(ran) + 1))
    assert not [o for c in ran for o in c.outputs if o.output_type == "error"]


def test_the_committed_notebook_is_small_and_free_of_widget_state(notebook):
    assert NOTEBOOK.stat().st_size < 1.5 * 2**20
    assert "widgets" not in notebook.metadata


def names_of(tree, *, called=False) -> set[str]:
    """Names that code reads; with `called`, outside of the functions and classes that it defines."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        inner = called and isinstance(node, ast.FunctionDef | ast.ClassDef)
        nodes += node.decorator_list if inner else ast.iter_child_nodes(node)
    return found


def test_a_cell_uses_only_what_stands_above_it(notebook):
    """Also by way of the functions it calls: the module, in which all exist, would not show that."""
    code = [c for c in notebook.cells if c.cell_type == "code" and "skip-execution" not in c.metadata.get("tags", [])]
    trees = [ast.parse(re.sub(r"(?m)^\s*%.*$", "", cell.source)) for cell in code]
    definitions = {n.name: n for t in trees for n in t.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    uses = {name: names_of(node) & set(definitions) for name, node in definitions.items()}
    defined = set()
    for cell, tree in zip(code, trees, strict=True):
        defined |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        if "active-ipynb" in cell.metadata.get("tags", []):
            needed, new = set(), names_of(tree, called=True) & set(definitions)
            while new:
                needed |= new
                new = {other for name in new for other in uses[name]} - needed
            assert needed <= defined, (sorted(needed - defined), cell.source[:80])


def test_magics_stand_only_in_run_cells(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and "active-ipynb" not in cell.metadata.get("tags", []):
            assert not re.search(r"(?m)^\s*[%!]", cell.source), cell.source[:80]


def test_no_cell_speaks_of_a_machine(notebook):
    assert not re.search(r"/(work|root|home|tmp)/", json.dumps(notebook.cells))


def test_it_runs_top_to_bottom_twice_in_a_row(notebook, tmp_path, monkeypatch):
    """Restart-and-run-all from a fresh state, offline, and again from what the first run left."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):  # whatever asks for the network finds nobody
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = (ROOT / "data" / "arciva_qa_synthetic.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:300]), encoding="utf-8")
    (tmp_path / "data" / "suites").mkdir(parents=True)
    (tmp_path / "data" / "nano_base").symlink_to(ROOT / "data" / "nano_base")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    suite = (ROOT / "data" / "suites" / "probes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    runs = []
    for turn in range(2):
        if turn:  # the first run has no suites and must say so
            (tmp_path / "data" / "suites" / "probes.jsonl").write_text("".join(suite[:12]), encoding="utf-8")
        run = copy.deepcopy(notebook)
        at = next(i for i, c in enumerate(run.cells) if "parameters" in c.metadata.get("tags", []))
        run.cells.insert(at + 1, nbformat.v4.new_code_cell('DATA, EPOCHS, BASE_MODEL = "rows.jsonl", 1, "nano"'))
        execute_notebook.execute(run, tmp_path)
        runs.append(run)
        assert not [o for c in run.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
        figures = [o for c in run.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
        assert figures, "the loss curve is missing"
    said = ["no suites in" in json.dumps([c.get("outputs", []) for c in run.cells]) for run in runs]
    assert said == [True, False]
    for made in (
        "model_output/adapter_model.safetensors",
        "final_merged_model/model.safetensors",
        "reports/metrics.json",
        "reports/dashboard.html",
    ):
        assert (tmp_path / made).is_file()
