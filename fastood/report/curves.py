"""What the plots show, as numbers: binned scores and thinned ROC curves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Histogram", "histogram", "roc_points", "ticks"]

_TAIL = 0.002  # share of a set that may fall off either end of the axis


@dataclass(frozen=True)
class Histogram:
    """Shares of ID and OOD images per bin.

    Attributes:
        edges: (bins + 1,) bin edges.
        id_share: (bins,) share of all ID images in each bin.
        ood_share: (bins,) the same of the OOD images.
        below: ID and OOD images left of the axis.
        above: ID and OOD images right of the axis.
        invalid: ID and OOD images whose score is not a number.
    """

    edges: np.ndarray
    id_share: np.ndarray
    ood_share: np.ndarray
    below: tuple[int, int]
    above: tuple[int, int]
    invalid: tuple[int, int]


def histogram(id_scores: np.ndarray, ood_scores: np.ndarray) -> Histogram:
    """Bin two sets of scores on one axis that a few extreme values cannot squeeze.

    The axis spans the central 99.6 % of each set, or everything if that is not much wider. What
    falls outside is counted, not drawn.
    """
    pair = [np.asarray(x, dtype=np.float64) for x in (id_scores, ood_scores)]
    finite = [x[np.isfinite(x)] for x in pair]
    lo, hi = _span(finite)
    sizes = [len(x) for x in finite if len(x)]
    bins = int(np.clip(round(2.4 * min(sizes) ** (1 / 3)), 12, 48)) if sizes else 12
    edges = np.linspace(lo, hi, bins + 1)
    shares = [np.histogram(x, edges)[0] / max(len(p), 1) for x, p in zip(finite, pair, strict=True)]
    return Histogram(
        edges,
        shares[0],
        shares[1],
        (int((pair[0] < lo).sum()), int((pair[1] < lo).sum())),
        (int((pair[0] > hi).sum()), int((pair[1] > hi).sum())),
        (int(np.isnan(pair[0]).sum()), int(np.isnan(pair[1]).sum())),
    )


def _span(sets: list[np.ndarray]) -> tuple[float, float]:
    sets = [x for x in sets if len(x)]
    if not sets:
        return 0.0, 1.0
    lo = min(float(np.quantile(x, _TAIL)) for x in sets)
    hi = max(float(np.quantile(x, 1 - _TAIL)) for x in sets)
    least, most = min(float(x.min()) for x in sets), max(float(x.max()) for x in sets)
    room = 0.25 * (hi - lo)
    if least >= lo - room:
        lo = least
    if most <= hi + room:
        hi = most
    # A range that rounding alone could make (constant scores) cannot be cut into bins.
    if not hi - lo > 1e-9 * max(abs(lo), abs(hi)):
        pad = 0.05 * max(abs(lo), 1e-6)
        lo, hi = lo - pad, hi + pad
    if not np.isfinite(hi - lo):  # values near the largest float
        lo, hi = lo / 4, hi / 4
    return lo, hi


def roc_points(
    id_scores: np.ndarray, ood_scores: np.ndarray, *, limit: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """ROC curve (OOD accepted, ID accepted) with at most ``limit`` points.

    Points are exact: they are chosen from the curve, evenly along its length, never interpolated.
    Scores that are not numbers are left out. Returns two equal arrays from (0, 0) to (1, 1).
    """
    pos = np.asarray(id_scores, dtype=np.float64)
    neg = np.asarray(ood_scores, dtype=np.float64)
    pos, neg = pos[~np.isnan(pos)], neg[~np.isnan(neg)]
    if not len(pos) or not len(neg):
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    values = np.concatenate([pos, neg])
    order = np.argsort(-values, kind="stable")
    is_id = order < len(pos)
    last = np.append(np.diff(values[order]) != 0, True)  # ties move together
    tpr = np.concatenate([[0.0], np.cumsum(is_id)[last] / len(pos)])
    fpr = np.concatenate([[0.0], np.cumsum(~is_id)[last] / len(neg)])
    if len(tpr) > limit:
        walked = np.concatenate([[0.0], np.cumsum(np.diff(tpr) + np.diff(fpr))])
        keep = np.unique(np.searchsorted(walked, np.linspace(0, walked[-1], limit)))
        keep = np.clip(keep, 0, len(tpr) - 1)
        keep[-1] = len(tpr) - 1
        tpr, fpr = tpr[keep], fpr[keep]
    return fpr, tpr


def ticks(lo: float, hi: float, *, most: int = 5) -> list[tuple[float, str]]:
    """Round positions inside [lo, hi] with their labels, at most ``most`` of them."""
    width = hi - lo
    if not (np.isfinite(width) and width > 0):
        return []
    power = 10.0 ** np.floor(np.log10(width / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if width / (m * power) < most)
    first = np.ceil(lo / step - 1e-9)
    end = hi + 1e-9 * step  # 5 * 1e-5 is a little more than 5e-5
    places = [float((first + i) * step) for i in range(most) if (first + i) * step <= end]
    largest = max((abs(p) for p in places), default=0.0)
    if largest >= 1e5 or 0 < largest < 1e-3:
        digits = max(0, int(np.floor(np.log10(largest)) - np.floor(np.log10(step)))) + (
            round(step / power, 3) == 2.5
        )
        return [(p, "0" if p == 0 else _power(f"{p:.{min(digits, 6)}e}")) for p in places]
    decimals = max(0, int(-np.floor(np.log10(step)))) + (round(step / power, 3) == 2.5)
    return [(p, f"{p:.{decimals}f}".replace("-", "−")) for p in places]


def _power(text: str) -> str:
    """``-1.2e-04`` as ``−1.2e−4``."""
    number, exponent = text.split("e")
    return f"{number}e{int(exponent)}".replace("-", "−")
