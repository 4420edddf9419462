"""The patch term of the LoCoOp loss: value and gradients in one pass over the patches.

Letters: B images, P patches, D width, K classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood.kernels.precision import Precision
from fastood.ops.gpu import attempt, kernels
from fastood.ops.library import define

__all__ = ["PatchTerm", "patch_entropy"]

_ROWS = 1024  # patches at a time in the plain-torch default


class PatchTerm(NamedTuple):
    """The term and what it was taken over."""

    value: Tensor
    """Mean over the OOD patches of Σ_k p_k log(p_k + 1e-5), 0 if there are none; a scalar."""
    rank: Tensor
    """(B, P) int32: how many classes have a larger similarity than the image's label."""


def patch_entropy(
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    *,
    top_k: int,
    tau: float,
    normalize: bool = False,
    on_gpu: bool = False,
    precision: str = "",
) -> PatchTerm:
    """The mean entropy term of ``local (B, P, D)`` over the patches of rank >= ``top_k``.

    ``text (K, D)`` has unit rows, ``labels (B,)`` are int64 in 0..K-1. The value is
    differentiable: its gradients are computed along with it, as (K, D) and (B, P, D), and scaled
    by what arrives from above.

    Args:
        normalize: divide the patches by their norms. Not for patches that want a gradient.
        on_gpu: by the Triton kernels, in ``precision`` as for ``row_statistics``, unchecked.
    Raises:
        ValueError: NaN, Inf or zero rows in ``local``; labels outside 0..K-1.
        KernelError: if a Triton kernel that has been named does not compile.
    """
    graph = torch.is_grad_enabled()
    wanted = graph and text.requires_grad, graph and local.requires_grad
    arguments = (local, text, labels, top_k, tau, normalize, *wanted, precision)
    if on_gpu and not any(wanted) and not torch.compiler.is_compiling():
        value, rank, *_ = _gpu(*arguments)
    else:
        value, rank, *_ = torch.ops.fastood.patch_entropy(*arguments)
    return PatchTerm(value, rank)


# ------------------------------------------------------------------------------ plain torch


def _patch_entropy(
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    top_k: int,
    tau: float,
    normalize: bool,
    text_gradient: bool,
    local_gradient: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del precision
    b, patches, d = local.shape
    dtype = _working_dtype(local)
    t = text.to(dtype)
    own = labels.repeat_interleave(patches)
    ranks, parts = [], []
    total = t.new_zeros((), dtype=torch.float64)
    d_text = torch.zeros_like(t)
    flat = local.reshape(b * patches, d)
    for i in range(0, max(1, len(flat)), _ROWS):
        z = flat[i : i + _ROWS].to(dtype)
        if normalize:
            z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        s = z @ t.mT
        rank = (s > s.gather(-1, own[i : i + _ROWS, None])).sum(dim=-1)
        ranks.append(rank.int())
        out = (rank >= top_k).to(dtype)[:, None]
        p = ((s - s.amax(dim=-1, keepdim=True)) / tau).softmax(dim=-1)
        log = (p + 1e-5).log()
        total = total + (p * log * out).double().sum()
        if text_gradient or local_gradient:
            u = log + p / (p + 1e-5)
            g = p * (u - (p * u).sum(dim=-1, keepdim=True)) * out
            d_text = d_text + g.mT @ z
            parts.append(g @ t)
    rank = torch.cat(ranks).view(b, patches)
    count = (rank >= top_k).sum().clamp_min(1)
    by = 1 / (tau * count)
    none = t.new_empty(0)
    return (
        (total / count).to(dtype),
        rank,
        d_text * by if text_gradient else none,
        (torch.cat(parts) * by).view(local.shape) if local_gradient else none.clone(),
    )


def _gpu(
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    top_k: int,
    tau: float,
    normalize: bool,
    text_gradient: bool,
    local_gradient: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    arguments = (local, text, labels, top_k, tau, normalize, text_gradient, local_gradient)

    def kernel(meant: Precision) -> tuple[Tensor, ...]:
        return tuple(kernels.locoop.patch_entropy(*arguments, meant))

    return attempt(kernel, lambda: _patch_entropy(*arguments), local, text, precision=precision)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    top_k: int,
    tau: float,
    normalize: bool,
    text_gradient: bool,
    local_gradient: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del labels, top_k, tau, normalize, precision
    dtype = _working_dtype(local)
    return (
        local.new_empty((), dtype=dtype),
        local.new_empty(local.shape[:2], dtype=torch.int32),
        text.new_empty(text.shape if text_gradient else (0,), dtype=dtype),
        local.new_empty(local.shape if local_gradient else (0,), dtype=dtype),
    )


# ------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    local, text, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = (local.dtype, text.dtype)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "locoop_loss: gradients of gradients need the reference; give impl='reference'"
        )
    d_text, d_local = ctx.saved_tensors
    return (
        (upstream * d_local).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
        (upstream * d_text).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
        *(None,) * 7,
    )


define(
    "patch_entropy(Tensor local, Tensor text, Tensor labels, int top_k, float tau, "
    'bool normalize, bool text_gradient, bool local_gradient, str precision="") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    default=_patch_entropy,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
    gpu=_gpu,
)
