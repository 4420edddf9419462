"""Integer counts behind every metric: how many ID and OOD scores lie at or below each value.

All metrics of this package are functions of :class:`Counts`. Scores are only ever compared, so
any range and any strictly increasing transform gives the same numbers; ties are exact; counts are
int64 and become float64 in one division at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["AuprRule", "Counts", "FprRule", "Layout", "Side"]

Side = Literal["id", "ood"]
FprRule = Literal["nearest", "at_least"]
AuprRule = Literal["ap", "trapezoid"]


def _merge(id_sorted: np.ndarray, ood_sorted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge two ascending arrays: which of the merged entries are OOD, and where ties end."""
    total = len(id_sorted) + len(ood_sorted)
    is_ood = np.zeros(total, dtype=bool)
    before = np.searchsorted(id_sorted, ood_sorted)
    is_ood[before + np.arange(len(ood_sorted))] = True
    merged = np.empty(total, dtype=id_sorted.dtype)
    merged[is_ood] = ood_sorted
    merged[~is_ood] = id_sorted
    last = np.ones(total, dtype=bool)
    np.not_equal(merged[1:], merged[:-1], out=last[:-1])
    return is_ood, np.flatnonzero(last)


@dataclass(frozen=True)
class Counts:
    """Cumulative counts over the distinct scores, in ascending order.

    Attributes:
        id: (u,) int64, ID scores at or below each value; the last entry is n.
        ood: (u,) int64, OOD scores at or below each value; the last entry is m.

    In a bootstrap resample an image counts as often as it was drawn, so entries may repeat.
    """

    id: np.ndarray
    ood: np.ndarray

    @classmethod
    def of(cls, id_scores: np.ndarray, ood_scores: np.ndarray) -> Counts:
        """Count oriented scores (higher = ID) of one dtype; one sort of each side."""
        is_ood, ends = _merge(np.sort(id_scores), np.sort(ood_scores))
        ood = np.cumsum(is_ood, dtype=np.int64)[ends]
        return cls(id=ends + 1 - ood, ood=ood)

    @property
    def n_id(self) -> int:
        return int(self.id[-1])

    @property
    def n_ood(self) -> int:
        return int(self.ood[-1])

    def curve(self, positive: Side) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives from the strictest threshold to the loosest, both (u,) int64.

        ID positive means "accepted": score at or above the threshold. OOD positive means
        "rejected": score at or below it.
        """
        if positive == "ood":
            return self.ood, self.id
        above = []
        for cumulated in (self.id, self.ood):
            at_or_above = np.empty_like(cumulated)
            at_or_above[-1] = cumulated[-1]
            np.subtract(cumulated[-1], cumulated[-2::-1], out=at_or_above[:-1])
            above.append(at_or_above)
        return above[0], above[1]

    def auroc(self) -> float:
        """P(S_id > S_ood) + P(equal) / 2, from twice the Mann-Whitney count (an integer)."""
        id_at = np.diff(self.id, prepend=0)
        # 2 * (OOD below) + (OOD equal) = OOD below + OOD at or below
        below = np.concatenate(([0], self.ood[:-1]))
        twice = int((id_at * (below + self.ood)).sum())
        return twice / (2 * self.n_id * self.n_ood)

    def aupr(self, positive: Side, rule: AuprRule) -> float:
        """Area under precision over recall; see :func:`fastood.metrics.aupr`."""
        tp, fp = self.curve(positive)
        accepted = tp + fp
        precision = tp / np.maximum(accepted, 1)
        gained = np.diff(tp, prepend=0)
        if rule == "ap":
            return float((precision * gained).sum() / tp[-1])
        # The curve starts at precision 1, and stays there while nothing is accepted (which only
        # happens in a resample that drew none of the top images).
        precision[accepted == 0] = 1.0
        mean = np.concatenate(([1.0], precision[:-1]))
        mean += precision
        return float((mean * gained).sum() / (2 * int(tp[-1])))

    def fpr(self, positive: Side, rule: FprRule, tpr: float) -> float:
        """False positive rate at recall ``tpr``; see :func:`fastood.metrics.fpr`."""
        tp, fp = self.curve(positive)
        n, negatives = int(tp[-1]), int(fp[-1])
        # Smallest count whose float64 recall reaches tpr, then the first threshold that has it.
        need = min(max(int(tpr * n), 1), n)
        while need > 1 and (need - 1) / n >= tpr:
            need -= 1
        while need < n and need / n < tpr:
            need += 1
        first = int(np.searchsorted(tp, need))
        if rule == "at_least":
            return int(fp[first]) / negatives
        # "nearest" looks at every distinct threshold, starting at the strictest one with full
        # recall and going down in recall, and keeps the first of equally near ones. Recall being
        # monotone, only the counts on either side of the target can be nearest. Of the thresholds
        # that share a count, the loosest comes first, except at full recall.
        reached = int(tp[first])
        chosen = first if reached == n else int(np.searchsorted(tp, reached, side="right")) - 1
        if first > 0 and (tp[first - 1] > 0 or fp[first - 1] > 0):
            missed = int(tp[first - 1])
            if abs(missed / n - tpr) < abs(reached / n - tpr):
                chosen = first - 1
        return int(fp[chosen]) / negatives


@dataclass(frozen=True)
class Layout:
    """Where each image stands in the ranking, so that reweighted images can be counted again.

    Attributes:
        order: (n + m,) image numbers by ascending score; ID images first, OOD from n on.
        is_ood: (n + m,) bool, in ranking order.
        ends: (u,) last place of each group of equal scores.
    """

    order: np.ndarray
    is_ood: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, id_scores: np.ndarray, ood_scores: np.ndarray) -> Layout:
        """Rank oriented scores (higher = ID) of one dtype."""
        by_id, by_ood = np.argsort(id_scores), np.argsort(ood_scores)
        is_ood, ends = _merge(id_scores[by_id], ood_scores[by_ood])
        order = np.empty(len(is_ood), dtype=np.int64)
        order[~is_ood] = by_id
        order[is_ood] = len(by_id) + by_ood
        return cls(order, is_ood, ends)

    def counts(self, weights: np.ndarray) -> Counts:
        """Counts when image i stands for ``weights[i]`` images; weights (n + m,) int64."""
        ranked = weights[self.order]
        everything = np.cumsum(ranked)
        ood = np.cumsum(ranked * self.is_ood)
        if len(self.ends) < len(ranked):
            everything, ood = everything[self.ends], ood[self.ends]
        return Counts(id=everything - ood, ood=ood)
