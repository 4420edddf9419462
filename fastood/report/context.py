"""Everything the report page shows, worked out before the template sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastood.report.curves import Histogram, histogram, roc_points
from fastood.report.metricview import Cell, MetricView, percent
from fastood.report.svg import histogram_chart, range_chart, roc_chart
from fastood.report.table import ScoreTable
from fastood.report.thumbs import OpenImage, preview

__all__ = ["classes", "distributions", "galleries", "image_sets", "overview", "thresholds"]

_CLASS_ROWS = 200


def overview(view: MetricView) -> list[dict[str, Any]]:
    """One row per score: the overall value of every metric with a number line of its sets."""
    spans = {m.key: _axis(view, m.key) for m in view.metrics}
    rows = []
    for score in view.scores:
        cells = []
        for metric in view.metrics:
            cell = view.cell(view.overall, score, metric.key)
            parts = [view.cell(s, score, metric.key).value for s in view.sets]
            chart = range_chart(
                cell.value,
                low=cell.low,
                high=cell.high,
                parts=[p for p in parts if p is not None] if len(view.sets) > 1 else [],
                span=spans[metric.key],
                label=f"{metric.title} {cell.percent} %, between {percent(spans[metric.key][0], 0)}"
                f" and {percent(spans[metric.key][1], 0)} %",
            )
            cells.append({"cell": cell, "chart": chart, "metric": metric})
        rows.append({"score": score, "cells": cells})
    return rows


def _axis(view: MetricView, key: str) -> tuple[float, float]:
    cells = [view.cell(s, score, key) for s in view.columns for score in view.scores]
    known = [v for c in cells for v in (c.value, c.low, c.high) if v is not None]
    if not known:
        return 0.0, 1.0
    return max(0.0, min(known) - 0.01), min(1.0, max(known) + 0.01)


def distributions(
    view: MetricView, table: ScoreTable, thresholds: Mapping[str, Any], tpr: float
) -> list[dict[str, Any]]:
    """Per OOD set: the ROC curves of all scores over each other and one histogram per score."""
    out = []
    scores = [s for s in view.scores if s in table.scores]
    known = {m.key for m in view.metrics}
    for name in view.sets:
        curves, charts = [], []
        for i, score in enumerate(scores):
            id_scores = table.values(score, role="id")
            ood_scores = table.values(score, role="ood", set=name)
            curves.append((score, *roc_points(id_scores, ood_scores)))
            data = histogram(id_scores, ood_scores)
            entry = thresholds.get(score) or {}
            cell = view.cell(name, score, "AUROC") if "AUROC" in known else Cell(None)
            chart = histogram_chart(
                data,
                label=f"Histogram of {score}: in-distribution images and {name}",
                threshold=entry.get("threshold"),
                threshold_name="threshold",
            )
            series = f"series{i % 8} dash{i // 8 % 3}"
            charts.append(
                {
                    "score": score,
                    "chart": chart,
                    "auroc": cell,
                    "series": series,
                    "notes": _clipped(data),
                }
            )
        roc = roc_chart(curves, label=f"ROC curves of {len(curves)} scores on {name}", tpr=tpr)
        count = view.count(name, "n_ood")
        out.append({"set": name, "n": count, "roc": roc, "histograms": charts})
    return out


def _clipped(data: Histogram) -> str:
    parts = []
    for counts, where in (
        (data.below, "left of the axis"),
        (data.above, "right of the axis"),
        (data.invalid, "not a number"),
    ):
        for count, side in zip(counts, ("ID", "OOD"), strict=True):
            if count:
                parts.append(f"{count:,} {side} {where}")
    return ", ".join(parts)


def galleries(
    view: MetricView, table: ScoreTable, score: str, open_image: OpenImage | None, top: int
) -> list[dict[str, Any]]:
    """The ID images that look most OOD, then per OOD set the images that look most ID."""
    if score not in table.scores:
        return []
    out = []
    wanted = [("id", None), *(("ood", name) for name in view.sets)]
    for role, name in wanted:
        rows = table.rows(role=role, set=name)
        keys = table.scores[score][rows].astype(np.float64)
        keys = np.where(np.isnan(keys), np.inf, keys if role == "id" else -keys)
        picked = rows[np.argsort(keys, kind="stable")[:top]]
        if len(picked):
            digits = _digits(table.scores[score][picked])
            images = [_picture(table, int(i), score, role, digits, open_image) for i in picked]
            names = ", ".join(table.set_names("id")) if name is None else name
            out.append({"role": role, "set": names, "images": images})
    return out


def _digits(values: np.ndarray) -> int | None:
    """Decimals that show four figures of the largest value; None where that would not be short."""
    largest = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
    if not 1e-4 <= largest < 1e6:
        return None
    return max(0, 3 - int(np.floor(np.log10(largest))))


def _picture(
    table: ScoreTable,
    row: int,
    score: str,
    role: str,
    digits: int | None,
    open_image: OpenImage | None,
) -> dict[str, Any]:
    true, predicted = table.class_name[row], table.predicted[row]
    value = float(table.scores[score][row])
    text = f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    return {
        "src": preview(open_image, table.set[row], table.path[row]),
        "path": table.path[row],
        "score": text.replace("-", "−"),
        "predicted": predicted,
        "true": true,
        "wrong": role == "id" and None not in (true, predicted) and true != predicted,
    }


def classes(table: ScoreTable, score: str, threshold: float | None) -> dict[str, Any]:
    """ID accuracy per class, least accurate first, with the most common mistake."""
    rows = table.rows(role="id")
    groups: dict[str, list[int]] = {}
    for i in rows:
        if table.class_name[i] is not None and table.predicted[i] is not None:
            groups.setdefault(table.class_name[i], []).append(int(i))
    lines = []
    for name, members in groups.items():
        wrong = [table.predicted[i] for i in members if table.predicted[i] != name]
        common = Counter(wrong).most_common(1)
        rejected = None
        if threshold is not None and score in table.scores:
            rejected = float(np.mean(table.scores[score][members] < np.float64(threshold)))
        lines.append(
            {
                "name": name,
                "n": len(members),
                "accuracy": 1 - len(wrong) / len(members),
                "mistake": common[0] if common else None,
                "rejected": rejected,
            }
        )
    lines.sort(key=lambda line: (line["accuracy"], line["name"]))
    return {"rows": lines[:_CLASS_ROWS], "total": len(lines)}


def thresholds(view: MetricView, table: ScoreTable, entries: Mapping[str, Any]) -> list[dict]:
    """Each saved threshold with what it does to the images of this very evaluation."""
    out = []
    for score, entry in entries.items():
        at = entry.get("threshold")
        shares: list[float | None] = [None] * (1 + len(view.sets))
        if at is not None and score in table.scores:
            at = np.float64(at)  # a plain float would be rounded to the scores' float32 first
            kept = [table.values(score, role="id") >= at]
            caught = [table.values(score, role="ood", set=s) < at for s in view.sets]
            shares = [float(np.mean(x)) if len(x) else None for x in (*kept, *caught)]
        out.append(
            {
                "score": score,
                "value": "–" if at is None else f"{at:.6g}",
                "tpr": entry.get("tpr"),
                "n": entry.get("n"),
                "source": entry.get("source"),
                "kept": shares[0],
                "caught": shares[1:],
            }
        )
    return out


def image_sets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ID, OOD and calibration sets with their counts and skipped files."""
    out = []
    for role, entries in (
        ("ID", [results.get("id") or {}]),
        ("OOD", results.get("ood") or []),
        ("calibration", [results.get("calibration") or {}]),
    ):
        for entry in entries:
            if entry:
                out.append({**entry, "role": role, "skipped": list(entry.get("skipped") or [])})
    return out
