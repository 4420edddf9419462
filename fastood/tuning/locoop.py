"""The LoCoOp loss as plain differentiable torch, the reference for its fused version."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_scalar,
    check_tau,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)
from fastood.tuning.inputs import features_of, labels_of

__all__ = ["locoop_loss"]


def locoop_loss(
    image: Tensor,
    local: Tensor,
    text: Tensor | ClassBank,
    labels: Tensor,
    *,
    tau: float = 0.01,
    weight: float = 0.25,
    top_k: int = 200,
    normalize: bool = True,
) -> Tensor:
    """LoCoOp: cross-entropy plus ``weight`` times the mean negative entropy of OOD patches.

    A patch is OOD if at least ``top_k`` classes have a larger logit than the image's label. Over
    all OOD patches of the batch the mean of Σ_k p_k log(p_k + 1e-5) is minimised, which flattens
    their predictions; without any OOD patch the term is zero.

    Source: arXiv 2306.01293, equations 6-8; the 1e-5 is the authors' code's.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D) or (B, K, D); labels: (B,) int64 in 0..K-1.
        top_k: rank of the label from which a patch counts as OOD, 1 <= top_k < K.
    Returns:
        A scalar, float32 (float64 for float64 input).
    Raises:
        ValueError: as ``ebm_loss``; top_k outside 1..K-1 (no patch could ever be OOD).
    """
    tau, weight = check_tau(tau), check_scalar("weight", weight)
    z, t = features_of(image, text, normalize)
    zl = check_features("local", local, (3,), "(B, P, D)")
    check_width(zl, t, ("local", "text"))
    if len(zl) != len(z):
        raise ValueError(f"local: expected patches of {len(z)} images, got {len(zl)}")
    zl = working(zl).to(z.dtype)
    zl = unit_rows(zl) if normalize else zl
    s = matmul_classes(z, t)
    k = s.shape[1]
    y = labels_of(labels, z, k)
    top_k = check_count("top_k", top_k, 1, k - 1, high_name="K - 1 = ")

    sl = matmul_classes(zl, t)
    own = sl.gather(-1, y[:, None, None].expand(-1, sl.shape[1], 1))
    out = (sl.detach() > own.detach()).sum(dim=-1) >= top_k
    p = F.softmax(sl / tau, dim=-1)
    neg_entropy = (p * (p + 1e-5).log()).sum(dim=-1)
    # a masked mean rather than indexing: no synchronisation, and zero where no patch is OOD
    mean = (neg_entropy * out).sum() / out.sum().clamp_min(1)
    return F.cross_entropy(s / tau, y) + weight * mean
