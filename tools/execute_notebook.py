"""Run the notebook top to bottom, keep its outputs, stamp them with a hash of the code, and export the module.

    python tools/execute_notebook.py

The stamps (`metadata.executed_code`, `metadata.executed_input`) let a test notice when the code, or the corpus, suites and base that
it reads, are no longer those of the committed outputs. The dashboard's page, larger than all the rest, is replaced by a picture of
its upper part, taken with a Chromium or Chrome where there is one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "arciva_assistant_poc.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STAND_IN = "The dashboard: run this cell to have it here, or open reports/dashboard.html."


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Twelve hex digits that change with any code cell."""
    source = "\x1f".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def input_hash() -> str:
    """Twelve hex digits that change with what the run reads: corpus, suites, knowledge, nano base and the dashboard's template."""
    digest = hashlib.sha256()
    read = ("arciva_qa_synthetic.jsonl", "suites/*.jsonl", "knowledge/*.yaml", "nano_base/*")
    for pattern in (*(f"data/{name}" for name in read), "tools/dashboard_template.html"):
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel whose working directory is `folder`."""
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def picture(page: str) -> str | None:
    """The upper part of a page as a base64 PNG of 256 colours; None, and a line that says so, without a browser."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print("no Chromium or Chrome here: the committed notebook has no picture of the dashboard")
        return None
    with tempfile.TemporaryDirectory() as folder:
        file, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        file.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,1500", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, file.as_uri()], check=True, capture_output=True, timeout=120)
        few_colours, buffer = Image.open(shot).convert("RGB").quantize(256), io.BytesIO()
    few_colours.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def without_page(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output itself, or a picture and a sentence where it holds the dashboard's page, which GitHub would not show."""
    page = re.search("srcdoc='(.*?)'", "".join(output.get("data", {}).get("text/html", "")), re.DOTALL)
    if not page:
        return output
    shot = picture(html.unescape(page[1]))
    data = {"text/plain": STAND_IN} | ({"image/png": shot} if shot else {})
    return nbformat.v4.new_output(output.output_type, data, execution_count=output.get("execution_count"))


def strip_noise(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run without telling a reader anything, and widget state, which GitHub refuses."""
    notebook.metadata.pop("widgets", None)
    number = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        skipped = "skip-execution" in cell.metadata.get("tags", [])
        number += not skipped
        cell.execution_count = None if skipped else number
        # Widgets need a live kernel; what libraries write to stderr (bars, deprecations) names this machine's folders.
        cell.outputs = [
            without_page(o)
            for o in cell.outputs
            if "application/vnd.jupyter.widget-view+json" not in o.get("data", {}) and o.get("name") != "stderr"
        ]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def main() -> int:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    started = time.perf_counter()
    execute(notebook, ROOT)
    strip_noise(notebook)
    notebook.metadata |= {"executed_code": code_hash(notebook), "executed_input": input_hash()}
    nbformat.write(notebook, NOTEBOOK)
    jupytext.write(jupytext.read(NOTEBOOK), NOTEBOOK.with_suffix(".py"), fmt="py:percent")
    print(f"executed in {time.perf_counter() - started:.0f} s, {NOTEBOOK.stat().st_size / 1024:,.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
