"""DeLong's variance of the AUROC, alone and for two methods on the same images.

DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988). With the structural components

    V_id(i) = mean over OOD images j of [S_i > S_j] + [S_i = S_j] / 2,   V_ood(j) likewise,

the AUROC is the mean of either, and its variance is var(V_id) / n + var(V_ood) / m. The components
come from sorting in O((n + m) log(n + m)), after Sun and Xu, IEEE Signal Processing Letters 21
(2014); no n x m table is built.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastood.metrics.counts import Counts
from fastood.metrics.inputs import Pair
from fastood.metrics.normal import z_of

__all__ = ["Components", "auroc_interval", "auroc_variance", "components"]


class Components(NamedTuple):
    """Structural components of one method, in image order."""

    id: np.ndarray
    ood: np.ndarray


def components(pair: Pair) -> Components:
    """Per image, the share of the other side that it is ranked correctly against."""
    id_sorted, ood_sorted = np.sort(pair.id), np.sort(pair.ood)
    n, m = len(id_sorted), len(ood_sorted)
    below = np.searchsorted(ood_sorted, pair.id, side="left")
    upto = np.searchsorted(ood_sorted, pair.id, side="right")
    under = np.searchsorted(id_sorted, pair.ood, side="left")
    over = np.searchsorted(id_sorted, pair.ood, side="right")
    return Components((below + upto) / (2 * m), 1 - (under + over) / (2 * n))


def check_two_each(n: int, m: int, what: str) -> None:
    """A variance needs two observations a side."""
    if n < 2 or m < 2:
        raise ValueError(f"{what}: expected at least 2 ID and 2 OOD scores, got {n} and {m}")


def auroc_variance(counts: Counts) -> float:
    """DeLong's variance of the AUROC, unbiased in each component."""
    n, m = counts.n_id, counts.n_ood
    check_two_each(n, m, "DeLong variance")
    id_at, ood_at = np.diff(counts.id, prepend=0), np.diff(counts.ood, prepend=0)
    # Components per distinct score, weighted by how many images have it.
    v_id = (counts.ood - ood_at / 2) / m
    v_ood = 1 - (counts.id - id_at / 2) / n
    area = counts.auroc()
    var_id = float((id_at * (v_id - area) ** 2).sum()) / (n - 1)
    var_ood = float((ood_at * (v_ood - area) ** 2).sum()) / (m - 1)
    return var_id / n + var_ood / m


def auroc_interval(counts: Counts, confidence: float) -> tuple[float, float]:
    """Confidence interval of the AUROC on the logit scale, so that it stays within (0, 1).

    logit(A) -+ z se / (A (1 - A)), se from DeLong. At A = 0 or 1 that variance is zero whatever n
    is; the bound is then the exact (Clopper-Pearson) one for min(n, m) independent pairs, all
    ranked alike, which min(n, m) disjoint pairs of images are: conservative.
    """
    area = counts.auroc()
    pairs = min(counts.n_id, counts.n_ood)
    se = math.sqrt(auroc_variance(counts))
    if area in (0.0, 1.0):
        bound = ((1 - confidence) / 2) ** (1 / pairs)
        return (bound, 1.0) if area == 1.0 else (0.0, 1.0 - bound)
    logit = math.log(area / (1 - area))
    reach = z_of(confidence) * se / (area * (1 - area))
    return _expit(logit - reach), _expit(logit + reach)


def _expit(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    e = math.exp(max(x, -745.0))
    return e / (1 + e)
