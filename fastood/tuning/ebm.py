"""The energy-bound loss: by the fused kernel or, the reference, in plain torch."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood import reference
from fastood.errors import KernelError
from fastood.ops.dispatch import choose, fall_back, operator_precision, refuse_cuda
from fastood.ops.ebm import EbmLoss, energy_bound
from fastood.ops.gpu import within
from fastood.scores.bank import ClassBank
from fastood.scores.compute import check_no_product
from fastood.scores.inputs import (
    check_features,
    check_scalar,
    check_tau,
    check_tensor,
    check_width,
    matmul_classes,
    must_check,
)
from fastood.tuning.inputs import features_of, labels_of

__all__ = ["check_options", "ebm_loss", "ebm_terms"]


def ebm_loss(
    image: Tensor,
    text: Tensor | ClassBank,
    labels: Tensor,
    *,
    tau: float = 0.01,
    weight: float = 0.1,
    mask: Literal["sign", "topp"] = "sign",
    keep: float = 0.5,
    mask_by: Literal["top1", "label"] = "top1",
    edit: Literal["top1", "all"] = "top1",
    ce_on: Literal["edited", "original"] = "edited",
    renorm: bool = False,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Energy-bound loss: cross-entropy plus ``weight`` times the mean of E0 - E2.

    With z, T unit features, l = z T' / tau, y1 = argmax l, the product P = z * T[y1] marks which
    elements speak for the best class. The masked feature zm keeps those (m' = [P > 0], or the
    ``ceil(keep D)`` largest), and l' is l with the entry of y1 (``edit="top1"``) or every entry
    (``"all"``) taken from zm. Then E0 = -lse(l), E2 = -lse(l') and::

        loss = CE(l' or l, labels) + weight · mean(E0 - E2)

    For ``edit="top1"`` E0 - E2 = softplus(st/tau - a) - softplus(s_y1/tau - a), a being the
    log-sum-exp of the other classes; it is never the difference of two large energies.

    Source: arXiv 2510.11296. The masking and the maximised energy bound are known from abstract
    and figure; equations and the defaults of tau, weight and keep are inferred here, and no claim
    is made to reproduce the paper's numbers.

    Args:
        image: (B, D) frozen image features.
        text: (K, D) class features with gradient, or per-image (B, K, D).
        labels: (B,) int64 in 0..K-1.
        mask: which elements are kept; the mask is a constant, no gradient flows through it.
        keep: share of elements kept by ``"topp"``, 0 < keep <= 1.
        mask_by: class whose product makes the mask, the predicted one or the label. The edited
            entry is that of the predicted class either way.
        ce_on: logits the cross-entropy sees.
        renorm: scale zm back to unit norm.
        impl, precision: as for the scores (``fastood.scores.row``); there is no ``impl="cuda"``.
            The kernels compute the gradients along with the loss and never keep the (B, K) logits;
            they have no second derivatives and take no per-image text.
    Returns:
        A scalar, float32 (float64 for float64 input).
    Raises:
        ValueError: on shapes that do not fit, an empty batch, labels outside 0..K-1, unknown
            options, tau <= 0, non-finite weight, NaN, Inf or zero rows. On a GPU bad labels and
            rows make the loss NaN instead, unless FASTOOD_CHECK=1.
    """
    return ebm_terms(
        image,
        text,
        labels,
        tau=tau,
        weight=weight,
        mask=mask,
        keep=keep,
        mask_by=mask_by,
        edit=edit,
        ce_on=ce_on,
        renorm=renorm,
        normalize=normalize,
        impl=impl,
        precision=precision,
    ).loss


