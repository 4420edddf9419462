"""Beta and binomial probabilities, without scipy: what order statistics of n scores promise."""

from __future__ import annotations

import math

__all__ = ["beta_cdf", "beta_interval", "quantile_ranks"]

_TINY = 1e-300


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Args:
        x: any float; 0 below 0 and 1 above 1.
        a: > 0.
        b: > 0.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - beta_cdf(1.0 - x, b, a)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # Modified Lentz evaluation; about sqrt(max(a, b)) steps are needed.
    numerator, denominator = 1.0, 1.0 / _apart(1.0 - (a + b) * x / (a + 1.0))
    fraction = denominator
    for m in range(1, 200 + 10 * math.isqrt(int(max(a, b)) + 1)):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            denominator = 1.0 / _apart(1.0 + step * denominator)
            numerator = _apart(1.0 + step / numerator)
            change = numerator * denominator
            fraction *= change
        if abs(change - 1.0) < 1e-15:
            break
    return min(1.0, math.exp(log_front) * fraction / a)


def _apart(value: float) -> float:
    """Keep a divisor away from zero, as Lentz' method asks."""
    return value if abs(value) > _TINY else _TINY


def beta_interval(a: float, b: float, confidence: float) -> tuple[float, float]:
    """Central interval of a Beta(a, b) variable, by bisection."""
    tail = (1 - confidence) / 2
    return _quantile(a, b, tail), _quantile(a, b, 1 - tail)


def _quantile(a: float, b: float, probability: float) -> float:
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
        if high - low < 1e-13:
            return (low + high) / 2


def quantile_ranks(n: int, share: float, confidence: float) -> tuple[int, int]:
    """Ranks l < u whose order statistics enclose the true ``share`` quantile.

    X_(l) <= q <= X_(u) with probability at least ``confidence`` for any distribution, since the
    number of scores below q is binomial; each side errs with at most (1 - confidence) / 2.

    Returns:
        1-based ranks; 0 stands for minus infinity and n + 1 for plus infinity.
    """
    tail = (1 - confidence) / 2

    def at_most(k: int) -> float:  # P(Binomial(n, share) <= k)
        if k < 0:
            return 0.0
        return 1.0 if k >= n else beta_cdf(1.0 - share, n - k, k + 1)

    low, high = 0, n  # largest l with P(Bin <= l - 1) <= tail
    while low < high:
        middle = (low + high + 1) // 2
        if at_most(middle - 1) <= tail:
            low = middle
        else:
            high = middle - 1
    lower = low
    low, high = 1, n + 1  # smallest u with P(Bin <= u - 1) >= 1 - tail
    while low < high:
        middle = (low + high) // 2
        if at_most(middle - 1) >= 1 - tail:
            high = middle
        else:
            low = middle + 1
    return lower, low
