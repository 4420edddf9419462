"""Rows of patch logits: which are OOD, their entropy terms, their scores. In blocks, plain torch.

Letters: R rows (patches), K classes, D joint width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SCORES", "PatchRows", "image_score", "patch_rows", "row_score"]

SCORES = ("mcm", "l_mcm", "gl_mcm", "energy", "entropy", "variance")
"""Scores an objective may rank images and OOD patches by; all oriented higher = ID."""

_LOCAL = ("l_mcm", "gl_mcm")
_SMALL = 1e-5  # inside the logarithm, as in the authors' code
_BLOCK = 1 << 19  # most logits at a time: 2 MiB of float32 stay in cache between the passes


class PatchRows(NamedTuple):
    """Of R rows."""

    ood: Tensor
    """(R,) bool: the label is not among the top k."""
    tied: Tensor
    """(R,) bool: that was decided by the order among equal logits."""
    entropy: Tensor
    """(R,) float64: Σ_k p_k log(p_k + 1e-5) of OOD rows, 0 for the others."""
    score: Tensor | None
    """(R,) float64 score of the row, if one was asked for; only of OOD rows for global scores."""


def patch_rows(
    local: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    top_k: int,
    score: str | None = None,
    temperature: float = 1.0,
) -> PatchRows:
    """What an objective needs of ``local (R, D)`` with logits local weight' + bias.

    Args:
        weight, bias: (K, D) and (K,) or None; labels: (R,) int64 in 0..K-1.
        top_k: a row is OOD if at least so many classes come before its label, by
            (logit descending, index ascending).
        score: one of ``SCORES``, of softmax(l / temperature).
    """
    rows, k = len(local), len(weight)
    weight = weight.to(local.dtype).t()
    out = PatchRows(
        local.new_zeros(rows, dtype=torch.bool),
        local.new_zeros(rows, dtype=torch.bool),
        local.new_zeros(rows, dtype=torch.float64),
        None if score is None else local.new_zeros(rows, dtype=torch.float64),
    )
    step = max(1, _BLOCK // k) if local.is_cpu else rows
    index = torch.arange(k, device=local.device)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        x = local[part]
        s = x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
        y = labels[part, None]
        own = s.gather(1, y)
        rank = (s > own).sum(dim=1)
        equal = (s == own).sum(dim=1)  # with the label itself
        if bool((equal > 1).any()):
            out.tied[part] = (rank < top_k) & (rank + equal > top_k)
            rank = rank + ((s == own) & (index < y)).sum(dim=1)
        ood = rank >= top_k
        out.ood[part] = ood
        chosen = ood.nonzero()[:, 0]
        if out.score is not None and score is not None:
            wanted = torch.arange(len(s), device=s.device) if score in _LOCAL else chosen
            out.score[first + wanted] = row_score(score, s[wanted].double(), temperature)
        p = s[chosen].softmax(dim=1)
        log = (p + _SMALL).log_()
        out.entropy[first + chosen] = p.mul_(log).sum(dim=1).double()
    return out


def row_score(score: str, logits: Tensor, temperature: float) -> Tensor:
    """The score (B,) of rows ``logits (B, K)``; for l_mcm and gl_mcm the max-softmax of each."""
    scaled = logits / temperature
    if score == "energy":
        return temperature * scaled.logsumexp(dim=1)
    p = scaled.softmax(dim=1)
    if score == "entropy":
        return (p * scaled.log_softmax(dim=1)).sum(dim=1)
    if score == "variance":
        return p.var(dim=1, correction=0)
    return p.amax(dim=1)


def image_score(score: str, images: Tensor, patches: Tensor, ood: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of images (b,) and of their OOD patches taken for images, image by image.

    Args:
        images: (b,) row scores of the images; patches: (b, P) of their patches.
        ood: (b, P) bool.
    """
    of_patches = patches
    if score in _LOCAL:
        best = torch.where(ood, patches, -torch.inf).amax(dim=1, keepdim=True).expand_as(patches)
        mcm = score == "gl_mcm"
        of_patches = patches + best if mcm else best
        local = patches.amax(dim=1)
        images = images + local if mcm else local
    return images, of_patches[ood]