def ebm_terms(
    image: Tensor,
    text: Tensor | ClassBank,
    labels: Tensor,
    *,
    tau: float,
    weight: float,
    mask: str,
    keep: float,
    mask_by: str,
    edit: str,
    ce_on: str,
    renorm: bool,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> EbmLoss:
    """``ebm_loss`` with its diagnostics, from the same pass: means of p_y1 and of st - s_y1.

    E2 also approaches E0 as p_y1 falls to 0, which is no success: hence the first. Arguments and
    errors are those of ``ebm_loss``.
    """
    tau = check_tau(tau)
    checked = check_options(
        weight=weight,
        mask=mask,
        keep=keep,
        mask_by=mask_by,
        edit=edit,
        ce_on=ce_on,
        renorm=renorm,
    )
    weight, keep = checked["weight"], checked["keep"]
    if isinstance(text, ClassBank):
        classes, normalize_text, normalize_image = text.text, False, normalize and text.normalize
    else:
        classes, normalize_text, normalize_image = text, normalize, normalize
    check_tensor("image", image, (2,), "(B, D)")
    check_tensor("text", classes, (2, 3), "(K, D) or (B, K, D)")
    check_width(image, classes)
    # 0.1 * 30 is 3.0000000000000004
    kept = 0 if mask == "sign" else math.ceil(round(keep * image.shape[1], 9))
    implementation = choose(impl, image, classes, precision=precision)
    if implementation == "cuda":
        refuse_cuda(impl, "ebm_loss")
    if implementation != "reference" and classes.ndim == 3 and impl:
        raise ValueError(
            f"text: impl={implementation!r} takes classes (K, D), got {tuple(classes.shape)}; "
            "use impl='reference' for per-image classes"
        )
    if classes.ndim == 3:
        check_no_product(precision, "products with classes (B, K, D) are taken in float32")
    if implementation != "reference" and classes.ndim == 2:
        b, k = image.shape[0], classes.shape[0]
        if b == 0 or k == 0:
            features_of(image, text, normalize)  # raises
        y = labels_of(labels, image, k)
        on_gpu = implementation == "triton"
        if on_gpu and must_check(image):
            check_features("image", image, (2,), "(B, D)")
            check_features("text", classes, (2,), "(K, D)")
        try:
            return energy_bound(
                image,
                classes,
                y,
                tau=tau,
                weight=weight,
                kept=kept,
                by_label=mask_by == "label",
                edit_all=edit == "all",
                ce_original=ce_on == "original",
                renorm=renorm,
                normalize_image=normalize_image,
                normalize_text=normalize_text,
                on_gpu=on_gpu,
                precision=operator_precision(impl, precision, image, classes) if on_gpu else "",
            )
        except KernelError as error:
            fall_back(error, impl, precision)
    z, t = features_of(image, text, normalize)
    y = labels_of(labels, z, t.shape[-2])
    if not y.is_cuda:
        return _ebm_loss(z, t, y, tau, weight, kept, mask_by, edit, ce_on, renorm)
    y, valid = within(y, t.shape[-2])
    found = _ebm_loss(z, t, y, tau, weight, kept, mask_by, edit, ce_on, renorm)
    return EbmLoss(*(x * valid.to(z.dtype) for x in found))


def check_options(
    *, weight: Any, mask: Any, keep: Any, mask_by: Any, edit: Any, ce_on: Any, renorm: Any
) -> dict[str, Any]:
    """The options of the loss, if all are what ``ebm_loss`` takes.

    Raises:
        ValueError: as ``ebm_loss``.
    """
    weight, keep = check_scalar("weight", weight), check_scalar("keep", keep)
    _one_of("mask", mask, ("sign", "topp"))
    _one_of("mask_by", mask_by, ("top1", "label"))
    _one_of("edit", edit, ("top1", "all"))
    _one_of("ce_on", ce_on, ("edited", "original"))
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected 0 < keep <= 1, got {keep}")
    return {
        "weight": weight,
        "mask": mask,
        "keep": keep,
        "mask_by": mask_by,
        "edit": edit,
        "ce_on": ce_on,
        "renorm": bool(renorm),
    }


def _ebm_loss(
    z: Tensor,
    t: Tensor,
    y: Tensor,
    tau: float,
    weight: float,
    kept: int,
    mask_by: str,
    edit: str,
    ce_on: str,
    renorm: bool,
) -> EbmLoss:
    """The loss of unit features in differentiable torch: the specification of the kernel."""
    s = matmul_classes(z, t)
    k = s.shape[1]
    best = s.detach().argmax(dim=-1)

    with torch.no_grad():
        product = z * _class_rows(t, best if mask_by == "top1" else y)
        mask = (product > 0).to(z.dtype)
        if kept:
            mask = torch.zeros_like(mask).scatter(-1, reference.top(product, kept)[1], 1.0)
    zm = z * mask
    if renorm:
        # a mask that keeps nothing leaves a zero vector, which has no direction to restore
        zm = zm / torch.linalg.vector_norm(zm, dim=-1, keepdim=True).clamp_min(1e-12)

    own = best[:, None]
    st = (zm * _class_rows(t, best)).sum(dim=-1, keepdim=True)
    top1 = s.gather(-1, own)
    shift = top1.detach()
    if edit == "top1":
        chosen = F.one_hot(best, k).bool()
        edited = torch.where(chosen, st, s)
        gap = (st - top1) / tau
        if k > 1:
            a = reference.logsumexp(((s - shift) / tau).masked_fill(chosen, -math.inf))[:, None]
            gap = reference.softplus_rise((st - shift) / tau - a, (top1 - shift) / tau - a, gap)
    else:
        edited = matmul_classes(zm, t)
        gap = reference.logsumexp((edited - shift) / tau) - reference.logsumexp((s - shift) / tau)
    logits = (edited if ce_on == "edited" else s) / tau
    with torch.no_grad():
        p_top1 = F.softmax(s / tau, dim=-1).gather(-1, own)
        diagnostics = torch.stack([p_top1.mean(), (st - top1).mean()])
    return EbmLoss(F.cross_entropy(logits, y) + weight * gap.mean(), diagnostics)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _class_rows(t: Tensor, index: Tensor) -> Tensor:
    """Row ``index[b]`` of the classes of image b, (B, D)."""
    if t.ndim == 2:
        return t[index]
    return t[torch.arange(len(index), device=t.device), index]
