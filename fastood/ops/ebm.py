"""The energy-bound loss: value, diagnostics and gradients in one pass over the images.

The loss is a number, so its gradients are computed along with it, while the similarities are in
cache, and only scaled on the way back: two products instead of three, and no (B, K) array.
Letters: B images, D width, K classes. Formulas: ``fastood.tuning.ebm_loss``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood import reference
from fastood.kernels.precision import Precision, resolve
from fastood.ops import loader
from fastood.ops.gpu import attempt, kernels, within
from fastood.ops.library import define

__all__ = ["EbmLoss", "energy_bound"]

_ROWS = 1024  # images at a time in the plain-torch default


class EbmLoss(NamedTuple):
    """The loss and what a training loop wants to watch: without them E2 approaches E0 unnoticed."""

    loss: Tensor
    """A scalar, differentiable once."""
    diagnostics: Tensor
    """(2,) means over images of p_y1, the largest probability, and of st - s_y1, the change of the
    edited similarity; not differentiable."""


def energy_bound(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    *,
    tau: float,
    weight: float,
    kept: int,
    by_label: bool = False,
    edit_all: bool = False,
    ce_original: bool = False,
    renorm: bool = False,
    normalize_image: bool = True,
    normalize_text: bool = True,
    on_gpu: bool = False,
    precision: str = "",
) -> EbmLoss:
    """The loss of ``image (B, D)`` against classes ``text (K, D)``, labels int64 in 0..K-1.

    Args:
        kept: elements of a feature the mask keeps; 0 keeps those with a positive product.
        by_label: the mask comes from the product with the label's class, not the predicted one.
        edit_all: every logit is taken from the masked feature, not the predicted class's alone.
        ce_original: the cross-entropy sees the original logits.
        renorm: masked features are scaled back to unit norm.
        normalize_image, normalize_text: divide rows by their norms; gradients go through it.
        on_gpu: by the Triton kernels, in ``precision`` as for ``row_statistics``. They check no
            rows, and labels outside 0..K-1 make the loss NaN.
    Raises:
        ValueError: NaN, Inf or zero rows; labels outside 0..K-1.
        KernelError: if the Triton kernel does not compile.
    """
    if on_gpu and not torch.compiler.is_compiling():
        found: EbmLoss = kernels.ebm.loss(
            image,
            text,
            labels,
            tau=tau,
            weight=weight,
            kept=kept,
            by_label=by_label,
            edit_all=edit_all,
            ce_original=ce_original,
            renorm=renorm,
            normalize_image=normalize_image,
            normalize_text=normalize_text,
            precision=resolve(precision or None, image, text),
        )
        return found
    graph = torch.is_grad_enabled()
    wants_image, wants_text = graph and image.requires_grad, graph and text.requires_grad
    eager = not (wants_image or wants_text or torch.compiler.is_compiling())
    arguments = (
        image,
        text,
        labels,
        tau,
        weight,
        kept,
        by_label,
        edit_all,
        ce_original,
        renorm,
        normalize_image,
        normalize_text,
        wants_image,
        wants_text,
    )
    if eager and image.is_cpu:
        loss, diagnostics, _, _ = loader.cpu().ebm_loss(*arguments)
    else:
        loss, diagnostics, _, _ = torch.ops.fastood.ebm_loss(*arguments, precision)
    return EbmLoss(loss, diagnostics)


# ------------------------------------------------------------------------------ plain torch


class _Unit(NamedTuple):
    rows: Tensor
    inverse: Tensor | None  # 1 / norm, or None if rows are as they came

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of what was normalised."""
        if self.inverse is None:
            return gradient
        along = (gradient * self.rows).sum(dim=-1, keepdim=True)
        return (gradient - along * self.rows) * self.inverse


def _unit(x: Tensor, normalize: bool) -> _Unit:
    x = x if x.dtype == torch.float64 else x.float()
    if not normalize:
        return _Unit(x, None)
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal()
    return _Unit(x * inverse, inverse)


