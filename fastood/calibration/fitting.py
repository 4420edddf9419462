"""From ID scores to a threshold."""

from __future__ import annotations

import math
import warnings
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastood.calibration.beta import beta_interval, quantile_ranks
from fastood.calibration.threshold import RULES, Threshold, plain_options
from fastood.metrics.inputs import key_differences, key_of, orientation, values, warn_if_tied
from fastood.metrics.normal import check_confidence

if TYPE_CHECKING:
    from fastood.scores.result import Orientation, ScoreKey

__all__ = ["calibrate", "conformal_rank"]

Rule = Literal["conformal", "percentile"]


def _exact(tpr: float | str | Decimal | Fraction) -> Fraction:
    """The fraction that was meant: 0.9 is 9/10, not the nearest binary number."""
    try:
        if isinstance(tpr, bool):
            raise ValueError
        share = tpr if isinstance(tpr, Fraction) else Fraction(str(tpr))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"tpr: expected a fraction in (0, 1), got {tpr!r}") from None
    if not 0 < share < 1:
        hint = "; is it in percent?" if 1 < share <= 100 else ""
        raise ValueError(f"tpr: expected a fraction in (0, 1), got {tpr!r}{hint}")
    return share


def conformal_rank(n: int, tpr: float | str | Decimal | Fraction) -> int:
    """k = floor((1 - tpr) (n + 1)), in exact fractions.

    Float arithmetic is one too small for thousands of n at tpr 0.9, since 1 - 0.9 is a little
    less than 0.1 in binary.

    Example:
        >>> conformal_rank(99, 0.9), int((1 - 0.9) * 100)
        (10, 9)
    """
    return math.floor((1 - _exact(tpr)) * (n + 1))


def calibrate(
    id_scores: Any,
    *,
    tpr: float | str | Decimal | Fraction = 0.95,
    rule: Rule = "conformal",
    higher: Orientation | None = None,
    key: ScoreKey | None = None,
    source: str | None = None,
    confidence: float = 0.95,
) -> Threshold:
    """Threshold that accepts a share ``tpr`` of ID images, from held-out ID scores alone.

    ``"conformal"``: the k-th smallest of n scores, k = floor((1 - tpr) (n + 1)); a new ID image
    exchangeable with them is accepted with probability at least ``tpr`` (exactly 1 - k / (n + 1)
    without ties). With k = 0 nothing can be rejected: the threshold is infinite, with a warning.
    ``"percentile"``: the linear (1 - tpr) percentile (as CRoFT), without that guarantee.
    An image is OOD if its score is strictly below the threshold.

    Given a calibration, the accepted share of new ID images follows Beta(n + 1 - k, k):
    ``acceptance`` is its central interval. ``interval`` encloses the true (1 - tpr) quantile by two
    order statistics (binomial, valid for any distribution). Ties only let more images be accepted.

    Args:
        id_scores: (n,) ``Scores``, array, tensor or sequence; of images that were used neither for
            training nor for tuning, and that come from where the threshold will be used.
        tpr: share of ID images to accept, in (0, 1), read as the decimal number it prints as.
        rule: ``"conformal"`` or ``"percentile"``.
        higher: what a higher score means in raw arrays, "id" unless given; ``Scores`` know.
        key: what raw scores are, so that the threshold can refuse others; ``Scores`` carry theirs.
        source: name of the calibration images; by default the name the ``Scores`` carry.
        confidence: level of both intervals.

    Returns:
        :class:`Threshold`, in the orientation of the scores.

    Raises:
        TypeError: for things that are not scores.
        ValueError: for no scores, NaN or infinite ones, options out of range, an orientation or key
            that contradicts the scores.

    Warns:
        UserWarning: if n is too small to reject anything, or the scores are constant or collapsed.

    Example:
        >>> found = calibrate([float(i) for i in range(99)], tpr=0.9)
        >>> found.threshold, found.expected_acceptance, found.interval
        (9.0, 0.9, (3.0, 16.0))
    """
    share = _exact(tpr)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    confidence = check_confidence(confidence)
    found = values(id_scores, "id_scores").astype(np.float64)
    up = orientation(id_scores, higher, "id_scores")
    carried = key_of(id_scores)
    if key is not None and carried is not None:
        differing = key_differences(carried, key, unknown_agrees=False)
        if differing:
            raise ValueError(f"key: contradicts id_scores: {'; '.join(differing)}")
    key = key or carried
    ranked = np.sort(found if up == "id" else -found)
    n = len(ranked)
    _warn_about(ranked, share, rule)

    if rule == "conformal":
        at = Fraction(conformal_rank(n, share))
    else:
        at = (n - 1) * (1 - share) + 1  # a rank too, but rarely a whole one
    low = math.floor(at)
    high = low if at == low else low + 1
    threshold = _order_statistic(ranked, low)
    if high > low:
        part = float(at - low)
        threshold = threshold * (1 - part) + _order_statistic(ranked, high) * part
    strict, loose = (_acceptance(n, k, confidence) for k in (high, low))
    first, last = quantile_ranks(n, float(1 - share), confidence)
    bounds = _order_statistic(ranked, first), _order_statistic(ranked, last)
    if up == "ood":
        threshold, bounds = -threshold, (-bounds[1], -bounds[0])
    return Threshold(
        threshold=threshold,
        higher=up,
        tpr=float(share),
        rule=rule,
        n=n,
        interval=bounds,
        expected_acceptance=float(1 - at / (n + 1)),
        acceptance=(strict[0], loose[1]),
        confidence=confidence,
        score=key.score if key else None,
        options=plain_options(key.options) if key else {},
        model=key.model if key else None,
        prompts=key.prompts if key else None,
        source=source if source is not None else str(getattr(id_scores, "name", "") or ""),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _order_statistic(ranked: np.ndarray, rank: int) -> float:
    """1-based; infinite on either side of the sample."""
    if rank < 1:
        return -math.inf
    return math.inf if rank > len(ranked) else float(ranked[rank - 1])


def _acceptance(n: int, rank: int, confidence: float) -> tuple[float, float]:
    """Central interval of the ID share at or above the order statistic of that rank."""
    return (1.0, 1.0) if rank < 1 else beta_interval(n + 1 - rank, rank, confidence)


def _warn_about(ranked: np.ndarray, share: Fraction, rule: str) -> None:
    n, distinct = len(ranked), 1 + int(np.count_nonzero(np.diff(ranked)))
    if rule == "conformal" and conformal_rank(n, share) == 0:
        warnings.warn(
            f"{n} ID scores cannot support tpr {float(share):g}: the threshold is infinite and "
            f"nothing will be called OOD; give at least {math.ceil(1 / (1 - share)) - 1} scores",
            UserWarning,
            stacklevel=3,
        )
    elif n > 1 and distinct == 1:
        warnings.warn(
            f"all {n} ID scores are equal: the threshold lies on them and means little; usual "
            f"causes: a saturated softmax (raise tau), half-precision scores, or one class only",
            UserWarning,
            stacklevel=3,
        )
    else:
        warn_if_tied(distinct, n, stacklevel=3)
