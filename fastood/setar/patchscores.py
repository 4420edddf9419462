"""Scores of images and of their OOD patches, each of which is taken for an image.

Letters: B images or rows, P patches, K classes, D joint width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SCORES", "image_scores", "patch_scores", "row_scores"]

SCORES = ("mcm", "l_mcm", "gl_mcm", "energy", "entropy", "variance")
"""What an objective may rank images and OOD patches by; all oriented higher = ID."""

_LOCAL = ("l_mcm", "gl_mcm")
_BLOCK = 1 << 18  # most logits at a time


def row_scores(score: str, logits: Tensor, temperature: float) -> Tensor:
    """The score (B,) of rows ``logits (B, K)``; for l_mcm and gl_mcm the max-softmax of each.

    With p = softmax(logits / T): max p, T lse(logits / T), Σ p log p, or the variance of p over
    the classes.
    """
    scaled = logits / temperature
    if score == "energy":
        return temperature * scaled.logsumexp(dim=1)
    p = scaled.softmax(dim=1)
    if score == "entropy":
        return (p * scaled.log_softmax(dim=1)).sum(dim=1)
    if score == "variance":
        return p.var(dim=1, correction=0)
    return p.amax(dim=1)


def patch_scores(
    score: str,
    local: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ood: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Row scores (R,) of patches ``local (R, D)`` with logits local weight' + bias, float64.

    Args:
        ood: (R,) bool; global scores are found for these rows alone, the others are 0.
    """
    rows = torch.arange(len(local), device=local.device) if score in _LOCAL else ood.nonzero()[:, 0]
    columns = weight.to(local.dtype).t()
    found = local.new_zeros(len(local), dtype=torch.float64)
    for part in rows.split(max(1, _BLOCK // len(weight))):
        x = local[part]
        s = x @ columns if bias is None else torch.addmm(bias.to(x.dtype), x, columns)
        found[part] = row_scores(score, s.double(), temperature)
    return found


def image_scores(score: str, images: Tensor, patches: Tensor, ood: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of images (B,) and of their OOD patches, image by image.

    The global logits of an OOD patch are its own; its local ones those of all OOD patches of its
    image.

    Args:
        images: (B,) row scores of the images; patches: (B, P) of their patches.
        ood: (B, P) bool.
    """
    if score not in _LOCAL:
        return images, patches[ood]
    best = torch.where(ood, patches, -torch.inf).amax(dim=1, keepdim=True).expand_as(patches)
    local = patches.amax(dim=1)
    if score == "l_mcm":
        return local, best[ood]
    return images + local, (patches + best)[ood]
