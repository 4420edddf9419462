"""Scores that need training features: Mahalanobis distance and nearest neighbours.

Both come in two steps, so that what is learned once is kept: ``fit_*`` prepares a bank, the score
takes it in place of ``text``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastood.scores.inputs import (
    BLOCK,
    check_count,
    check_features,
    check_scalar,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)

__all__ = [
    "FIT_OPTIONS",
    "GaussianBank",
    "NeighbourBank",
    "fit_knn",
    "fit_mahalanobis",
    "knn",
    "mahalanobis",
]

FIT_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "mahalanobis": ("normalize", "eps", "shrinkage"),
    "knn": (),
}
"""Options that belong to the fit rather than to the score."""


@dataclass(frozen=True)
class GaussianBank:
    """Class means and the shared within-class covariance, whitened.

    Attributes:
        means: (C, D) float64, whitened class means.
        whiten: (D, D) float64, lower-triangular L^-1 with Σ = L L'.
        classes: (C,) the label values, in the order of ``means``.
        normalize: whether features are scaled to unit norm first.
    """

    means: Tensor
    whiten: Tensor
    classes: Tensor
    normalize: bool

    def to(self, device: torch.device | str) -> GaussianBank:
        """The same bank on another device."""
        return GaussianBank(
            self.means.to(device), self.whiten.to(device), self.classes.to(device), self.normalize
        )

    @property
    def digest(self) -> str:
        """Equal for equal bits: what a saved threshold knows of the fit."""
        return _digest(self.means, self.whiten)


def fit_mahalanobis(
    features: Tensor,
    labels: Tensor,
    *,
    normalize: bool = False,
    eps: float = 1e-6,
    shrinkage: float = 0.0,
) -> GaussianBank:
    """Class means and Σ = (1/N) Σ_i (f_i - μ_y)(f_i - μ_y)' + eps·I, in float64.

    The covariance is pooled *within* classes, as arXiv 1807.03888 defines it (MCM's code takes the
    total covariance and numbers classes by batch; neither is copied).

    Args:
        features: (N, D) training features.
        labels: (N,) integer labels; any values.
        normalize: unit features instead of raw ones (raw is MCM's default).
        eps: ridge added to the diagonal, >= 0, in squared feature units.
        shrinkage: share in [0, 1] of trace(Σ)/D · I mixed in.
    Raises:
        ValueError: on shapes that do not fit, fewer than two samples, NaN, Inf, or a covariance
            that is not positive definite (names the remedy).
    """
    x = check_features("features", features, (2,), "(N, D)")
    eps, shrinkage = check_scalar("eps", eps), check_scalar("shrinkage", shrinkage)
    if eps < 0 or not 0 <= shrinkage <= 1:
        raise ValueError(f"expected eps >= 0 and 0 <= shrinkage <= 1, got {eps} and {shrinkage}")
    y = torch.as_tensor(labels, device=x.device)
    if y.is_floating_point() or y.shape != (len(x),):
        raise ValueError(f"labels: expected ({len(x)},) integers, got {tuple(y.shape)} {y.dtype}")
    if len(x) < 2:
        raise ValueError(f"features: a covariance needs at least two samples, got {len(x)}")
    x = x.double()
    x = unit_rows(x) if normalize else x
    classes, index = y.unique(return_inverse=True)
    counts = torch.bincount(index).double()
    means = torch.zeros(len(classes), x.shape[1], dtype=x.dtype, device=x.device)
    means = means.index_add(0, index, x) / counts[:, None]
    centred = x - means[index]
    cov = centred.mT @ centred / len(x)
    scale = cov.diagonal().mean()
    eye = torch.eye(len(cov), dtype=x.dtype, device=x.device)
    cov = (1 - shrinkage) * cov + (shrinkage * scale + eps) * eye
    factor, info = torch.linalg.cholesky_ex(cov)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"covariance of {len(x)} samples in {x.shape[1]} dimensions is not positive definite; "
            f"give more samples, eps > {eps:g} or shrinkage > {shrinkage:g}"
        )
    whiten = torch.linalg.solve_triangular(factor, eye, upper=False)
    return GaussianBank(means @ whiten.mT, whiten, classes, normalize)


def mahalanobis(image: Tensor, bank: GaussianBank) -> Tensor:
    """max_k -(f - μ_k)' Σ⁻¹ (f - μ_k) / 2 over the classes of ``bank``.

    Source: arXiv 1807.03888, equation 2. Computed in float64 (the distances are differences of
    large numbers), returned as float32 unless the features are float64.

    Returns:
        (B,) <= 0; higher means in-distribution.
    Raises:
        ValueError: on mismatched D, NaN or Inf.
    """
    x = check_features("image", image, (2,), "(B, D)")
    check_width(x, bank.means, ("image", "bank means"))
    out = working(x[:0]).dtype
    x = x.double()
    w = (unit_rows(x) if bank.normalize else x) @ bank.whiten.mT
    squared = w.square().sum(-1, keepdim=True) - 2 * w @ bank.means.mT + bank.means.square().sum(-1)
    return (-squared.clamp_min(0).amin(-1) / 2).to(out)


@dataclass(frozen=True)
class NeighbourBank:
    """Unit training features.

    Attributes:
        features: (N, D), unit rows, float32 or float64.
    """

    features: Tensor

    def to(self, device: torch.device | str) -> NeighbourBank:
        """The same bank on another device."""
        return NeighbourBank(self.features.to(device))

    @property
    def digest(self) -> str:
        """Equal for equal bits: what a saved threshold knows of the fit."""
        return _digest(self.features)


def fit_knn(features: Tensor) -> NeighbourBank:
    """Unit-normalised copies of ``features (N, D)``.

    Raises:
        ValueError: on an empty bank, NaN, Inf or zero rows.
    """
    x = check_features("features", features, (2,), "(N, D)")
    if len(x) == 0:
        raise ValueError("features: nearest neighbours need at least one sample, got N = 0")
    return NeighbourBank(unit_rows(working(x)))


def knn(image: Tensor, bank: NeighbourBank, *, k: int = 50) -> Tensor:
    """-‖f - f_(k)‖: the distance to the k-th nearest unit training feature, negated.

    Ranks as the k-th largest cosine. The neighbour is found by cosine and its distance computed
    from the difference, since 2 - 2 cos loses a near neighbour's digits. Source: arXiv 2204.06507;
    k = 50 there for CIFAR-10, 1000 for all of ImageNet.

    Returns:
        (B,) in [-2, 0]; higher means in-distribution.
    Raises:
        ValueError: on mismatched D, k outside 1..N, NaN, Inf or zero rows.
    """
    x = check_features("image", image, (2,), "(B, D)")
    check_width(x, bank.features, ("image", "bank features"))
    n = len(bank.features)
    k = check_count("k", k, 1, n, high_name="N = ")
    z = unit_rows(working(x))
    known = bank.features.to(z.dtype)
    step = max(1, BLOCK // n)
    index = [
        matmul_classes(z[i : i + step].detach(), known).topk(k, dim=-1).indices[:, -1]
        for i in range(0, len(z), step)
    ]
    if not index:
        return z.new_zeros(0)
    return -torch.linalg.vector_norm(z - known[torch.cat(index)], dim=-1)


def _digest(*tensors: Tensor) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
