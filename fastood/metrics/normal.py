"""The normal distribution and the Wilson interval, without scipy."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["check_confidence", "two_sided_p", "wilson", "z_of"]


def check_confidence(confidence: float, name: str = "confidence") -> float:
    """A confidence level in (0, 1) as a Python float."""
    value = float(confidence)
    if not 0.0 < value < 1.0:
        hint = "; is it in percent?" if 1.0 < value <= 100.0 else ""
        raise ValueError(f"{name}: expected a fraction in (0, 1), got {confidence!r}{hint}")
    return value


def z_of(confidence: float) -> float:
    """Two-sided normal quantile, 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def two_sided_p(z: float) -> float:
    """P(abs(Z) >= abs(z)), accurate far into the tail."""
    return math.erfc(abs(z) / math.sqrt(2.0))


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); keeps its coverage near 0 and 1.

    Args:
        successes: 0 <= successes <= n.
        n: trials, at least 1.
        confidence: fraction in (0, 1).

    Example:
        >>> low, high = wilson(10, 10)
        >>> round(low, 4), high
        (0.7225, 1.0)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = z_of(check_confidence(confidence))
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The formula reaches the borders exactly; floating point only nearly does.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high
