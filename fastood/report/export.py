"""Metric tables to paste elsewhere: Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from fastood.report.metricview import AVERAGE, MetricView

__all__ = ["to_csv", "to_latex", "to_markdown"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def to_markdown(results: Mapping[str, Any], *, digits: int = 2, intervals: bool = False) -> str:
    """The metrics in percent as a Markdown table, one line per OOD set and score.

    The best value of each set is bold; an average over several sets comes last.
    """
    view = MetricView(results)
    header = ["OOD set", "score", *(f"{m.title} {m.arrow}" for m in view.metrics)]
    lines = [_row(header), _row(["---", "---", *("---:" for _ in view.metrics)])]
    for name in view.columns:
        for score in view.scores:
            cells = []
            for metric in view.metrics:
                cell = view.cell(name, score, metric.key)
                text = cell.text(digits)
                text = f"**{text}**" if cell.best else text
                cells.append(f"{text} ({cell.interval})" if intervals and cell.interval else text)
            lines.append(_row([_markdown(name), _markdown(score), *cells]))
    return "\n".join(lines) + "\n"


def to_latex(results: Mapping[str, Any], *, digits: int = 2) -> str:
    """The metrics in percent as a ``tabular`` for the booktabs package, best values bold."""
    view = MetricView(results)
    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    header = ["OOD set", "Score", *(f"{_latex(m.title)} {arrows[m.arrow]}" for m in view.metrics)]
    lines = [r"\begin{tabular}{ll" + "r" * len(view.metrics) + "}", r"\toprule"]
    lines.append(" & ".join(header) + r" \\")
    for name in view.columns:
        lines.append(r"\midrule")
        for i, score in enumerate(view.scores):
            cells = []
            for metric in view.metrics:
                cell = view.cell(name, score, metric.key)
                text = cell.text(digits).replace("–", "--")
                cells.append(rf"\textbf{{{text}}}" if cell.best else text)
            title = "Average" if name == AVERAGE else _latex(name)
            lines.append(" & ".join([title if i == 0 else "", _latex(score), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def to_csv(results: Mapping[str, Any]) -> str:
    """The metrics as CSV text: fractions at full precision, with ``_low`` and ``_high`` columns."""
    view = MetricView(results)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [m.key + end for m in view.metrics for end in ("", "_low", "_high")]
    writer.writerow(["set", "score", "n_id", "n_ood", *parts])
    for name in view.columns:
        for score in view.scores:
            cells = [view.cell(name, score, m.key) for m in view.metrics]
            numbers = [x for c in cells for x in (c.value, c.low, c.high)]
            counts = [view.count(name, side) for side in ("n_id", "n_ood")]
            writer.writerow([name, score, *("" if x is None else x for x in [*counts, *numbers])])
    return out.getvalue()


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + ch if ch in "\\|*_`[]~" else ch for ch in text)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(ch, ch) for ch in " ".join(text.split()))
