"""Single metrics: AUROC, AUPR, FPR at a recall, AUTC, and the ROC curve for plots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastood.metrics.counts import AuprRule, Counts, FprRule, Side
from fastood.metrics.inputs import Pair, read_pair

if TYPE_CHECKING:
    from fastood.scores.result import Orientation

__all__ = ["aupr", "auroc", "autc", "fpr", "fpr95", "roc"]


def check_tpr(tpr: float) -> float:
    """A recall in (0, 1] as a Python float."""
    try:
        value = math.nan if isinstance(tpr, str | bool) else float(tpr)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 < value <= 1.0:
        hint = "; is it in percent?" if 1.0 < value <= 100.0 else ""
        raise ValueError(f"tpr: expected a fraction in (0, 1], got {tpr!r}{hint}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of a few words."""
    if value not in choices:
        words = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {words}, got {value!r}")


def _counts(id_scores: Any, ood_scores: Any, higher: Orientation | None) -> Counts:
    return Counts.of(*read_pair(id_scores, ood_scores, higher))


def auroc(id_scores: Any, ood_scores: Any, *, higher: Orientation | None = None) -> float:
    """Probability that a random ID image scores higher than a random OOD image.

    P(S_id > S_ood) + P(S_id = S_ood) / 2, the same for either positive class. Exact: an integer
    count and one float64 division.

    Args:
        id_scores: n scores; array, tensor, sequence or ``Scores``.
        ood_scores: m scores, likewise.
        higher: what a higher score means in raw arrays, "id" unless given.

    Returns:
        a fraction in [0, 1].

    Raises:
        TypeError, ValueError: for scores that cannot be ranked (see ``fastood.metrics.evaluate``).

    Example:
        >>> auroc([0.9, 0.8, 0.5], [0.5, 0.1])
        0.9166666666666666
    """
    return _counts(id_scores, ood_scores, higher).auroc()


def aupr(
    id_scores: Any,
    ood_scores: Any,
    *,
    positive: Side,
    rule: AuprRule = "ap",
    higher: Orientation | None = None,
) -> float:
    """Area under the precision-recall curve.

    Over the distinct thresholds from the strictest, with recall R and precision P:
    ``"ap"`` is the step sum of (R_i - R_{i-1}) P_i (scikit-learn's average precision, used by the
    MCM line); ``"trapezoid"`` is the sum of (R_i - R_{i-1}) (P_i + P_{i-1}) / 2 with P_0 = 1
    (OpenOOD, pytorch-ood).

    Args:
        id_scores: n scores.
        ood_scores: m scores.
        positive: ``"id"`` (AUPR-IN) or ``"ood"`` (AUPR-OUT).
        rule: ``"ap"`` or ``"trapezoid"``.
        higher: what a higher score means in raw arrays, "id" unless given.

    Returns:
        a fraction in [0, 1]; it depends on the ratio of n to m, unlike AUROC.

    Example:
        >>> aupr([0.9, 0.8], [0.5, 0.1], positive="ood")
        1.0
    """
    check_choice("positive", positive, ("id", "ood"))
    check_choice("rule", rule, ("ap", "trapezoid"))
    return _counts(id_scores, ood_scores, higher).aupr(positive, rule)


def fpr(
    id_scores: Any,
    ood_scores: Any,
    *,
    positive: Side,
    rule: FprRule | None = None,
    tpr: float = 0.95,
    higher: Orientation | None = None,
) -> float:
    """False positive rate at a given recall, in either of the two readings found in papers.

    ``positive="id"``: share of OOD images accepted when a share ``tpr`` of ID images is (MCM,
    GL-MCM, LoCoOp, SeTAR). ``positive="ood"``: share of ID images rejected when a share ``tpr``
    of OOD images is (OpenOOD, pytorch-ood). They differ on real data and can reverse a ranking.

    The threshold is one of the distinct scores:
    ``"nearest"``: the recall nearest to ``tpr`` (distance of tp / n in float64), searched from full
    recall downwards, the first of equally near ones; so normally the lowest such threshold
    (bit-compatible with the code of the MCM line).
    ``"at_least"``: the strictest threshold with recall >= ``tpr``.

    Args:
        id_scores: n scores.
        ood_scores: m scores.
        positive: which class recall is about.
        rule: by default ``"nearest"`` for ID positive and ``"at_least"`` for OOD positive, as in
            the projects named above.
        tpr: recall, a fraction in (0, 1].
        higher: what a higher score means in raw arrays, "id" unless given.

    Returns:
        a fraction in [0, 1]; 1 if all scores are equal.

    Example:
        >>> id_scores, ood_scores = [0.9, 0.8, 0.7, 0.2], [0.5, 0.1]
        >>> fpr(id_scores, ood_scores, positive="id", tpr=0.75)
        0.5
        >>> fpr(id_scores, ood_scores, positive="id", rule="at_least", tpr=0.75)
        0.0
    """
    check_choice("positive", positive, ("id", "ood"))
    if rule is None:
        rule = "nearest" if positive == "id" else "at_least"
    check_choice("rule", rule, ("nearest", "at_least"))
    level = check_tpr(tpr)
    return _counts(id_scores, ood_scores, higher).fpr(positive, rule, level)


