"""The table of a comparison in formats that papers and spreadsheets take: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Format = Literal["csv", "markdown", "latex"]
FORMATS: tuple[str, ...] = get_args(Format)
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def written(format: Format, rows: Sequence[Mapping[str, Any]], shown: Sequence[Sequence[str]], note: str = "") -> str:
    """rows: exact numbers, as report.tables.compare_rows gives them; shown: the same as read on the page, under a head. CSV holds
    the exact ones, the other two what is read. note: a sentence on how to read them, for LaTeX's caption and below Markdown."""
    if format == "csv":
        return _csv(rows)
    return _markdown(shown, note) if format == "markdown" else _latex(shown, note)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(
        {k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in r.items()} for r in rows
    )
    return out.getvalue()


def _markdown(shown: Sequence[Sequence[str]], note: str) -> str:
    head, *body = [["".join(c).replace("|", "\\|") for c in row] for row in shown]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join([*lines, *(["", note] if note else [])]) + "\n"


def _latex(shown: Sequence[Sequence[str]], note: str) -> str:
    """A table for the package booktabs; text to the left, numbers to the right."""
    head, *body = [" & ".join(_escaped(c) for c in row) + r" \\" for row in shown]
    lines = [
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * (len(shown[0]) - 1)}}}", r"\toprule",
        head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", *([rf"\caption{{{_escaped(note)}}}"] if note else []), r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, SPECIAL)), lambda m: SPECIAL[m[0]], text)
