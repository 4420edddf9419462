"""A figure of one evaluation for papers and READMEs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastood.atomic import replacing
from fastood.report.curves import histogram, roc_points
from fastood.report.metricview import MetricView
from fastood.report.table import ScoreTable

__all__ = ["LINES", "STYLE", "save_figure"]

_ID, _OOD = "#0072b2", "#d55e00"
LINES = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#a27a00", "#3aa0dc", "#55585f", "#7a4fc9")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#55585f",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": "#55585f",
    "ytick.color": "#55585f",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "pdf.fonttype": 42,  # text stays text in journals' PDF checks
    "svg.fonttype": "none",
    # A set called "$x" is a name, not a formula.
    "text.parse_math": False,
}


def save_figure(
    results: Mapping[str, Any],
    table: ScoreTable,
    path: str | os.PathLike[str],
    *,
    score: str | None = None,
    dpi: int = 200,
) -> Path:
    """Save histograms (top) and ROC curves (bottom), one column per OOD set.

    Args:
        results: what an evaluation returns.
        table: the per-image scores of the same evaluation.
        path: the file; its suffix chooses the format (png, pdf, svg).
        score: label of the score in the histograms; the best overall AUROC by default.
        dpi: dots per inch of a bitmap.
    Returns:
        The path written.
    Raises:
        ValueError: an unknown ``score``, or results without metrics.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = MetricView(results)
    if not view.metrics:
        raise ValueError("results: expected at least one row in 'metrics', got none")
    if score is None:
        winner = view.winner(view.metrics[0].key)
        score = winner[0] if winner else view.scores[0]
    if score not in view.scores:
        raise ValueError(f"score: expected one of {view.scores}, got {score!r}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = len(view.sets)
    threshold = ((results.get("thresholds") or {}).get(score) or {}).get("threshold")
    threshold = None if threshold is None else float(threshold)  # "-inf" is a word in JSON
    with rc_context(STYLE):
        # A figure of its own, not pyplot's: no global state, no window, safe in threads.
        figure = Figure(figsize=(2.3 * columns + 1.2, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, columns, squeeze=False, height_ratios=(2, 3))
        for column, name in enumerate(view.sets):
            _histogram(axes[0, column], table, score, name, threshold)
            _roc(axes[1, column], view, table, name)
        axes[0, 0].set_ylabel("share of images")
        axes[1, 0].set_ylabel("ID accepted")
        axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[1, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        with replacing(target) as temporary:
            suffix = target.suffix.lstrip(".") or "png"
            figure.savefig(temporary, format=suffix, dpi=dpi)
    return target


def _histogram(axis: Any, table: ScoreTable, score: str, name: str, at: float | None) -> None:
    id_scores = table.values(score, role="id")
    data = histogram(id_scores, table.values(score, role="ood", set=name))
    for label, shares, color in (("ID", data.id_share, _ID), ("OOD", data.ood_share, _OOD)):
        axis.stairs(shares, data.edges, fill=True, color=color, alpha=0.3, linewidth=0)
        axis.stairs(shares, data.edges, color=color, linewidth=1.0, label=label)
    if at is not None and data.edges[0] <= at <= data.edges[-1]:
        axis.axvline(at, color="#17191e", linewidth=0.8, linestyle=(0, (3, 3)), label="threshold")
    axis.set_title(name)
    axis.set_xlabel(score)
    axis.set_xlim(data.edges[0], data.edges[-1])
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", nbins=4)
    axis.locator_params(axis="y", nbins=3)


def _roc(axis: Any, view: MetricView, table: ScoreTable, name: str) -> None:
    axis.plot([0, 1], [0, 1], color="#cfcfca", linewidth=0.8, linestyle=(0, (2, 3)))
    for i, label in enumerate(view.scores):
        if label not in table.scores:
            continue
        accepted_ood, accepted_id = roc_points(
            table.values(label, role="id"), table.values(label, role="ood", set=name)
        )
        style = ("-", "--", ":")[i // len(LINES) % 3]
        color = LINES[i % len(LINES)]
        axis.plot(accepted_ood, accepted_id, style, color=color, linewidth=1.2, label=label)
    axis.set_xlabel("OOD accepted")
    axis.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axis.set_xticks([0, 0.5, 1.0])
    axis.set_yticks([0, 0.5, 1.0])