def _default(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    tau: float,
    weight: float,
    kept: int,
    by_label: bool,
    edit_all: bool,
    ce_original: bool,
    renorm: bool,
    normalize_image: bool,
    normalize_text: bool,
    wants_image: bool,
    wants_text: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del precision
    if not labels.is_cpu:
        labels, valid = within(labels, text.shape[0])
    else:
        valid = None
    dtype = _working(image, text)
    images, classes = _unit(image.to(dtype), normalize_image), _unit(text.to(dtype), normalize_text)
    t, b, k = classes.rows, image.shape[0], text.shape[0]
    totals = t.new_zeros(3, dtype=torch.float64)
    d_text, parts = torch.zeros_like(t), []
    for i in range(0, b, _ROWS):
        z, y = images.rows[i : i + _ROWS], labels[i : i + _ROWS, None]
        s = z @ t.mT
        best = s.argmax(dim=-1)
        product = z * t[y[:, 0] if by_label else best]
        mask = product > 0
        if kept:
            mask = torch.zeros_like(mask).scatter(-1, reference.top(product, kept)[1], True)
        zm, scale = z * mask, z.new_ones(len(z), 1)
        if renorm:
            norm = torch.linalg.vector_norm(zm, dim=-1, keepdim=True)
            scale = norm.clamp_min(1e-12).reciprocal()
            zm = zm * scale
        own = torch.nn.functional.one_hot(best, k).to(dtype)
        st = (zm * t[best]).sum(dim=-1, keepdim=True)
        edited = zm @ t.mT if edit_all else torch.where(own > 0, st, s)
        shift = s.amax(dim=-1, keepdim=True)
        before, after = ((x - shift).double() / tau for x in (s, edited))
        lse_before, lse_after = (x.logsumexp(dim=-1, keepdim=True) for x in (before, after))
        seen, lse = (before, lse_before) if ce_original else (after, lse_after)
        loss = lse - seen.gather(-1, y) + weight * (lse_after - lse_before)
        p, q = (before - lse_before).exp(), (after - lse_after).exp()
        totals += torch.stack([loss.sum(), p.amax(dim=-1).sum(), (st - shift).double().sum()])
        if not (wants_image or wants_text):
            continue
        hit = torch.zeros_like(p).scatter(-1, y, 1.0)
        from_s = (p - hit if ce_original else 0.0) - weight * p
        from_edited = (0.0 if ce_original else q - hit) + weight * q
        if not edit_all:  # all entries of the edited logits but one are the original's
            from_s, from_edited = from_s + from_edited * (1 - own), from_edited * own
        g, h = ((x / (tau * b)).to(dtype) for x in (from_s, from_edited))
        d_text = d_text + g.mT @ z + h.mT @ zm
        if wants_image:
            u = h @ t
            if renorm:  # a norm at the bound is a constant
                along = (u * zm).sum(dim=-1, keepdim=True) * (scale < 1e12)
                u = (u - along * zm) * scale
            parts.append(g @ t + u * mask)
    values = (totals / b).to(dtype)
    none = t.new_empty(0)
    found = (
        values[0].clone(),
        values[1:].clone(),
        images.back(torch.cat(parts)) if wants_image else none,
        classes.back(d_text) if wants_text else none.clone(),
    )
    return found if valid is None else tuple(x * valid.to(dtype) for x in found)


def _gpu(image: Tensor, text: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    settings, precision = options[:11], options[11] if len(options) > 11 else ""

    def kernel(meant: Precision) -> tuple[Tensor, ...]:
        return tuple(kernels.ebm.op(image, text, labels, *settings, meant))

    def default() -> tuple[Tensor, ...]:
        return _default(image, text, labels, *settings)

    return attempt(kernel, default, image, text, precision=precision)


def _working(image: Tensor, text: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32


def _fake(
    image: Tensor, text: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del labels
    wants_image, wants_text = options[9:11]
    dtype = _working(image, text)
    return (
        image.new_empty((), dtype=dtype),
        image.new_empty((2,), dtype=dtype),
        image.new_empty(image.shape if wants_image else (0,), dtype=dtype),
        text.new_empty(text.shape if wants_text else (0,), dtype=dtype),
    )


# ------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = (image.dtype, text.dtype)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "ebm_loss: gradients of gradients need the reference; give impl='reference'"
        )
    gradients = [
        (upstream * d).to(dtype) if wanted else None
        for d, dtype, wanted in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
        )
    ]
    return (*gradients, *(None,) * 13)


define(
    "ebm_loss(Tensor image, Tensor text, Tensor labels, float tau, float weight, int kept, "
    "bool by_label, bool edit_all, bool ce_original, bool renorm, bool normalize_image, "
    'bool normalize_text, bool wants_image, bool wants_text, str precision="") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
    gpu=_gpu,
)
