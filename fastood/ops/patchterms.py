"""Ranks and entropies of patches, without gradients: what a search over low-rank weights adds up.

Letters: N patches, D width, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastood.ops.library import define

__all__ = ["PatchTerms", "patch_terms", "terms_of"]

_SMALL = 1e-5  # inside the logarithm, as in the authors' code
_BLOCK = 1 << 18  # most logits at a time on the CPU: what is read again is still in cache
_BLOCK_GPU = 1 << 26


class PatchTerms(NamedTuple):
    """Of N patches with logits l (N, K) and p = softmax(l)."""

    rank: Tensor
    """(N,) int32: classes before the label, by (logit descending, index ascending)."""
    tied: Tensor
    """(N,) bool: whether classes of the label's very logit decide that rank >= top_k."""
    entropy: Tensor
    """(N,) float64: Σ_k p_k log(p_k + 1e-5) where rank >= top_k, 0 elsewhere."""


def patch_terms(
    local: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    top_k: int,
    panels: Tensor | None = None,
) -> PatchTerms:
    """The terms of ``local (N, D)`` with logits local weight' + bias, without keeping these.

    By the kernels where they are loaded: they take float32, and rows of ``weight`` that are not
    zero. Else as ``terms_of``.

    Args:
        weight, bias: (K, D) and (K,) or None; labels: (N,) int64 in 0..K-1.
        panels: ``weight`` as ``fused.score_panels`` packs it, if that is at hand.
    Raises:
        ValueError: NaN or Inf in ``local`` or the logits, labels outside 0..K-1 (CPU kernels).
    """
    return PatchTerms(*torch.ops.fastood.patch_terms(local, weight, panels, bias, labels, top_k))


def terms_of(
    local: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, top_k: int
) -> PatchTerms:
    """The same in plain torch, for any device and in the precision of ``local``.

    A row whose logits are not finite has entropy NaN.
    """
    n, k = len(local), len(weight)
    dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
    columns = weight.to(dtype).t()
    step = max(1, (_BLOCK if local.is_cpu else _BLOCK_GPU) // k)
    index = torch.arange(k, device=local.device)
    rank = local.new_empty(n, dtype=torch.int32)
    tied = local.new_zeros(n, dtype=torch.bool)
    entropy = local.new_empty(n, dtype=torch.float64)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        x, y = local[rows].to(dtype), labels[rows, None]
        s = x @ columns if bias is None else torch.addmm(bias.to(dtype), x, columns)
        own = s.gather(1, y)
        before = (s > own).sum(dim=1)
        equal = (s == own).sum(dim=1)  # with the label itself
        if bool((equal > 1).any()):
            tied[rows] = (before < top_k) & (before + equal > top_k)
            before = before + ((s == own) & (index < y)).sum(dim=1)
        rank[rows] = before
        total = s.sum(dim=1)
        entropy[rows] = total - total
        ood = (before >= top_k).nonzero()[:, 0]
        p = s[ood].softmax(dim=1)
        entropy[first + ood] += (p + _SMALL).log_().mul_(p).sum(dim=1).double()
    return PatchTerms(rank, tied, entropy)


def _patch_terms(
    local: Tensor,
    weight: Tensor,
    panels: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    del panels
    found = terms_of(local, weight, bias, labels, top_k=top_k)
    return found.rank, found.tied, found.entropy


def _fake(
    local: Tensor,
    weight: Tensor,
    panels: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    del weight, panels, bias, labels, top_k
    n = local.shape[0]
    return (
        local.new_empty(n, dtype=torch.int32),
        local.new_empty(n, dtype=torch.bool),
        local.new_empty(n, dtype=torch.float64),
    )


define(
    "patch_terms(Tensor local, Tensor weight, Tensor? panels, Tensor? bias, Tensor labels, "
    "int top_k) -> (Tensor, Tensor, Tensor)",
    default=_patch_terms,
    fake=_fake,
)
