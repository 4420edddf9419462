"""The LoCoOp loss: its patch term by the fused kernel or, the reference, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.ops.dispatch import choose
from fastood.ops.patches import patch_entropy
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_scalar,
    check_tau,
    check_tensor,
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
    impl: str | None = None,
) -> Tensor:
    """LoCoOp: cross-entropy plus ``weight`` times the mean negative entropy of OOD patches.

    A patch is OOD if at least ``top_k`` classes have a larger logit than the image's label. Over
    all OOD patches of the batch the mean of Σ_k p_k log(p_k + 1e-5) is minimised, which flattens
    their predictions; without any OOD patch the term is zero.

    Source: arXiv 2306.01293, equations 6-8; the 1e-5 is the authors' code's.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D) or (B, K, D); labels: (B,) int64 in 0..K-1.
        top_k: rank of the label from which a patch counts as OOD, 1 <= top_k < K.
        impl: None picks the fused CPU kernel where it applies (float32, bfloat16, float16 on CPU),
            else the reference; ``"reference"`` or ``"cpu"`` force one. The kernel computes the
            gradients of the patch term along with it and never keeps the (B, P, K) logits; it has
            no second derivatives. Per-image text always takes the reference.
    Returns:
        A scalar, float32 (float64 for float64 input).
    Raises:
        ValueError: as ``ebm_loss``; top_k outside 1..K-1 (no patch could ever be OOD).
    """
    tau, weight = check_tau(tau), check_scalar("weight", weight)
    z, t = features_of(image, text, normalize)
    normalize = normalize and (not isinstance(text, ClassBank) or text.normalize)
    check_tensor("local", local, (3,), "(B, P, D)")
    check_width(local, t, ("local", "text"))
    if len(local) != len(z):
        raise ValueError(f"local: expected patches of {len(z)} images, got {len(local)}")
    k = t.shape[-2]
    y = labels_of(labels, z, k)
    top_k = check_count("top_k", top_k, 1, k - 1, high_name="K - 1 = ")
    cross_entropy = F.cross_entropy(matmul_classes(z, t) / tau, y)
    if choose(impl, z, local, t) == "cpu" and t.ndim == 2:
        inside = normalize and not (local.requires_grad and torch.is_grad_enabled())
        zl = local if inside else _patches(local, z, normalize)
        term = patch_entropy(zl, t, y, top_k=top_k, tau=tau, normalize=inside).value
    else:
        term = _patch_term(_patches(local, z, normalize), t, y, tau, top_k)
    return cross_entropy + weight * term


def _patches(local: Tensor, image: Tensor, normalize: bool) -> Tensor:
    zl = working(check_features("local", local, (3,), "(B, P, D)")).to(image.dtype)
    return unit_rows(zl) if normalize else zl


def _patch_term(local: Tensor, text: Tensor, labels: Tensor, tau: float, top_k: int) -> Tensor:
    """Mean over the OOD patches of Σ_k p_k log(p_k + 1e-5)."""
    sl = matmul_classes(local, text)
    own = sl.gather(-1, labels[:, None, None].expand(-1, sl.shape[1], 1))
    out = (sl.detach() > own.detach()).sum(dim=-1) >= top_k
    p = F.softmax(sl / tau, dim=-1)
    neg_entropy = (p * (p + 1e-5).log()).sum(dim=-1)
    # a masked mean rather than indexing: no synchronisation, and zero where no patch is OOD
    return (neg_entropy * out).sum() / out.sum().clamp_min(1)