def fpr95(
    id_scores: Any,
    ood_scores: Any,
    *,
    positive: Side,
    rule: FprRule | None = None,
    higher: Orientation | None = None,
) -> float:
    """:func:`fpr` at recall 0.95.

    Example:
        >>> fpr95([3.0, 2.0], [2.5, 1.0], positive="id")
        0.5
    """
    return fpr(id_scores, ood_scores, positive=positive, rule=rule, higher=higher)


def autc_of(pair: Pair) -> float:
    """AUTC of oriented scores; see :func:`autc`."""
    low = float(min(pair.id.min(), pair.ood.min()))
    high = float(max(pair.id.max(), pair.ood.max()))
    if low == high:
        return math.nan
    # Halved first, so that the range of scores near the largest float does not overflow.
    span = high / 2 - low / 2
    if span == 0.0:  # two neighbouring subnormals: halving made them equal
        span, half = high - low, 1.0
    else:
        half = 0.5
    id_u = ((high * half - pair.id.astype(np.float64) * half) / span).mean()
    ood_u = ((high * half - pair.ood.astype(np.float64) * half) / span).mean()
    return float((id_u + (1.0 - ood_u)) / 2)


def autc(id_scores: Any, ood_scores: Any, *, higher: Orientation | None = None) -> float:
    """Area under the threshold curve, lower is better.

    (mean_ID u + mean_OOD (1 - u)) / 2 with u the OOD score min-max scaled over the evaluated set.
    arXiv 2306.14658 assumes scores in [0, 1]; the scaling is pytorch-ood's. Unlike the rank
    metrics it changes under monotone transforms and with single extreme scores.

    Args:
        id_scores: n scores.
        ood_scores: m scores.
        higher: what a higher score means in raw arrays, "id" unless given.

    Returns:
        a fraction in [0, 1], NaN if all scores are equal.

    Example:
        >>> autc([1.0, 0.75], [0.0, 0.25])
        0.125
    """
    return autc_of(read_pair(id_scores, ood_scores, higher))


def roc(
    id_scores: Any,
    ood_scores: Any,
    *,
    positive: Side = "id",
    higher: Orientation | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve as its corner points.

    One point per distinct score, from (0, 0) to (1, 1), without those that lie exactly (in
    integers) on a straight line between their neighbours; the area under the polygon is the AUROC.

    Args:
        id_scores: n scores.
        ood_scores: m scores.
        positive: the class whose recall is on the vertical axis.
        higher: what a higher score means in raw arrays, "id" unless given.

    Returns:
        false and true positive rates, two ascending float64 arrays of one length.

    Example:
        >>> false_rate, true_rate = roc([3.0, 2.0], [2.5, 1.0])
        >>> false_rate.tolist(), true_rate.tolist()
        ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    check_choice("positive", positive, ("id", "ood"))
    tp, fp = (
        np.concatenate(([0], side))
        for side in _counts(id_scores, ood_scores, higher).curve(positive)
    )
    up, right = np.diff(tp), np.diff(fp)
    corner = np.ones(len(tp), dtype=bool)
    corner[1:-1] = up[:-1] * right[1:] != up[1:] * right[:-1]
    return fp[corner] / fp[-1], tp[corner] / tp[-1]
