"""The metric rules written down a second time: plain loops, no sorting tricks, fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def slow_curve(positives: Sequence[float], negatives: Sequence[float]) -> list[tuple[int, int]]:
    """(tp, fp) at every distinct score taken as threshold, strictest first, "at or above"."""
    return [
        (sum(p >= t for p in positives), sum(q >= t for q in negatives))
        for t in sorted({*positives, *negatives}, reverse=True)
    ]


def slow_auroc(id_scores: Sequence[float], ood_scores: Sequence[float]) -> float:
    wins = sum(
        Fraction(1) if a > b else Fraction(1, 2) if a == b else Fraction(0)
        for a in id_scores
        for b in ood_scores
    )
    return float(wins / (len(id_scores) * len(ood_scores)))


def slow_aupr(positives: Sequence[float], negatives: Sequence[float], rule: str) -> float:
    area, recall, precision = Fraction(0), Fraction(0), Fraction(1)
    for tp, fp in slow_curve(positives, negatives):
        r, p = Fraction(tp, len(positives)), Fraction(tp, tp + fp)
        area += (r - recall) * (p if rule == "ap" else (p + precision) / 2)
        recall, precision = r, p
    return float(area)


def slow_fpr(
    positives: Sequence[float], negatives: Sequence[float], rule: str, tpr: float
) -> float:
    """FPR by scanning all thresholds.

    "nearest" starts at the strictest threshold that has full recall, walks towards stricter ones,
    and keeps a threshold only if its float distance to the target is strictly smaller.
    """
    curve = slow_curve(positives, negatives)
    n = len(positives)
    if rule == "at_least":
        return next(fp for tp, fp in curve if tp / n >= tpr) / len(negatives)
    full = next(i for i, (tp, _) in enumerate(curve) if tp == n)
    best, chosen = None, 0
    for tp, fp in reversed(curve[: full + 1]):
        distance = abs(tp / n - tpr)
        if best is None or distance < best:
            best, chosen = distance, fp
    return chosen / len(negatives)


def slow_delong(id_scores: Sequence[float], ood_scores: Sequence[float]) -> float:
    """Variance of the AUROC from the full table of comparisons."""
    table = [[(a > b) + (a == b) / 2 for b in ood_scores] for a in id_scores]
    rows = [sum(row) / len(ood_scores) for row in table]
    columns = [sum(column) / len(id_scores) for column in zip(*table, strict=True)]

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - 1)

    return variance(rows) / len(rows) + variance(columns) / len(columns)
