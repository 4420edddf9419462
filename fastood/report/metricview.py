"""The metrics of a results dict, arranged for tables: sets, scores, metrics, and which is best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AVERAGE", "Cell", "Metric", "MetricView", "Reversal", "percent"]

AVERAGE = "average"
_FPR = re.compile(r"FPR(\d+(?:\.\d+)?)-(ID|OOD)")


@dataclass(frozen=True)
class Metric:
    """A column: its key in the results, how it is shown, and which way is better."""

    key: str
    title: str
    detail: str
    higher_is_better: bool

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Cell:
    """One value as a fraction, with its interval; ``value`` is None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False

    @property
    def percent(self) -> str:
        return percent(self.value)

    def text(self, digits: int = 2) -> str:
        """The value in percent with that many decimals."""
        return percent(self.value, digits)

    @property
    def interval(self) -> str:
        """The interval in percent, ``""`` without one."""
        if self.low is None or self.high is None:
            return ""
        return f"{percent(self.low, 1)}–{percent(self.high, 1)}"


@dataclass(frozen=True)
class Reversal:
    """Two scores that the two FPR conventions put in opposite order."""

    by_id: str
    """Better (lower FPR) with ID positive."""
    by_ood: str
    """Better with OOD positive."""
    id_values: tuple[float, float]
    """FPR with ID positive of ``by_id`` and ``by_ood``."""
    ood_values: tuple[float, float]
    """FPR with OOD positive of ``by_id`` and ``by_ood``."""
    best_differs: bool
    """Whether the two conventions also name different winners."""


def percent(value: Any, digits: int = 2) -> str:
    """A fraction as percent text without the sign; an en dash for a missing value."""
    number = _finite(value)
    return "–" if number is None else f"{100 * number:.{digits}f}"


class MetricView:
    """Sets × scores × metrics of a results dict, with the best score of each column.

    ``sets`` are the OOD sets in order; ``overall`` names the row that sums them up: the average, or
    the only set. Where several sets come without an average, the plain mean is used, without an
    interval.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        rows = results.get("metrics", [])
        self._rows = {(str(r["set"]), str(r["score"])): r for r in rows}
        self.scores = list(dict.fromkeys(str(r["score"]) for r in rows))
        self.sets = list(dict.fromkeys(str(r["set"]) for r in rows if r["set"] != AVERAGE))
        self.overall = self.sets[0] if len(self.sets) == 1 else AVERAGE
        self.columns = self.sets if len(self.sets) == 1 else [*self.sets, AVERAGE]
        self.metrics = _metrics({key for row in rows for key in row})

    def count(self, set_name: str, side: str) -> int | None:
        """Images behind the values of one set: ``side`` is ``"n_id"`` or ``"n_ood"``."""
        for score in self.scores:
            row = self._rows.get((set_name, score))
            if row is not None and row.get(side) is not None:
                return int(row[side])
        return None

    def cell(self, set_name: str, score: str, key: str) -> Cell:
        """One value with its interval, and whether no score does better in this column."""
        value, low, high = self._value(set_name, score, key)
        metric = next(m for m in self.metrics if m.key == key)
        others = [self._value(set_name, s, key)[0] for s in self.scores]
        known = [v for v in others if v is not None]
        best = False
        if value is not None and len(self.scores) > 1:
            best = value == (max(known) if metric.higher_is_better else min(known))
        return Cell(value, low, high, best)

    def winner(self, key: str, set_name: str | None = None) -> tuple[str, Cell] | None:
        """The first best score of a column, or None when no score has a value there."""
        set_name = self.overall if set_name is None else set_name
        metric = next(m for m in self.metrics if m.key == key)
        cells = [(s, self.cell(set_name, s, key)) for s in self.scores]
        known = [(s, c, c.value) for s, c in cells if c.value is not None]
        if not known:
            return None
        sign = -1 if metric.higher_is_better else 1
        score, cell, _ = min(known, key=lambda item: sign * item[2])
        return score, cell

    def fpr_keys(self) -> tuple[str, str] | None:
        """The keys of the two FPR conventions (ID positive, OOD positive), if both are there."""
        keys = {m.key.rsplit("-", 1)[1]: m.key for m in self.metrics if _FPR.fullmatch(m.key)}
        return (keys["ID"], keys["OOD"]) if len(keys) == 2 else None

    def reversal(self) -> Reversal | None:
        """The pair of scores on which the FPR conventions disagree most, or None."""
        keys = self.fpr_keys()
        if keys is None:
            return None
        by_id, by_ood = ([self._value(self.overall, s, k)[0] for s in self.scores] for k in keys)
        best = [self.winner(k) for k in keys]
        differs = best[0] is not None and best[1] is not None and best[0][0] != best[1][0]
        worst, found = 0.0, None
        for i, a in enumerate(self.scores):
            for j, b in enumerate(self.scores):
                p, q, r, t = by_id[i], by_id[j], by_ood[i], by_ood[j]
                if p is None or q is None or r is None or t is None:
                    continue
                size = min(q - p, r - t)  # both positive: a wins by ID, b wins by OOD
                if differs and [a, b] == [w[0] for w in best if w] and size > 0:
                    return Reversal(a, b, (p, q), (r, t), True)  # the two winners say it best
                if size > worst:
                    worst, found = size, (a, b, (p, q), (r, t))
        if found is None:
            return None
        return Reversal(found[0], found[1], found[2], found[3], differs)

    def _value(
        self, set_name: str, score: str, key: str
    ) -> tuple[float | None, float | None, float | None]:
        row = self._rows.get((set_name, score))
        if row is None:
            if set_name != AVERAGE:
                return None, None, None
            parts = [self._value(s, score, key)[0] for s in self.sets]
            known = [p for p in parts if p is not None]
            complete = bool(parts) and len(known) == len(parts)
            return (sum(known) / len(known) if complete else None), None, None
        low, high = None, None
        interval = (row.get("intervals") or {}).get(key)
        if interval is not None:
            low, high = _finite(interval[0]), _finite(interval[1])
        return _finite(row.get(key)), low, high


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _metrics(keys: set[str]) -> list[Metric]:
    found = []
    if "AUROC" in keys:
        detail = "chance that an ID image outranks an OOD image"
        found.append(Metric("AUROC", "AUROC", detail, True))
    fpr = sorted((k for k in keys if _FPR.fullmatch(k)), key=lambda k: (_fpr_parts(k)[1], k))
    for key in fpr:
        tpr, side = _fpr_parts(key)
        other = "OOD images accepted" if side == "ID" else "ID images rejected"
        kept = "ID images are kept" if side == "ID" else "OOD images are caught"
        detail = f"{other} when {tpr} % of the {kept}"
        found.append(Metric(key, f"FPR{tpr}, {side} positive", detail, False))
    for side, name in (("IN", "ID"), ("OUT", "OOD")):
        if f"AUPR-{side}" in keys:
            detail = f"area under precision–recall, {name} positive"
            found.append(Metric(f"AUPR-{side}", f"AUPR-{side}", detail, True))
    return found


def _fpr_parts(key: str) -> tuple[str, str]:
    match = _FPR.fullmatch(key)
    if match is None:
        raise ValueError(f"key: expected FPR<tpr>-ID or FPR<tpr>-OOD, got {key!r}")
    return match[1], match[2]
