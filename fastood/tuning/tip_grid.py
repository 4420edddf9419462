"""The grid over Tip-Adapter's alpha and beta: every cell's accuracy from one pass over the images.

The published search takes, for each of 200 x 20 cells (beta outside, alpha inside),

    logits = γ z T' + alpha exp(-beta (1 - z Keys')) Y

with both products anew and Y as a dense one-hot matrix. Three observations leave one product and a
few passes over it, with the same counts:

1. The affinities z Keys' are the same in every cell.
2. c_k(beta) = Σ_{i in k} exp(-beta d_i), d = 1 - z Keys', is smooth in d: with d = m + h x and
   Chebyshev's exp(-beta d) = Σ_n b_n(beta) T_n(x), c_k(beta) = Σ_n b_n(beta) Σ_{i in k} T_n(x_i).
   Two dozen class sums T_n, made by a recurrence without any exp, serve all values of beta.
3. An image is right if alpha (c_k - c_y) <= γ (s_y - s_k) for every class k: classes with s_k < s_y
   bound alpha from above, those with s_k > s_y from below. One number of each per beta says for
   which alpha the image is right.

All of it is in float64. Where a bound comes so close to an alpha that the error of 2 could matter,
or a class ties with the label, that image and beta are evaluated directly, by the formula; the
counts are those of the formula in float64. Ties go to the lower class, as argmax has it.

Source: arXiv 2207.09519 and the authors' code for the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastood.scores.inputs import check_count, check_features, check_scalar, check_width, unit_rows
from fastood.tuning.inputs import labels_of
from fastood.tuning.tip_blocks import Block, Cache, images_at_once

__all__ = ["GridResult", "count_right", "grid_maxima", "published_grid", "search"]

_MAXIMA = {
    "imagenet": (7.0, 3.0),
    "oxfordpets": (7.0, 3.0),
    "food101": (10.0, 10.0),
    "stanfordcars": (20.0, 10.0),
    "caltech101": (12.0, 5.0),
}
"""(beta, alpha) at which the published grids end, without reaching them."""


@dataclass(frozen=True)
class GridResult:
    """What a search found.

    Attributes:
        alpha, beta: of the first cell that nothing before it equals, beta outside, alpha inside.
        right: (betas, alphas) int64, images classified right in each cell.
        images: N.
        betas, alphas: the grid.
    """

    alpha: float
    beta: float
    right: Tensor
    images: int
    betas: tuple[float, ...]
    alphas: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Of the chosen cell, in 0..1."""
        return int(self.right.max()) / self.images


def grid_maxima(dataset: str | None = None) -> tuple[float, float]:
    """(beta, alpha) where the published grid of ``dataset`` ends; ImageNet's for any other set."""
    key = "".join(ch for ch in (dataset or "imagenet").lower() if ch.isalnum())
    return _MAXIMA.get(key, _MAXIMA["imagenet"])


def published_grid(
    max_beta: float = 7.0, max_alpha: float = 3.0, *, steps: tuple[int, int] = (200, 20)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """betas and alphas: .1 + i (max - .1) / steps for i < steps, so that max is never reached.

    Raises:
        ValueError: maxima that are not positive, fewer than one step.
    """
    found = []
    for name, top, count in (("beta", max_beta, steps[0]), ("alpha", max_alpha, steps[1])):
        top = check_scalar(f"max_{name}", top)
        if top <= 0:
            raise ValueError(f"max_{name}: expected a number > 0, got {top!r}")
        count = check_count("steps", count, 1, None)
        found.append(tuple(i * (top - 0.1) / count + 0.1 for i in range(count)))
    return found[0], found[1]


def search(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    *,
    logit_scale: float = 100.0,
    betas: Sequence[float] | None = None,
    alphas: Sequence[float] | None = None,
) -> GridResult:
    """The cell of the grid with the most images right; the first of several.

    Args:
        features, labels, text, keys, key_labels, logit_scale: as for ``count_right``.
        betas, alphas: default the published grid of ImageNet.
    Raises:
        ValueError: as ``count_right``; no cell that classifies a single image right.
    """
    defaults = published_grid()
    betas = tuple(defaults[0] if betas is None else betas)
    alphas = tuple(defaults[1] if alphas is None else alphas)
    right = count_right(
        features, labels, text, keys, key_labels, betas, alphas, logit_scale=logit_scale
    )
    # the first of several equal maxima is where the last strict improvement happened
    cell = int(right.flatten().argmax())
    if int(right.flatten()[cell]) == 0:
        raise ValueError(
            f"labels: expected some of {len(labels)} images to be classified right in some cell, "
            "got none; do the labels belong to this class list?"
        )
    beta, alpha = divmod(cell, len(alphas))
    return GridResult(
        float(alphas[alpha]),
        float(betas[beta]),
        right,
        len(labels),
        tuple(map(float, betas)),
        tuple(map(float, alphas)),
    )


def count_right(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    betas: Sequence[float],
    alphas: Sequence[float],
    *,
    logit_scale: float = 100.0,
) -> Tensor:
    """Images classified right in every cell of a grid.

    Args:
        features: (N, D) images, any norm; labels: (N,) int64 in 0..K-1.
        text: (K, D) classes, any norm.
        keys: (M, D) cached features as they are multiplied (unit rows, or trained ones).
        key_labels: (M,) int64 in 0..K-1; any number for each class.
        betas, alphas: finite, at least 0.
        logit_scale: γ.
    Returns:
        (len(betas), len(alphas)) int64 on the CPU.
    Raises:
        ValueError: shapes and widths that do not fit, no image, labels outside 0..K-1, negative
            alpha or beta.
    Notes:
        No N x M matrix is kept. Deterministic.
    """
    z = check_features("features", features, (2,), "(N, D)")
    if len(z) == 0:
        raise ValueError(
            "features: expected at least one validation image to choose alpha and beta on, got "
            "none; without validation data give alpha and beta"
        )
    check_features("text", text, (2,), "(K, D)")
    check_features("keys", keys, (2,), "(M, D)")
    check_width(z, text, ("features", "text"))
    check_width(z, keys, ("features", "keys"))
    y = _labels("labels", labels, z, len(text))
    owners = _labels("key_labels", key_labels, keys, len(text))
    beta, alpha = _axis("betas", betas), _axis("alphas", alphas)
    gamma = check_scalar("logit_scale", logit_scale)
    with torch.no_grad():
        step = images_at_once(len(z), len(keys))
        cache = Cache(keys, owners, len(text), step)
        t = unit_rows(text.double())
        total = torch.zeros(len(beta), len(alpha), dtype=torch.int64)
        for start in range(0, len(z), step):
            rows = slice(start, start + step)
            block = Block(unit_rows(z[rows].double()), y[rows], t, cache, gamma)
            total += block.count(beta.to(z.device), alpha.to(z.device)).cpu()
    return total


def _labels(name: str, labels: Tensor, rows: Tensor, k: int) -> Tensor:
    try:
        return labels_of(labels, rows, k)
    except ValueError as error:
        raise ValueError(str(error).replace("labels:", f"{name}:", 1)) from None


def _axis(name: str, values: Sequence[float]) -> Tensor:
    found = torch.tensor([check_scalar(name, v) for v in values], dtype=torch.float64)
    if len(found) == 0 or bool((found < 0).any()):
        raise ValueError(f"{name}: expected at least one number, all >= 0, got {list(values)[:5]}")
    return found
