"""Run the notebook top to bottom, keep its outputs, stamp them with a hash of the code, and export the module.

    python tools/execute_notebook.py

The stamp (`metadata.executed_code`) lets a test notice when code and committed outputs drift apart.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "arciva_assistant_poc.ipynb"


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Twelve hex digits that change with any code cell."""
    source = "\x1f".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel whose working directory is `folder`."""
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


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
            o
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
    notebook.metadata["executed_code"] = code_hash(notebook)
    nbformat.write(notebook, NOTEBOOK)
    jupytext.write(jupytext.read(NOTEBOOK), NOTEBOOK.with_suffix(".py"), fmt="py:percent")
    print(f"executed in {time.perf_counter() - started:.0f} s, {NOTEBOOK.stat().st_size / 1024:,.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
