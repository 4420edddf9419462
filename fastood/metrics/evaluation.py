"""All metrics of one ID set against one OOD set."""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastood.metrics.bootstrap import Statistic, check_resamples, percentile_interval, resample
from fastood.metrics.counts import AuprRule, Counts, Layout
from fastood.metrics.delong import auroc_interval, check_two_each
from fastood.metrics.inputs import Pair, read_pair, warn_if_tied
from fastood.metrics.normal import check_confidence
from fastood.metrics.ranks import autc_of, check_choice, check_tpr
from fastood.metrics.result import Metrics, fpr_key

if TYPE_CHECKING:
    from fastood.scores.result import Orientation

__all__ = ["Intervals", "evaluate"]

Intervals = Literal["delong", "bootstrap"]


def statistics_of(tpr: float, aupr: AuprRule) -> dict[str, Statistic]:
    """The rank metrics by name, each a function of the counts."""
    return {
        "AUROC": Counts.auroc,
        "AUPR-IN": partial(Counts.aupr, positive="id", rule=aupr),
        "AUPR-OUT": partial(Counts.aupr, positive="ood", rule=aupr),
        fpr_key(tpr, "id"): partial(Counts.fpr, positive="id", rule="nearest", tpr=tpr),
        fpr_key(tpr, "ood"): partial(Counts.fpr, positive="ood", rule="at_least", tpr=tpr),
    }


def evaluate(
    id_scores: Any,
    ood_scores: Any,
    *,
    higher: Orientation | None = None,
    tpr: float = 0.95,
    aupr: AuprRule = "ap",
    autc: bool = False,
    intervals: bool | Intervals | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """How well scores tell ID from OOD images: AUROC, both AUPR, both FPR readings.

    ``AUROC``: P(S_id > S_ood) + P(equal) / 2. ``AUPR-IN``, ``AUPR-OUT``: area under precision and
    recall with ID or OOD positive. ``FPR95-ID``: share of OOD accepted when 95 % of ID is, nearest
    recall (MCM, GL-MCM, LoCoOp, SeTAR). ``FPR95-OOD``: share of ID rejected when 95 % of OOD is,
    first recall >= 0.95 (OpenOOD, pytorch-ood). The number follows ``tpr``: ``FPR97.5-ID``.

    Args:
        id_scores: (n,) numpy array, torch tensor (any device and float dtype), sequence or
            ``Scores``. Integers are ranked exactly; booleans are refused.
        ood_scores: (m,) likewise.
        higher: what a higher score means in raw arrays: ``"id"`` (the default) or ``"ood"``.
            ``Scores`` know; a contradiction is an error.
        tpr: recall of the FPR entries, a fraction in (0, 1].
        aupr: ``"ap"`` (average precision, MCM line) or ``"trapezoid"`` (OpenOOD, pytorch-ood).
        autc: add ``AUTC`` (see :func:`fastood.metrics.autc`).
        intervals: None for none; ``"delong"`` for AUROC only (fast); ``"bootstrap"`` for all rank
            metrics; True for DeLong on AUROC and bootstrap on the others.
        confidence: level of the intervals.
        resamples: bootstrap resamples, stratified, percentile interval. Where the metric sits at a
            border (FPR 0, AUPR 1) such an interval has no width and says little.
        seed: of the bootstrap.

    Returns:
        :class:`Metrics`, a dict of fractions in [0, 1]; ``.intervals`` maps names to (low, high).

    Raises:
        TypeError: for booleans or things that are not numbers.
        ValueError: for no scores, NaN or infinite scores (with the rows), another shape,
            conflicting orientations or score keys, or options out of range.

    Warns:
        UserWarning: once, if all scores are equal (AUROC 0.5, FPR 1) or have few distinct values.

    Notes:
        Exact in the presence of ties, independent of the range of the scores, deterministic.
        Checked against scikit-learn, pytorch-ood and the published MCM and GL-MCM tables.

    Example:
        >>> found = evaluate([0.9, 0.8, 0.7, 0.4], [0.5, 0.3, 0.2])
        >>> round(found["AUROC"], 4), found["FPR95-ID"] == 1 / 3, found["FPR95-OOD"]
        (0.9167, True, 0.25)
    """
    tpr = check_tpr(tpr)
    check_choice("aupr", aupr, ("ap", "trapezoid"))
    confidence = check_confidence(confidence)
    resamples = check_resamples(resamples)
    if not isinstance(intervals, bool) and intervals is not None:
        check_choice("intervals", intervals, ("delong", "bootstrap"))
    pair = read_pair(id_scores, ood_scores, higher)
    counts = Counts.of(*pair)
    warn_if_tied(len(counts.id), counts.n_id + counts.n_ood, stacklevel=2)
    statistics = statistics_of(tpr, aupr)
    found = {name: statistic(counts) for name, statistic in statistics.items()}
    if autc:
        found["AUTC"] = autc_of(pair)
    bounds: dict[str, tuple[float, float]] = {}
    replicates: dict[str, np.ndarray] = {}
    if intervals:
        check_two_each(counts.n_id, counts.n_ood, "intervals")
        if intervals != "delong":
            replicates = _replicates(pair, statistics, resamples, seed)
            bounds = {
                name: percentile_interval(drawn, confidence) for name, drawn in replicates.items()
            }
        if intervals != "bootstrap":
            bounds = {**bounds, "AUROC": auroc_interval(counts, confidence)}
    return Metrics(
        found,
        n_id=counts.n_id,
        n_ood=counts.n_ood,
        tpr=tpr,
        aupr_rule=aupr,
        intervals=bounds,
        confidence=confidence if bounds else None,
        replicates=replicates,
        draw=(seed, resamples, zlib.crc32(pair.id.tobytes())) if replicates else None,
    )


def _replicates(
    pair: Pair, statistics: dict[str, Statistic], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    layout = Layout.of(*pair)
    found = resample(
        [layout],
        statistics,
        sizes=(len(pair.id), len(pair.ood)),
        resamples=resamples,
        seed=seed,
        # By ranks alone, so that a monotone transform of the scores changes no interval.
        ood_salt=zlib.crc32(layout.is_ood.tobytes()),
    )
    return {name: drawn[0] for name, drawn in found.items()}
