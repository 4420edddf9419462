"""Stratified percentile bootstrap over images, one resample at a time.

ID and OOD images are drawn with replacement, each side to its own size. The scores are ranked
once; a resample is a weight per image and two cumulated sums, so 1,000 resamples of 60,000 scores
take seconds and memory stays at a few arrays of n + m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fastood.metrics.counts import Counts, Layout

__all__ = ["Statistic", "check_resamples", "percentile_interval", "resample", "weights"]

Statistic = Callable[[Counts], float]


def check_resamples(resamples: int) -> int:
    """Number of resamples, an integer large enough for a percentile."""
    if isinstance(resamples, bool) or not isinstance(resamples, (int, np.integer)):
        raise TypeError(f"resamples: expected an integer, got {resamples!r}")
    if resamples < 100:
        raise ValueError(f"resamples: expected at least 100 for a tail quantile, got {resamples}")
    return int(resamples)


def weights(n: int, m: int, resamples: int, seed: int, ood_salt: int = 0) -> Iterator[np.ndarray]:
    """How often each image was drawn, (n + m,) int64 per resample; the same for equal arguments.

    The two sides have streams of their own: evaluations of one ID set against several OOD sets
    share their ID draws, and with different salts draw independently from the OOD sets.
    """
    id_rng, ood_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, ood_salt])
    for _ in range(resamples):
        yield np.concatenate(
            (
                np.bincount(id_rng.integers(n, size=n), minlength=n),
                np.bincount(ood_rng.integers(m, size=m), minlength=m),
            )
        )


def resample(
    layouts: Sequence[Layout],
    statistics: Mapping[str, Statistic],
    *,
    sizes: tuple[int, int],
    resamples: int,
    seed: int,
    ood_salt: int = 0,
) -> dict[str, np.ndarray]:
    """Bootstrap replicates of every statistic for every layout, with shared draws.

    Args:
        layouts: one per method; all over the same n + m images.
        statistics: functions of :class:`Counts`.
        sizes: (n, m).
        resamples: number of replicates.
        seed: of the draws.
        ood_salt: makes the OOD draws differ from those of another OOD set of equal size.

    Returns:
        for each statistic a (methods, resamples) float64 array.
    """
    found = {name: np.empty((len(layouts), resamples)) for name in statistics}
    for draw, weight in enumerate(weights(*sizes, resamples, seed, ood_salt)):
        for method, layout in enumerate(layouts):
            counts = layout.counts(weight)
            for name, statistic in statistics.items():
                found[name][method, draw] = statistic(counts)
    return found


def percentile_interval(replicates: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central share ``confidence`` of the replicates, by linear percentiles."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)
