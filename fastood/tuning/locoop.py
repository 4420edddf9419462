"""The LoCoOp loss: its patch term by the fused kernel or, the reference, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.ops.dispatch import choose, operator_precision, refuse_cuda
from fastood.ops.gpu import within
from fastood.ops.patches import patch_entropy
from fastood.scores.bank import ClassBank
from fastood.scores.compute import check_no_product
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_scalar,
    check_tau,
    check_tensor,
    check_width,
    matmul_classes,
    must_check,
    unit_rows,
    working,
)
from fastood.tuning.inputs import features_of, labels_of

__all__ = ["LocoopTerms", "locoop_loss", "locoop_terms"]


class LocoopTerms(NamedTuple):
    """The parts of the loss; with several processes their counts have to be summed first."""

    cross_entropy: Tensor
    """Mean over the B images, a scalar."""
    patches: Tensor
    """Mean over the OOD patches of Σ_k p_k log(p_k + 1e-5), 0 if there are none; a scalar."""
    ood_patches: Tensor
    """How many patches are OOD, an integer scalar."""
    predicted: Tensor
    """(B,) int64, the nearest class of each image."""


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
    precision: str | None = None,
) -> Tensor:
    """LoCoOp: cross-entropy plus ``weight`` times the mean negative entropy of OOD patches.

    A patch is OOD if at least ``top_k`` classes have a larger logit than the image's label. Over
    all OOD patches of the batch the mean of Σ_k p_k log(p_k + 1e-5) is minimised, which flattens
    their predictions; without any OOD patch the term is zero.

    Source: arXiv 2306.01293, equations 6-8; the 1e-5 is the authors' code's.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D) or (B, K, D); labels: (B,) int64 in 0..K-1.
        top_k: rank of the label from which a patch counts as OOD, 1 <= top_k < K.
        impl, precision: as for the scores (``fastood.scores.row``), of the patch term; there is no
            ``impl="cuda"``. The kernels compute the gradients of the patch term along with it and
            never keep the (B, P, K) logits; they have no second derivatives. Per-image text always
            takes the reference.
    Returns:
        A scalar, float32 (float64 for float64 input).
    Raises:
        ValueError: as ``ebm_loss`` (on a GPU NaN, likewise); top_k outside 1..K-1 (no patch could
            ever be OOD).
    """
    weight = check_scalar("weight", weight)
    found = locoop_terms(
        image,
        local,
        text,
        labels,
        tau=tau,
        top_k=top_k,
        normalize=normalize,
        impl=impl,
        precision=precision,
    )
    return found.cross_entropy + weight * found.patches


def locoop_terms(
    image: Tensor,
    local: Tensor,
    text: Tensor | ClassBank,
    labels: Tensor,
    *,
    tau: float,
    top_k: int,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> LocoopTerms:
    """The parts of ``locoop_loss``; arguments and errors are its own."""
    tau = check_tau(tau)
    z, t = features_of(image, text, normalize)
    normalize = normalize and (not isinstance(text, ClassBank) or text.normalize)
    check_tensor("local", local, (3,), "(B, P, D)")
    check_width(local, t, ("local", "text"))
    if len(local) != len(z):
        raise ValueError(f"local: expected patches of {len(z)} images, got {len(local)}")
    k = t.shape[-2]
    y = labels_of(labels, z, k)
    top_k = check_count("top_k", top_k, 1, k - 1, high_name="K - 1 = ")
    implementation = choose(impl, z, local, t, precision=precision)
    if implementation == "cuda":
        refuse_cuda(impl, "locoop_loss")
    if t.ndim == 3:
        check_no_product(precision, "products with classes (B, K, D) are taken in float32")
    valid = None
    if y.is_cuda:
        y, valid = within(y, k)
    s = matmul_classes(z, t)
    cross_entropy = F.cross_entropy(s / tau, y)
    if implementation != "reference" and t.ndim == 2:
        if implementation == "triton" and must_check(local):
            check_features("local", local, (3,), "(B, P, D)")
        inside = normalize and not (local.requires_grad and torch.is_grad_enabled())
        zl = local if inside else _patches(local, z, normalize)
        on_gpu = implementation == "triton"
        meant = operator_precision(impl, precision, zl, t) if on_gpu else ""
        # KernelError: only if the kernel was demanded, the operator has its default
        found = patch_entropy(
            zl, t, y, top_k=top_k, tau=tau, normalize=inside, on_gpu=on_gpu, precision=meant
        )
        term, count = found.value, (found.rank >= top_k).sum()
    else:
        term, count = _patch_term(_patches(local, z, normalize), t, y, tau, top_k)
    if valid is not None:
        cross_entropy, term = (x * valid.to(x.dtype) for x in (cross_entropy, term))
    return LocoopTerms(cross_entropy, term, count, s.detach().argmax(dim=-1))


def _patches(local: Tensor, image: Tensor, normalize: bool) -> Tensor:
    zl = working(check_features("local", local, (3,), "(B, P, D)")).to(image.dtype)
    return unit_rows(zl) if normalize else zl


def _patch_term(
    local: Tensor, text: Tensor, labels: Tensor, tau: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Mean over the OOD patches of Σ_k p_k log(p_k + 1e-5), and their number."""
    sl = matmul_classes(local, text)
    own = sl.gather(-1, labels[:, None, None].expand(-1, sl.shape[1], 1))
    out = (sl.detach() > own.detach()).sum(dim=-1) >= top_k
    p = F.softmax(sl / tau, dim=-1)
    neg_entropy = (p * (p + 1e-5).log()).sum(dim=-1)
    # a masked mean rather than indexing: no synchronisation, and zero where no patch is OOD
    count = out.sum()
    return (neg_entropy * out).sum() / count.clamp_min(1), count
