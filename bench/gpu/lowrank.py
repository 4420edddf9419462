"""Who drops the smallest components of a set of weights, for all ratios of a search.

``fastood`` decomposes each weight once. Baselines: the same by ``torch.linalg.eigh`` in float64,
and a full SVD of one matrix of the set, as the published code has it (there once for every ratio).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.gpu.accuracy import Accuracy, Bound
from bench.gpu.cases import LOW_RANK, RATIOS, Case, tiny_weights
from bench.gpu.inputs import Target
from bench.gpu.work import Variant, Work

__all__ = ["build"]

_CHECKED = (0, -1)
"""Matrices compared with a float64 SVD: one takes as long as all the rest."""


def weights_of(n: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(N, m, n) with a spectrum as flat as a transformer's: noise, and a few larger directions."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(n, rows, columns, generator=g)
    left, right = torch.randn(n, rows, 8, generator=g), torch.randn(n, 8, columns, generator=g)
    return ((noise + 0.5 * left @ right) / columns**0.5).to(device)


def counts_of(columns: int) -> list[int]:
    return [max(1, round(ratio * columns)) for ratio in RATIOS]


def by_fastood(weights: Tensor, counts: list[int]) -> Sequence[Tensor]:
    from fastood.ops.lowrank import drop_tails, tail_basis

    return drop_tails(weights, tail_basis(weights), counts)


def by_eigh(weights: Tensor, counts: list[int]) -> Sequence[Tensor]:
    wide = weights.double()
    _, vectors = torch.linalg.eigh(wide.mT @ wide)
    return [
        weights - ((wide @ vectors[..., :c]) @ vectors[..., :c].mT).to(weights.dtype)
        for c in counts
    ]


def by_svd_of_one(weights: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """Of the first: torch takes them one by one, a second each."""
    u, s, vh = torch.linalg.svd(weights[:1], full_matrices=False)
    keep = [s.shape[-1] - c for c in counts]
    return [(u[..., :k] * s[..., None, :k]) @ vh[..., :k, :] for k in keep]


def truth_of(weights: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """Of the checked matrices, in float64: right singular vectors by QR and SVD, no Gram matrix."""
    wide = weights[list(_CHECKED)].double()
    triangle = torch.linalg.qr(wide, mode="r").R
    # on the CPU a second each, on a GPU ten
    vectors = torch.linalg.svd(triangle.cpu(), full_matrices=False).Vh.mT.to(wide.device)
    return [wide - (wide @ vectors[..., -c:]) @ vectors[..., -c:].mT for c in counts]


def judge(result: Sequence[Tensor], truth: Sequence[Tensor], bound: Bound) -> Accuracy:
    """The worst relative Frobenius error over the ratios and the checked matrices."""
    worst = 0.0
    for found, want in zip(result, truth, strict=True):
        for place, matrix in zip(_CHECKED[: len(found)], want, strict=False):
            error = torch.linalg.norm(found[place].double() - matrix) / torch.linalg.norm(matrix)
            worst = max(worst, float(error.nan_to_num(float("inf"))))
    wrong = None
    if worst > bound.relative:
        wrong = f"relative Frobenius error {worst:.3g}, allowed {bound.relative:g}"
    return Accuracy(worst, worst, None, None, wrong)


def build(case: Case, target: Target) -> Work:
    sizes = LOW_RANK[case.label]
    if not target.gpu:
        sizes = tiny_weights(sizes)
    weights = weights_of(*sizes, target.device)
    counts = counts_of(sizes.columns)
    calls = {"fastood": by_fastood, "eager eigh": by_eigh, "torch svd, one": by_svd_of_one}
    variants = [
        Variant(
            name,
            lambda _, f=call: f(weights, counts),
            "ours" if name == "fastood" else "other",
            "fp32" if call is by_svd_of_one else "fp64 / fp32",
            Bound(1e-5) if name == "fastood" else None,
            capturable=False,
            copies=1,
        )
        for name, call in calls.items()
    ]
    n, m, k = sizes
    return Work(
        case,
        variants,
        truth=lambda: truth_of(weights, counts),
        copies=1,
        flops=2.0 * n * m * k * k + 4.0 * n * m * k * sum(counts),
        moved=4.0 * n * m * k * (1 + len(counts)),
        parts=lambda found: list(found),
        judge=judge,
    )
