"""Gradients of LoCoOp's patch term, a few thousand patches at a time.

``_weights`` writes the gradient of their similarities, p (u - Σ p u) with u = log(p + 1e-5)
+ p / (p + 1e-5), into (patches, K) of at most 16 MiB of scratch, which stay in the L2 cache of a
large GPU; two products take them to the classes and to the patches. Those are Triton kernels in the
asked precision too, by default in split halves: float32 grade at the speed of the matrix units,
where the library would take plain float32, or a TF32 switch that is the whole process's. Fusing
them with ``_weights`` would mean to hold (K, D) or (rows, D) sums in registers, or to compute all
similarities once more for each piece of D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.launch import launch
from fastood.kernels.locoop_value import SHIFT, UP, Job, Value
from fastood.kernels.patches import offsets
from fastood.kernels.products import as_operand, low_half, product
from fastood.kernels.source import similarities

__all__ = ["gradients"]

_SCRATCH = 16 << 20  # bytes of the similarities' gradient at a time


@triton.jit
def _add_product(a, b, b_low, acc, rest, MODE: tl.constexpr):
    """``acc`` and ``rest`` (its part scaled by 2048, fp16x3) with float32 ``a`` times ``b``."""
    high = as_operand(a, MODE)
    acc = product(high, b, acc, MODE)
    if MODE == "fp16x3":
        rest = product(high, b_low, rest, MODE)
        rest = product(low_half(a, high), b, rest, MODE)
    return acc, rest


@triton.jit(do_not_specialize=["first", "count", "P", "K", "R"])
def _weights(
    x,
    image_stride,
    patch_stride,
    high,
    low,
    inverses,
    rows_state,
    weights,  # (count, across) float32: 1024 p (u - Σ p u), 0 for rows that do not count
    across,
    first,  # rows first .. first + count - 1
    count,
    R,
    P,
    K,
    scale,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    mine = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = first + tl.minimum(mine, count - 1)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    where = offsets(rows, P, image_stride, patch_stride)
    inverse = tl.full((BB,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = tl.load(inverses + rows)
    s = similarities(x, 1, where, inverse, high, low, columns, K, D, BD, MODE, FIRST)
    top = tl.load(rows_state + rows)
    each = tl.load(rows_state + R + rows)
    mean = tl.load(rows_state + 2 * R + rows)
    p = tl.exp2((s - top[:, None]) * scale) * each[:, None]
    u = tl.log(p + SHIFT) + p / (p + SHIFT)
    to = weights + mine[:, None] * across + columns[None, :]
    inside = (mine < count)[:, None] & (columns < K)[None, :]
    tl.store(to, p * UP * (u - mean[:, None]), mask=inside)


@triton.jit(do_not_specialize=["first", "count", "P", "K"])
def _into_text(
    x,
    image_stride,
    patch_stride,
    inverses,
    weights,
    across,
    by,
    d_text,  # (K, D) float32
    first,
    count,
    P,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AGAIN: tl.constexpr,  # not the first rows: what is there counts
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BN, BD), tl.float32)
    rest = tl.zeros((BN, BD), tl.float32)
    for start in range(0, count, BB):
        mine = start + tl.arange(0, BB)
        inside = (mine < count)[None, :] & (columns < K)[:, None]
        g = tl.load(weights + mine[None, :] * across + columns[:, None], mask=inside, other=0.0)
        rows = first + tl.minimum(mine, count - 1)
        where = offsets(rows, P, image_stride, patch_stride)
        z = tl.load(x + where[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
        z = z.to(tl.float32)
        if NORMALIZE:
            z *= tl.load(inverses + rows)[:, None]
        b = as_operand(z, MODE)
        acc, rest = _add_product(g, b, low_half(z, b), acc, rest, MODE)
    if MODE == "fp16x3":
        acc += rest * (1.0 / 2048.0)
    acc *= tl.load(by)
    to = d_text + columns.to(tl.int64)[:, None] * D + k[None, :]
    inside = (columns < K)[:, None] & (k < D)[None, :]
    if AGAIN:
        acc += tl.load(to, mask=inside, other=0.0)
    tl.store(to, acc, mask=inside)


@triton.jit(do_not_specialize=["first", "count", "K"])
def _into_local(
    high,
    low,
    weights,
    across,
    by,
    d_local,  # (R, D) float32
    first,
    count,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    mine = tl.program_id(0) * BB + tl.arange(0, BB)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BB, BD), tl.float32)
    rest = tl.zeros((BB, BD), tl.float32)
    for start in range(0, K, BN):
        columns = start + tl.arange(0, BN)
        inside = (mine < count)[:, None] & (columns < K)[None, :]
        g = tl.load(weights + mine[:, None] * across + columns[None, :], mask=inside, other=0.0)
        of_class = tl.minimum(columns, K - 1).to(tl.int64)[:, None] * D + k[None, :]
        b = tl.load(high + of_class, mask=(k < D)[None, :], other=0.0)
        b_low = b
        if MODE == "fp16x3":
            b_low = tl.load(low + of_class, mask=(k < D)[None, :], other=0.0)
        acc, rest = _add_product(g, b, b_low, acc, rest, MODE)
    if MODE == "fp16x3":
        acc += rest * (1.0 / 2048.0)
    acc *= tl.load(by)
    to = d_local + (first + mine).to(tl.int64)[:, None] * D + k[None, :]
    tl.store(to, acc, mask=(mine < count)[:, None] & (k < D)[None, :])


# ------------------------------------------------------------------------------ launcher


def gradients(
    job: Job, value: Value, *, text_gradient: bool, local_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(K, D) and (B, P, D) float32, empty where not asked for."""
    b, p, d = job.local.shape
    total, k, device, config = b * p, job.k, job.local.device, job.config
    d_text = job.numbers(*((k, d) if text_gradient else (0,)))
    d_local = job.numbers(*((b, p, d) if local_gradient else (0,)))
    if not (text_gradient or local_gradient):
        return d_text, d_local
    if total == 0:
        d_text.zero_()
    across = triton.cdiv(k, 16) * 16  # rows are aligned
    most = max(1, _SCRATCH // (4 * across * config.rows)) * config.rows
    weights = job.numbers(min(most, total), across)
    pieces = triton.cdiv(d, config.depth)
    for first in range(0, total, most):
        count = min(most, total - first)
        blocks = triton.cdiv(count, config.rows)
        launch(
            _weights,
            (blocks, triton.cdiv(k, config.columns)),
            *job.patches,
            *job.operands,
            value.inverses,
            value.rows,
            weights,
            across,
            first,
            count,
            total,
            p,
            k,
            job.scale,
            device=device,
            **job.products,
            **job.tiles,
        )
        if text_gradient:
            launch(
                _into_text,
                (triton.cdiv(k, config.columns), pieces),
                *job.patches,
                value.inverses,
                weights,
                across,
                value.by,
                d_text,
                first,
                count,
                p,
                k,
                device=device,
                NORMALIZE=job.products["NORMALIZE"],
                AGAIN=first > 0,
                **job.tiles,
            )
        if local_gradient:
            launch(
                _into_local,
                (blocks, pieces),
                *job.operands,
                weights,
                across,
                value.by,
                d_local,
                first,
                count,
                k,
                device=device,
                **job.tiles,
            )
    return d_text, d_local
