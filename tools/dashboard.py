"""One self-contained page from the dashboard's data and its template. The answers in it are never trusted."""

import html
import json
import math
import re
from collections.abc import Sequence

NOSCRIPT_ROWS, NOSCRIPT_TEXT = 300, 200
SHOWN = ("id", "split", "novelty", "language", "question", "reference", "base_answer", "tuned_answer", "tuned_rouge_l")


def plain(value):
    """`value` in JSON's own types: NumPy scalars unpacked, NaN and infinities as null, anything unknown as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def script_json(data: dict) -> str:
    """ASCII JSON that cannot end its script element; non-ASCII, U+2028 and U+2029 too, comes out as \\u escapes."""
    text = json.dumps(plain(data), ensure_ascii=True, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def html_table(caption: str, columns: Sequence[str], rows: list[list]) -> str:
    """An escaped table with shortened cells."""

    def cell(value, tag="td") -> str:
        text = f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
        shown = text if len(text) <= NOSCRIPT_TEXT else text[:NOSCRIPT_TEXT] + " …"
        return f"<{tag}>{html.escape(shown.encode('utf-8', 'replace').decode())}</{tag}>"

    lines = ["".join(cell(c, "th") for c in columns), *("".join(map(cell, row)) for row in rows)]
    return f"<table><caption>{html.escape(caption)}</caption><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def render_page(data: dict, template: str) -> str:
    """The template with its title, its data and, for readers without scripts, two plain tables filled in."""
    rows, columns = data["rows"], ["group", "questions", "metric", "base", "tuned"]
    summary = [[*(x[c] for c in columns[:3]), x["base"]["value"], x["tuned"]["value"]] for x in data["summary"]]
    caption = f"The first {min(len(rows), NOSCRIPT_ROWS)} of {len(rows)} answers, shortened; scripts are off."
    answers = html_table(caption, SHOWN, [[r.get(c) for c in SHOWN] for r in rows[:NOSCRIPT_ROWS]])
    parts = {"TITLE": html.escape(data["title"]), "TABLE": html_table("Summary", columns, summary) + answers}
    # One pass, so that a placeholder within the data stays text.
    fill = lambda match: parts[match[1]] if match[1] else script_json(data)  # noqa: E731
    return re.sub(r"<!--ARCIVA_(TITLE|TABLE)-->|/\*ARCIVA_DATA\*/", fill, template)
