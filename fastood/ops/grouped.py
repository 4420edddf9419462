"""Classes against groups of negative labels: the operator, and its packed form for inference.

Letters: B images, D width, K classes, G groups of m negatives, of m - 1 from group ``full`` on
(their last row is padding and does not count).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastood import reference
from fastood.kernels.precision import Precision
from fastood.ops import loader
from fastood.ops.gpu import attempt, kernels
from fastood.ops.library import define

__all__ = ["grouped_graph", "grouped_scores"]

_ROWS = 256  # images at a time in the plain-torch default


def grouped_scores(
    image: Tensor,
    panels: Tensor,
    negative_panels: Tensor,
    *,
    k: int,
    shape: tuple[int, int],
    full: int,
    tau: float,
    normalize: bool,
) -> Tensor:
    """(B,) scores of ``image (B, D)`` with packed classes and packed negatives of ``shape (G, m)``.

    Past the dispatcher: neither differentiable nor traceable.

    Raises:
        ValueError: on NaN, Inf or zero rows of the image.
    """
    return loader.cpu().grouped_scores(
        image.detach(), panels, negative_panels, k, *shape, full, tau, normalize
    )


def grouped_graph(
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    *,
    full: int,
    tau: float,
    panels: Tensor | None = None,
    negative_panels: Tensor | None = None,
    precision: str = "",
) -> Tensor:
    """(B,) differentiable scores of unit rows: ``(B, D)``, ``(K, D)`` and ``(G, m, D)``."""
    scores, _ = torch.ops.fastood.grouped(
        image, text, negatives, panels, negative_panels, full, tau, precision
    )
    return scores


# ------------------------------------------------------------------------------ plain torch


def _padding(negatives: Tensor, full: int) -> Tensor:
    """(G, m), true where a row does not count."""
    groups, m = negatives.shape[:2]
    short = torch.arange(groups, device=negatives.device) >= full
    last = torch.arange(m, device=negatives.device) == m - 1
    return short[:, None] & last


def _logits(z: Tensor, text: Tensor, negatives: Tensor, full: int) -> tuple[Tensor, Tensor]:
    sn = (z @ negatives.flatten(0, 1).mT).unflatten(-1, negatives.shape[:2])
    return z @ text.mT, sn.masked_fill(_padding(negatives, full), -math.inf)


def _log_sums(s: Tensor, sn: Tensor, tau: float) -> Tensor:
    """(B, 1 + G) float64 log-sum-exps of the classes and of each group."""
    high = torch.cat([s.amax(dim=-1, keepdim=True), sn.amax(dim=-1)], dim=-1)
    ours = ((s - high[:, :1]) / tau).double().exp().sum(dim=-1, keepdim=True)
    theirs = ((sn - high[:, 1:, None]) / tau).double().exp().sum(dim=-1)
    return high.double() / tau + torch.cat([ours, theirs], dim=-1).log()


def _grouped(
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    panels: Tensor | None,
    negative_panels: Tensor | None,
    full: int,
    tau: float,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del panels, negative_panels, precision
    dtype = _working_dtype(image)
    scores, sums = [], []
    for i in range(0, max(1, len(image)), _ROWS):
        z = image[i : i + _ROWS].to(dtype)
        s, sn = _logits(z, text.to(dtype), negatives.to(dtype), full)
        scores.append(reference.neg_label(s, sn, tau))
        sums.append(_log_sums(s, sn, tau))
    return torch.cat(scores), torch.cat(sums)


def _grouped_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    panels: Tensor | None,
    negative_panels: Tensor | None,
    lse: Tensor,
    full: int,
    tau: float,
    image_gradient: bool,
    text_gradient: bool,
    negatives_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    del panels, negative_panels
    dtype = _working_dtype(image)
    t, n = text.to(dtype), negatives.to(dtype)
    flat = n.flatten(0, 1)
    parts = [t.new_zeros(0, t.shape[1])]
    d_text, d_flat = torch.zeros_like(t), torch.zeros_like(flat)
    for i in range(0, len(image), _ROWS):
        part = slice(i, i + _ROWS)
        z = image[part].to(dtype)
        s, sn = _logits(z, t, n, full)
        share = torch.sigmoid(lse[part, :1] - lse[part, 1:])
        slope = upstream[part, None].double() * share * (1 - share) / (tau * n.shape[0])
        p = (s.double() / tau - lse[part, :1]).exp() * slope.sum(dim=-1, keepdim=True)
        q = (sn.double() / tau - lse[part, 1:, None]).exp() * -slope[..., None]
        p, q = p.to(dtype), q.flatten(1).to(dtype)
        parts.append(p @ t + q @ flat)
        d_text = d_text + p.mT @ z
        d_flat = d_flat + q.mT @ z
    none = t.new_empty(0)
    return (
        torch.cat(parts) if image_gradient else none,
        d_text if text_gradient else none.clone(),
        d_flat.view(n.shape) if negatives_gradient else none.clone(),
    )


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gpu(
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    panels: Tensor | None,
    negative_panels: Tensor | None,
    full: int,
    tau: float,
    precision: str = "",
) -> tuple[Tensor, ...]:
    def default() -> tuple[Tensor, ...]:
        return _grouped(image, text, negatives, panels, negative_panels, full, tau)

    def kernel(meant: Precision) -> tuple[Tensor, ...]:
        columns = kernels.grouped.columns(text, negatives, full, meant)
        return tuple(kernels.grouped.sums(image, columns, tau=tau, normalize=False))

    return attempt(kernel, default, image, text, negatives, precision=precision)


# ------------------------------------------------------------------------------ shapes


def _fake(image: Tensor, text: Tensor, negatives: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del text, rest
    b = image.shape[0]
    return (
        image.new_empty((b,), dtype=_working_dtype(image)),
        image.new_empty((b, negatives.shape[0] + 1), dtype=torch.float64),
    )


def _fake_backward(
    upstream: Tensor, image: Tensor, text: Tensor, negatives: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    del upstream
    dtype = _working_dtype(image)
    return tuple(
        x.new_empty(x.shape if wanted else (0,), dtype=dtype)
        for x, wanted in zip((image, text, negatives), rest[-3:], strict=True)
    )


# ------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, full, tau, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.full, ctx.tau = full, tau


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "neg_label: gradients of gradients need the reference; give impl='reference'"
        )
    inputs = ctx.saved_tensors[:3]
    wanted = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastood.grouped_backward(
        upstream, *ctx.saved_tensors, ctx.full, ctx.tau, *wanted
    )
    found = (
        g.to(x.dtype) if w else None for g, x, w in zip(gradients, inputs, wanted, strict=True)
    )
    return (*found, *(None,) * 5)


define(
    "grouped(Tensor image, Tensor text, Tensor negatives, Tensor? panels, "
    'Tensor? negative_panels, int full, float tau, str precision="") -> (Tensor, Tensor)',
    default=_grouped,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
    gpu=_gpu,
)
define(
    "grouped_backward(Tensor upstream, Tensor image, Tensor text, Tensor negatives, "
    "Tensor? panels, Tensor? negative_panels, Tensor lse, int full, float tau, "
    "bool image_gradient, bool text_gradient, bool negatives_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    default=_grouped_backward,
    fake=_fake_backward,
)
