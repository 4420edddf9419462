"""The energy-bound loss on a GPU: two launches forward, one backward for each gradient wanted.

Images and classes come as they are. The kernels know the sign mask and the edit of the predicted
class's logit; ``kept > 0`` (the largest share of the products) and ``edit_all`` take the slower
path, torch in blocks of rows: ``supported`` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastood.kernels.ebm_backward import gradient_of_image, gradient_of_text
from fastood.kernels.ebm_common import Inputs, Options
from fastood.kernels.ebm_forward import forward
from fastood.kernels.launch import usable
from fastood.kernels.operands import native
from fastood.kernels.precision import Precision, resolve
from fastood.ops import ebm as torch_loss
from fastood.ops.ebm import EbmLoss

__all__ = ["loss", "op", "specialisations", "supported"]


def supported(image: Tensor, text: Tensor, *, kept: int = 0, edit_all: bool = False) -> str | None:
    """None if the kernels compute this loss; else why torch does, in blocks of rows."""
    if kept:
        return f"the kernels' mask is the sign of the products, got kept={kept}"
    if edit_all:
        return "the kernels edit the predicted class's logit alone, got edit_all=True"
    if image.shape[0] == 0 or text.shape[0] == 0:
        return "there is nothing to launch"
    return usable(image, text)


def loss(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    *,
    tau: float,
    weight: float,
    kept: int = 0,
    by_label: bool = False,
    edit_all: bool = False,
    ce_original: bool = False,
    renorm: bool = False,
    normalize_image: bool = True,
    normalize_text: bool = True,
    precision: str | None = None,
) -> EbmLoss:
    """``fastood.ops.ebm.energy_bound`` of ``image (B, D)``, ``text (K, D)``, ``labels (B,)``.

    Differentiable once, in eager mode. Nothing waits for the GPU: rows that are zero or not finite
    and labels outside 0..K-1 give NaN, loss and gradients. Float32 features that are not normalised
    here are meant to be of moderate size (float16 halves end at 65,504).

    Raises:
        KernelError: if a kernel does not compile.
        ValueError: if ``precision`` names none.
    """
    mode = resolve(precision, image, text)
    wanted = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
    if supported(image, text, kept=kept, edit_all=edit_all) is not None:
        arguments = (
            image, text, labels, tau, weight, kept, by_label, edit_all, ce_original, renorm,
            normalize_image, normalize_text,
        )  # fmt: skip
        return EbmLoss(*(_InBlocks.apply(*arguments) if wanted else _blocks(*arguments)[:2]))
    options = Options(
        mode,
        tau,
        float(weight),
        by_label,
        ce_original,
        renorm,
        normalize_image,
        normalize_text,
    )
    if wanted:
        return EbmLoss(*_Fused.apply(image, text, labels, options))
    value, diagnostics, _ = forward(_inputs(image, text, labels), options)
    return EbmLoss(value, diagnostics)


def op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastood::ebm_loss``: loss, diagnostics and float32 gradients (empty where not wanted)."""
    mode = resolve(precision or None, image, text)
    if supported(image, text, kept=kept, edit_all=edit_all) is not None:
        return _blocks(
            image, text, labels, tau, weight, kept, by_label, edit_all, ce_original, renorm,
            normalize_image, normalize_text, wants_image, wants_text,
        )  # fmt: skip
    inputs = _inputs(image, text, labels)
    options = Options(
        mode,
        tau,
        float(weight),
        by_label,
        ce_original,
        renorm,
        normalize_image,
        normalize_text,
    )
    value, diagnostics, saved = forward(inputs, options)
    none = torch.float32
    return (
        value,
        diagnostics,
        gradient_of_image(inputs, saved, None, options, none)
        if wants_image
        else image.new_empty(0, dtype=none),
        gradient_of_text(inputs, saved, None, options, none)
        if wants_text
        else text.new_empty(0, dtype=none),
    )


def _inputs(image: Tensor, text: Tensor, labels: Tensor) -> Inputs:
    if image.stride(1) != 1:
        image = image.contiguous()
    if text.stride(1) != 1:
        text = text.contiguous()
    return Inputs(image, text, labels)


def _refuse_second() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "ebm_loss: gradients of gradients need the reference; give impl='reference'"
        )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, labels: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(image, text, labels)
        value, diagnostics, saved = forward(inputs, options)
        ctx.save_for_backward(*inputs, saved)
        ctx.options = options
        ctx.mark_non_differentiable(diagnostics)
        ctx.set_materialize_grads(False)  # zeros for the diagnostics would be a launch
        return value, diagnostics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        _refuse_second()
        if upstream is None:
            return None, None, None, None
        image, text, labels, saved = ctx.saved_tensors
        inputs, options = Inputs(image, text, labels), ctx.options
        wants_image, wants_text = ctx.needs_input_grad[:2]
        return (
            gradient_of_image(inputs, saved, upstream, options, image.dtype)
            if wants_image
            else None,
            gradient_of_text(inputs, saved, upstream, options, text.dtype) if wants_text else None,
            None,
            None,
        )


# ------------------------------------------------------------------------------ blocks of rows


def _blocks(
    *arguments: Any, wants_image: bool = False, wants_text: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = arguments if len(arguments) == 14 else (*arguments, wants_image, wants_text)
    with torch.autocast(arguments[0].device.type, enabled=False):
        value, diagnostics, d_image, d_text = torch_loss._default(*given)
        return value, diagnostics, d_image, d_text


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        wants_image, wants_text = ctx.needs_input_grad[:2]
        value, diagnostics, *gradients = _blocks(
            image, text, *rest, wants_image=wants_image, wants_text=wants_text
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image.dtype, text.dtype
        ctx.mark_non_differentiable(diagnostics)
        ctx.set_materialize_grads(False)
        return value, diagnostics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        _refuse_second()
        if upstream is None:
            return (None,) * 12
        found = [
            (upstream * d).to(dtype) if wanted else None
            for d, dtype, wanted in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return (*found, *(None,) * 10)


# ------------------------------------------------------------------------------ ahead of time


def specialisations(
    precision: Precision, rows: int, width: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time."""
    own = native(precision)
    labels = torch.empty(rows, dtype=torch.int64)
    for dtype in dict.fromkeys((own, torch.float32)):
        image, text = torch.empty(rows, width, dtype=dtype), torch.empty(1000, width, dtype=dtype)
        for by_label, original, renorm in ((False, False, False), (True, True, True)):
            options = Options(precision, 0.01, 0.1, by_label, original, renorm, True, True)
            yield (
                f"{dtype} by_label={by_label} ce_original={original} renorm={renorm}",
                partial(forward, Inputs(image, text, labels), options),
            )
