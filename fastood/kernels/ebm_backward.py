"""The energy-bound loss backward: the gradients of classes and of images, in one launch each.

Similarities are computed again, tile by tile, and with what the forward saved of each image they
become the gradients g of the logits; those times the other side's rows are summed in registers, in
fixed order. The way back through a norm takes the part along the unit row off, which is a sum over
g times similarities and thus at hand: no second pass.

With g = G / SIZE, |g| <= 1 whatever the weight or however sure the images are: float16 halves hold
it. The edited similarity's gradient belongs to one class of each image and to the masked feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import Config, pick
from fastood.kernels.ebm_common import (
    BASE,
    BEST,
    CHANGED,
    EDITED,
    FIELD_COUNT,
    FIELDS,
    INVERSE,
    LARGEST,
    LOG,
    OTHERS,
    OWN,
    SCALARS,
    SCALE,
    Inputs,
    Options,
    cosines,
    multiply,
    same_sign,
    summed,
)
from fastood.kernels.launch import launch, processors
from fastood.kernels.operands import native
from fastood.kernels.precision import Precision

__all__ = ["gradient_of_image", "gradient_of_text", "specialisations"]

_LOG2E = tl.constexpr(1.4426950408889634)
_WIDEST = 128


def gradient_of_text(
    inputs: Inputs, saved: Tensor, upstream: Tensor | None, options: Options, dtype: torch.dtype
) -> Tensor:
    """(K, D) of ``dtype``: ``upstream`` () times the loss's gradient; None is 1."""
    return _gradient(_of_text, inputs.text, inputs, saved, upstream, options, dtype)


def gradient_of_image(
    inputs: Inputs, saved: Tensor, upstream: Tensor | None, options: Options, dtype: torch.dtype
) -> Tensor:
    """(B, D) of ``dtype``."""
    return _gradient(_of_image, inputs.image, inputs, saved, upstream, options, dtype)


