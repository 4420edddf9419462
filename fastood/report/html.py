"""The report: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastood.atomic import write_text
from fastood.report import context
from fastood.report.metricview import MetricView
from fastood.report.page import render_page
from fastood.report.table import ScoreTable
from fastood.report.thumbs import OpenImage

__all__ = ["render_report", "write_report"]


def write_report(
    results: Mapping[str, Any],
    table: ScoreTable,
    path: str | os.PathLike[str],
    *,
    open_image: OpenImage | None = None,
    top: int = 12,
    score: str | None = None,
) -> Path:
    """Write ``report.html``: tables, plots, pictures and provenance in one self-contained file.

    The page makes no request of any kind: styles, charts and previews are inside, there is no
    script, and its content security policy forbids the rest. All text from data is escaped.

    Args:
        results: what an evaluation returns and ``results.json`` holds.
        table: the per-image scores of the same evaluation.
        path: the file to write, or a folder, which gets ``report.html``.
        open_image: (set name, path) to the bytes of that image, or None if it is gone. Without it,
            or where it fails, a placeholder stands in for the picture.
        top: pictures per gallery.
        score: label of the score that orders the galleries; the best average AUROC by default.
    Returns:
        The path written.
    Raises:
        ValueError: ``results`` of another schema, without metrics, or an unknown ``score``.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "report.html"
    page = render_report(results, table, open_image=open_image, top=top, score=score)
    return write_text(target, page)


def render_report(
    results: Mapping[str, Any],
    table: ScoreTable,
    *,
    open_image: OpenImage | None = None,
    top: int = 12,
    score: str | None = None,
) -> str:
    """The page of :func:`write_report` as text."""
    if results.get("schema") != 1:
        raise ValueError(
            f"results: expected schema 1, got {results.get('schema')!r}; "
            "was it written by another version of fastood?"
        )
    if not results.get("metrics"):
        raise ValueError("results: expected at least one row in 'metrics', got none")
    if top < 0:
        raise ValueError(f"top: expected 0 or more, got {top}")
    view = MetricView(results)
    if score is not None and score not in view.scores:
        raise ValueError(f"score: expected one of {view.scores}, got {score!r}")
    chosen = score or _reference(view)
    entries: dict[str, Mapping[str, Any]] = {}
    for label, entry in (results.get("thresholds") or {}).items():
        at = entry.get("threshold")  # infinite ones are the words "inf" and "-inf" in JSON
        entries[label] = {**entry, "threshold": None if at is None else float(at)}
    threshold = (entries.get(chosen) or {}).get("threshold")
    keys = view.fpr_keys()
    tpr = float(keys[0][3:-3]) / 100 if keys else 0.95

    return render_page(
        "template.html",
        version=results["fastood"],
        fingerprint=results["model"].get("fingerprint"),
        results=results,
        view=view,
        chosen=chosen,
        winners={m.key: view.winner(m.key) for m in view.metrics},
        reversal=view.reversal(),
        fpr_keys=keys,
        tpr=tpr,
        overview=context.overview(view),
        distributions=context.distributions(view, table, entries, tpr),
        galleries=context.galleries(view, table, chosen, open_image, top),
        classes=context.classes(table, chosen, threshold),
        thresholds=context.thresholds(view, table, entries),
        image_sets=context.image_sets(results),
    )


def _reference(view: MetricView) -> str:
    if any(m.key == "AUROC" for m in view.metrics):
        best = view.winner("AUROC")
        if best is not None:
            return best[0]
    return view.scores[0]
