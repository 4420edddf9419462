"""Do two methods differ on the same images?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastood.metrics.bootstrap import check_resamples, percentile_interval, resample
from fastood.metrics.counts import AuprRule, Counts, Layout
from fastood.metrics.delong import check_two_each, components
from fastood.metrics.evaluation import statistics_of
from fastood.metrics.inputs import Pair, read_pair
from fastood.metrics.normal import check_confidence, two_sided_p, z_of
from fastood.metrics.ranks import check_choice, check_tpr

if TYPE_CHECKING:
    from fastood.scores.result import Orientation

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """One metric of two methods on the same images.

    Attributes:
        a: the metric of the first method.
        b: of the second.
        difference: a - b.
        interval: confidence interval of the difference.
        p: two-sided p value of "no difference"; NaN where the variance estimate is zero although
            the methods differ (one separates perfectly, the other ties everything).
        test: ``"delong"`` or ``"bootstrap"``.
        z: the statistic of the DeLong test, None for the bootstrap.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float
    test: str
    z: float | None = None


def compare(
    id_a: Any,
    ood_a: Any,
    id_b: Any,
    ood_b: Any,
    *,
    higher: Orientation | None = None,
    tpr: float = 0.95,
    aupr: AuprRule = "ap",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Paired test between two methods scored on the same images in the same order.

    AUROC: paired DeLong test. With per-image components V of each method, the variance of the
    difference is var(V_id,a - V_id,b) / n + var(V_ood,a - V_ood,b) / m, and z is normal.
    AUPR and FPR: paired stratified bootstrap; both methods see the same drawn images, the interval
    is the percentile one, and p = 2 min(r_<=, r_>=) with r = (1 + replicates on that side of zero)
    / (1 + resamples), at most 1, so it is never below 2 / (1 + resamples).

    Args:
        id_a: (n,) scores of the ID images by method a.
        ood_a: (m,) of the OOD images.
        id_b: (n,) scores of the same ID images, in the same order, by method b.
        ood_b: (m,) likewise.
        higher: what a higher score means in raw arrays; each ``Scores`` knows its own.
        tpr: recall of the FPR entries.
        aupr: rule of the AUPR entries.
        confidence: level of the intervals.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        for each metric name of :func:`fastood.metrics.evaluate` a :class:`Difference`.

    Raises:
        TypeError, ValueError: as ``evaluate``; ValueError also if the methods have different
            numbers of images, or fewer than two a side.

    Example:
        >>> id_a, ood_a = [3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 2.0, 3.5]
        >>> found = compare(id_a, ood_a, [3.0, 4.0, 0.5, 6.0], ood_a)
        >>> round(found["AUROC"].difference, 4), 0 < found["AUROC"].p < 1
        (0.1875, True)
    """
    tpr = check_tpr(tpr)
    check_choice("aupr", aupr, ("ap", "trapezoid"))
    confidence = check_confidence(confidence)
    resamples = check_resamples(resamples)
    a, b = read_pair(id_a, ood_a, higher), read_pair(id_b, ood_b, higher)
    n, m = len(a.id), len(a.ood)
    for side, one, other in (("ID", n, len(b.id)), ("OOD", m, len(b.ood))):
        if one != other:
            raise ValueError(
                f"expected both methods to score the same {side} images, got {one} scores by a and "
                f"{other} by b"
            )
    check_two_each(n, m, "compare")
    statistics = statistics_of(tpr, aupr)
    counts_a, counts_b = Counts.of(*a), Counts.of(*b)
    found = {"AUROC": _paired_delong(a, b, counts_a.auroc(), counts_b.auroc(), confidence)}
    del statistics["AUROC"]
    replicates = resample(
        [Layout.of(*a), Layout.of(*b)],
        statistics,
        sizes=(n, m),
        resamples=resamples,
        seed=seed,
    )
    for name, statistic in statistics.items():
        of_a, of_b = statistic(counts_a), statistic(counts_b)
        drawn = replicates[name][0] - replicates[name][1]
        below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
        found[name] = Difference(
            a=of_a,
            b=of_b,
            difference=of_a - of_b,
            interval=percentile_interval(drawn, confidence),
            p=min(1.0, 2 * (1 + min(below, above)) / (1 + resamples)),
            test="bootstrap",
        )
    return found


def _paired_delong(a: Pair, b: Pair, area_a: float, area_b: float, confidence: float) -> Difference:
    v_a, v_b = components(a), components(b)
    variance = float(
        np.var(v_a.id - v_b.id, ddof=1) / len(a.id) + np.var(v_a.ood - v_b.ood, ddof=1) / len(a.ood)
    )
    difference = area_a - area_b
    # Components are multiples of 1 / (2n) or 1 / (2m): anything this small is rounding.
    if variance < 1e-30:
        same = abs(difference) < 1e-15
        return Difference(
            area_a,
            area_b,
            difference,
            interval=(difference, difference),
            p=1.0 if same else math.nan,
            test="delong",
            z=0.0 if same else math.nan,
        )
    se = math.sqrt(variance)
    reach = z_of(confidence) * se
    interval = max(-1.0, difference - reach), min(1.0, difference + reach)
    z = difference / se
    return Difference(area_a, area_b, difference, interval, two_sided_p(z), "delong", z)