def _gradient(
    kernel: object,
    rows: Tensor,
    inputs: Inputs,
    saved: Tensor,
    upstream: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    (n, d), device = rows.shape, rows.device
    config = pick("ebm_backward", options.precision, rows=len(inputs.image), width=d)
    own, chunk = config.columns, _chunk(config, n, d, device)
    b, k = len(inputs.image), len(inputs.text)
    out = torch.empty((n, d), dtype=dtype, device=device)
    launch(
        kernel,
        (-(-n // own), -(-d // chunk)),
        *inputs.arguments,
        saved,
        upstream,
        out,
        1.0 / options.tau,
        1.0 / (options.tau * b),
        b,
        k,
        BY_LABEL=options.by_label,
        RENORM=options.renorm,
        M=own,
        N=config.rows,
        BD=config.depth,
        CHUNK=chunk,
        device=device,
        **inputs.constants(options),
        **config.options,
    )
    return out


def _chunk(config: Config, n: int, d: int, device: torch.device) -> int:
    """Elements of the result's rows that one program has. Programs that share a row all compute
    its similarities: no more of them than run side by side."""
    splits = config.splits or processors(device) // -(-n // config.columns)
    widest = min(_WIDEST, triton.next_power_of_2(d))
    return max(16, min(widest, triton.next_power_of_2(-(-d // max(1, splits)))))


@triton.jit
def _of_logits(
    s, is_best, is_label, saved, rows, inverse_size, inverse_tau, B, IMAGES_FIRST: tl.constexpr
):
    """g of a tile, but for the edited similarity's part. Images are rows of ``s`` or columns."""
    at = saved + rows
    axis: tl.constexpr = 1 if IMAGES_FIRST else 0
    base = tl.expand_dims(tl.load(at + BASE * B), axis)
    log = tl.expand_dims(tl.load(at + LOG * B), axis)
    others = tl.expand_dims(tl.load(at + OTHERS * B) * inverse_size, axis)
    own = tl.expand_dims(tl.load(at + OWN * B) * inverse_size, axis)
    share = tl.exp2((s - base) * (inverse_tau * _LOG2E) - log)
    g = others * share - tl.where(is_label, inverse_size, 0.0)
    return tl.where(is_best, own, g)


@triton.jit(do_not_specialize=["B", "K"])
def _of_text(
    image,
    image_stride,
    text,
    text_stride,
    labels,
    label_stride,
    saved,
    upstream,  # a pointer to one number, or None
    out,
    inverse_tau,
    factor,
    B,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST_IMAGE: tl.constexpr,
    FIRST_TEXT: tl.constexpr,
    NORMALIZE_IMAGE: tl.constexpr,
    NORMALIZE_TEXT: tl.constexpr,
    BY_LABEL: tl.constexpr,
    RENORM: tl.constexpr,
    M: tl.constexpr,  # classes
    N: tl.constexpr,  # images at a time
    BD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    own = tl.program_id(0) * M + tl.arange(0, M)
    classes = tl.minimum(own, K - 1)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    in_width = (k < D)[None, :]
    of_classes = saved + FIELD_COUNT * B
    class_scales = tl.load(of_classes + classes)
    largest = tl.load(of_classes + K + LARGEST)
    inverse_size = 1.0 / largest

    acc = tl.zeros((M, CHUNK), tl.float32)
    rest = tl.zeros((M, CHUNK), tl.float32)
    along = tl.zeros((M,), tl.float32)
    for start in range(0, B, N):
        images = start + tl.arange(0, N)
        here = images < B
        rows = tl.minimum(images, B - 1)
        at = saved + rows
        scales = tl.load(at + INVERSE * B)
        s = cosines(
            text, text_stride, classes, class_scales, image, image_stride, rows, scales,
            D, BD, MODE, FIRST_TEXT, FIRST_IMAGE,
        )  # fmt: skip
        best = tl.load(at + BEST * B).to(tl.int32, bitcast=True)
        y = tl.load(labels + rows.to(tl.int64) * label_stride).to(tl.int32)
        is_best = own[:, None] == best[None, :]
        is_label = own[:, None] == y[None, :]
        g = _of_logits(s, is_best, is_label, saved, rows, inverse_size, inverse_tau, B, False)
        g = tl.where(here[None, :], g, 0.0)
        along += tl.sum(g * s, axis=1)
        unit = image + rows.to(tl.int64)[:, None] * image_stride + k[None, :]
        unit = tl.load(unit, mask=in_width, other=0.0).to(tl.float32) * scales[:, None]
        acc, rest = multiply(g, unit, acc, rest, MODE)
    # the edited similarities, in a loop of their own: both at once take too many registers
    for start in range(0, B, N):
        images = start + tl.arange(0, N)
        rows = tl.minimum(images, B - 1)
        at = saved + rows
        best = tl.load(at + BEST * B).to(tl.int32, bitcast=True)
        best = tl.where(images < B, best, -1)
        is_best = own[:, None] == best[None, :]
        edited = tl.load(at + EDITED * B) * inverse_size
        changed = tl.load(at + CHANGED * B)
        along += tl.sum(tl.where(is_best, (edited * changed)[None, :], 0.0), axis=1)
        factors = edited * tl.load(at + INVERSE * B)
        if RENORM:
            factors *= tl.load(at + SCALE * B)
        decides = best
        if BY_LABEL:
            y = tl.load(labels + rows.to(tl.int64) * label_stride).to(tl.int32)
            decides = tl.minimum(tl.maximum(y, 0), K - 1)
        # only of those images whose best class is here
        first = tl.program_id(0) * M
        needed = ((best >= first) & (best < first + M))[:, None] & in_width
        masked = image + rows.to(tl.int64)[:, None] * image_stride + k[None, :]
        masked = tl.load(masked, mask=needed, other=0.0).to(tl.float32)
        other = text + decides.to(tl.int64)[:, None] * text_stride + k[None, :]
        other = tl.load(other, mask=needed, other=0.0).to(tl.float32)
        masked = tl.where(same_sign(masked, other), masked, 0.0)
        masked = masked * factors[:, None]
        acc, rest = multiply(is_best.to(tl.float32), masked, acc, rest, MODE)
    acc = summed(acc, rest, MODE)
    if NORMALIZE_TEXT:
        unit = text + classes.to(tl.int64)[:, None] * text_stride + k[None, :]
        unit = tl.load(unit, mask=in_width, other=0.0).to(tl.float32) * class_scales[:, None]
        acc = (acc - along[:, None] * unit) * class_scales[:, None]
    factor *= largest
    if upstream is not None:
        factor *= tl.load(upstream).to(tl.float32)
    to = out + classes.to(tl.int64)[:, None] * D + k[None, :]
    tl.store(to, acc * factor, mask=(own < K)[:, None] & in_width)


@triton.jit(do_not_specialize=["B", "K"])
def _of_image(
    image,
    image_stride,
    text,
    text_stride,
    labels,
    label_stride,
    saved,
    upstream,
    out,
    inverse_tau,
    factor,
    B,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST_IMAGE: tl.constexpr,
    FIRST_TEXT: tl.constexpr,
    NORMALIZE_IMAGE: tl.constexpr,
    NORMALIZE_TEXT: tl.constexpr,
    BY_LABEL: tl.constexpr,
    RENORM: tl.constexpr,
    M: tl.constexpr,  # images
    N: tl.constexpr,  # classes at a time
    BD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    own = tl.program_id(0) * M + tl.arange(0, M)
    rows = tl.minimum(own, B - 1)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    in_width = (k < D)[None, :]
    of_classes = saved + FIELD_COUNT * B
    largest = tl.load(of_classes + K + LARGEST)
    inverse_size = 1.0 / largest
    at = saved + rows
    scales = tl.load(at + INVERSE * B)
    best = tl.load(at + BEST * B).to(tl.int32, bitcast=True)
    y = tl.load(labels + rows.to(tl.int64) * label_stride).to(tl.int32)

    acc = tl.zeros((M, CHUNK), tl.float32)
    rest = tl.zeros((M, CHUNK), tl.float32)
    along = tl.zeros((M,), tl.float32)
    for start in range(0, K, N):
        columns = start + tl.arange(0, N)
        here = (columns < K)[None, :]
        classes = tl.minimum(columns, K - 1)
        class_scales = tl.load(of_classes + classes)
        s = cosines(
            image, image_stride, rows, scales, text, text_stride, classes, class_scales,
            D, BD, MODE, FIRST_IMAGE, FIRST_TEXT,
        )  # fmt: skip
        is_best = columns[None, :] == best[:, None]
        is_label = columns[None, :] == y[:, None]
        g = _of_logits(s, is_best, is_label, saved, rows, inverse_size, inverse_tau, B, True)
        g = tl.where(here, g, 0.0)
        along += tl.sum(g * s, axis=1)
        unit = text + classes.to(tl.int64)[:, None] * text_stride + k[None, :]
        unit = tl.load(unit, mask=in_width, other=0.0).to(tl.float32) * class_scales[:, None]
        acc, rest = multiply(g, unit, acc, rest, MODE)
    acc = summed(acc, rest, MODE)

    own_row = image + rows.to(tl.int64)[:, None] * image_stride + k[None, :]
    own_row = tl.load(own_row, mask=in_width, other=0.0).to(tl.float32) * scales[:, None]
    target = text + best.to(tl.int64)[:, None] * text_stride + k[None, :]
    target = tl.load(target, mask=in_width, other=0.0).to(tl.float32)
    decides = target
    if BY_LABEL:
        decides = tl.minimum(tl.maximum(y, 0), K - 1).to(tl.int64)[:, None] * text_stride
        decides = tl.load(text + decides + k[None, :], mask=in_width, other=0.0).to(tl.float32)
    keep = same_sign(own_row, decides)
    target *= tl.load(of_classes + best)[:, None]
    edited = tl.load(at + EDITED * B) * inverse_size
    changed = tl.load(at + CHANGED * B)
    if RENORM:
        scale = tl.load(at + SCALE * B)
        free = scale < 9.9e11  # a norm at its bound is a constant
        taken = tl.where(free, changed * scale, 0.0)
        target = (target - taken[:, None] * own_row) * scale[:, None]
        # what a norm was divided out of does not change along itself
        along += tl.where(free, 0.0, edited * changed)
    else:
        along += edited * changed
    acc += tl.where(keep, target * edited[:, None], 0.0)
    if NORMALIZE_IMAGE:
        acc = (acc - along[:, None] * own_row) * scales[:, None]
    factor *= largest
    if upstream is not None:
        factor *= tl.load(upstream).to(tl.float32)
    to = out + rows.to(tl.int64)[:, None] * D + k[None, :]
    tl.store(to, acc * factor, mask=(own < B)[:, None] & in_width)


def specialisations(
    precision: Precision, rows: int, width: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time."""
    k = 1000
    own = native(precision)
    saved = torch.empty(FIELDS * rows + k + SCALARS)
    upstream = torch.empty(())
    for dtype in dict.fromkeys((own, torch.float32)):
        image, text = torch.empty(rows, width, dtype=dtype), torch.empty(k, width, dtype=dtype)
        inputs = Inputs(image, text, torch.empty(rows, dtype=torch.int64))
        for by_label, renorm in ((False, False), (True, True)):
            options = Options(precision, 0.01, 0.1, by_label, False, renorm, True, True)
            for function in (gradient_of_text, gradient_of_image):
                yield (
                    f"{dtype} by_label={by_label} renorm={renorm}",
                    partial(function, inputs, saved, upstream, options, dtype),
                )
