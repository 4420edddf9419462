"""The value of LoCoOp's patch term, and which patches count.

1. ``_softmax``: maximum, Σ exp and the label's similarity of each patch.
2. ``_entropies``: the same products again, now that p is known: h, Σ p² / (p + 1e-5), and how many
   classes are above the label. Both passes multiply with the same tiles at the same places, so the
   label's similarity is the very number it is compared with, and a class equal to it is never
   above: the matrix units treat all columns alike.
3. ``_ranks`` and ``_total``: who counts, and the mean, summed in a fixed order.

Letters: B images, P patches, R = B·P rows, K classes, D width, S splits of the classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import Config, shares
from fastood.kernels.launch import launch
from fastood.kernels.patches import offsets
from fastood.kernels.source import row_scales, similarities

__all__ = ["SHIFT", "UP", "Job", "Value", "patch_value"]

SHIFT = tl.constexpr(1e-5)
"""What is added to p under the logarithm."""
UP = tl.constexpr(1024.0)
"""By which weights, at most about 3, leave float16's subnormal range."""

_RANKED = 128  # rows of one program of the third step
_SUMMED = 256


@triton.jit
def _merged(state, rows, total, splits, scale):
    """Maximum, Σ exp and the label's similarity of ``rows`` over the splits, in order."""
    top = tl.full(rows.shape, float("-inf"), tl.float32)
    own = tl.full(rows.shape, float("-inf"), tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(state + s * total + rows))
        own = tl.maximum(own, tl.load(state + (2 * splits + s) * total + rows))
    z = tl.zeros(rows.shape, tl.float32)
    for s in range(splits):
        part = tl.load(state + (splits + s) * total + rows)
        z += part * tl.exp2((tl.load(state + s * total + rows) - top) * scale)
    return top, z, own


@triton.jit(do_not_specialize=["images", "P", "K", "share"])
def _softmax(
    x,  # (B, P, D) patches
    image_stride,
    patch_stride,
    high,  # (K, D) classes
    low,
    labels,  # (B,) int64
    state,  # (3, S, R) float32: maximum, sum, the label's similarity or -inf
    inverses,  # (R,) float32: 1 / norms, if NORMALIZE
    images,
    P,
    K,
    share,  # classes of one split, a multiple of BN
    scale,  # log2(e) / tau
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    total = images * P
    mine = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(mine, total - 1)
    where = offsets(rows, P, image_stride, patch_stride)
    inverse = row_scales(x, 1, where, D, BD, MODE, NORMALIZE)
    if NORMALIZE:
        tl.store(inverses + mine, inverse, mask=mine + tl.program_id(1) * total < total)
    label = tl.load(labels + rows // P)
    top = tl.full((BB,), float("-inf"), tl.float32)
    own = tl.full((BB,), float("-inf"), tl.float32)
    z = tl.zeros((BB,), tl.float32)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    for start in range(begin, end, BN):
        columns = start + tl.arange(0, BN)
        s = similarities(x, 1, where, inverse, high, low, columns, end, D, BD, MODE, FIRST)
        is_own = (columns < end)[None, :] & (columns[None, :] == label[:, None])
        own = tl.maximum(own, tl.max(tl.where(is_own, s, float("-inf")), axis=1))
        up = tl.maximum(top, tl.max(s, axis=1))
        part = tl.sum(tl.exp2((s - up[:, None]) * scale), axis=1)
        z = z * tl.exp2((top - up) * scale) + part
        top = up
    at = state + tl.program_id(1) * total + mine
    apart = tl.num_programs(1) * total
    tl.store(at, top, mask=mine < total)
    tl.store(at + apart, z, mask=mine < total)
    tl.store(at + 2 * apart, own, mask=mine < total)


@triton.jit(do_not_specialize=["images", "P", "K", "share", "splits"])
def _entropies(
    x,
    image_stride,
    patch_stride,
    high,
    low,
    state,  # of _softmax
    inverses,
    found,  # (3, S, R) float32: h, Σ p² / (p + 1e-5), classes above the label
    images,
    P,
    K,
    share,
    splits,
    scale,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    total = images * P
    mine = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(mine, total - 1)
    where = offsets(rows, P, image_stride, patch_stride)
    inverse = tl.full((BB,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = tl.load(inverses + rows)
    top, z, own = _merged(state, rows, total, splits, scale)
    each = tl.div_rn(1.0, z)
    h = tl.zeros((BB,), tl.float32)
    squares = tl.zeros((BB,), tl.float32)
    above = tl.zeros((BB,), tl.int32)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    for start in range(begin, end, BN):
        columns = start + tl.arange(0, BN)
        s = similarities(x, 1, where, inverse, high, low, columns, end, D, BD, MODE, FIRST)
        above += tl.sum((s > own[:, None]).to(tl.int32), axis=1)  # past K: -inf, above nothing
        p = tl.exp2((s - top[:, None]) * scale) * each[:, None]
        h += tl.sum(p * tl.log(p + SHIFT), axis=1)
        if GRADIENT:
            squares += tl.sum(p * p / (p + SHIFT), axis=1)
    at = found + tl.program_id(1) * total + mine
    apart = tl.num_programs(1) * total
    tl.store(at, h, mask=mine < total)
    if GRADIENT:
        tl.store(at + apart, squares, mask=mine < total)
    tl.store(at + 2 * apart, above.to(tl.float32), mask=mine < total)


@triton.jit(do_not_specialize=["R", "splits", "top_k"])
def _ranks(
    state,
    found,
    rank,  # (R,) int32
    rows_state,  # (3, R) float32: maximum, 1 / Σ exp or 0 if the row does not count, Σ p u
    sums,  # (2, programs) float64: h over the rows that count, how many they are
    R,
    splits,
    top_k,
    scale,
    GRADIENT: tl.constexpr,
    BB: tl.constexpr,
):
    mine = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(mine, R - 1)
    top, z, own = _merged(state, rows, R, splits, scale)
    h = tl.zeros((BB,), tl.float32)
    squares = tl.zeros((BB,), tl.float32)
    above = tl.zeros((BB,), tl.float32)
    for s in range(splits):
        h += tl.load(found + s * R + rows)
        if GRADIENT:
            squares += tl.load(found + (splits + s) * R + rows)
        above += tl.load(found + (2 * splits + s) * R + rows)
    inside = mine < R
    tl.store(rank + mine, above.to(tl.int32), mask=inside)
    bad = (z != z) | (own == float("-inf"))  # not finite, or a label that is no class
    counts = (above >= top_k) & inside
    h = tl.where(bad & inside, float("nan"), tl.where(counts, h, 0.0))
    tl.store(sums + tl.program_id(0), tl.sum(h.to(tl.float64), axis=0))
    number = tl.sum(counts.to(tl.int32), axis=0)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), number.to(tl.float64))
    if GRADIENT:
        each = tl.where(counts, tl.div_rn(1.0, z), 0.0)
        tl.store(rows_state + mine, top, mask=inside)
        tl.store(rows_state + R + mine, each, mask=inside)
        tl.store(rows_state + 2 * R + mine, h + squares, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _total(
    sums,
    value,  # () float32
    by,  # () float32: what the weights' sums are multiplied by
    programs,
    slope,  # 1 / tau
    BB: tl.constexpr,
):
    h = tl.zeros((BB,), tl.float64)
    number = tl.zeros((BB,), tl.float64)
    for start in range(0, programs, BB):
        i = start + tl.arange(0, BB)
        h += tl.load(sums + i, mask=i < programs, other=0.0)
        number += tl.load(sums + programs + i, mask=i < programs, other=0.0)
    count = tl.maximum(tl.sum(number, axis=0), 1.0)
    tl.store(value, (tl.sum(h, axis=0) / count).to(tl.float32))
    tl.store(by, (slope / (count * UP)).to(tl.float32))


# ------------------------------------------------------------------------------ launcher


class Job(NamedTuple):
    """What every kernel takes."""

    local: Tensor
    """(B, P, D), the last stride 1."""
    operands: tuple[Tensor, Tensor]
    """(K, D) classes and their low halves, or anything."""
    config: Config
    scale: float
    """log2(e) / tau."""
    products: dict[str, Any]
    tiles: dict[str, Any]

    @property
    def k(self) -> int:
        return len(self.operands[0])

    @property
    def patches(self) -> tuple[Tensor, int, int]:
        return self.local, self.local.stride(0), self.local.stride(1)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.local.device)


class Value(NamedTuple):
    """The term, and what gradients take of it."""

    value: Tensor
    """() float32."""
    rank: Tensor
    """(B, P) int32."""
    by: Tensor
    """() float32: what the weights' sums are multiplied by."""
    rows: Tensor
    """(3, R) float32: maximum, 1 / Σ exp or 0 where a patch does not count, Σ p u."""
    inverses: Tensor
    """(R,) float32 1 / norms, if patches are to be divided by them."""


def patch_value(job: Job, labels: Tensor, top_k: int, tau: float, *, gradient: bool) -> Value:
    """The term over patches of rank >= ``top_k``; ``gradient``: with what gradients take."""
    b, p, _ = job.local.shape
    total, device = b * p, job.local.device
    config = job.config
    splits, share = shares(config, total, job.k, device)
    state, found = job.numbers(3, splits, total), job.numbers(3, splits, total)
    inverses = job.numbers(total if job.products["NORMALIZE"] else 0)
    sizes = (b, p, job.k, share)
    grid = (triton.cdiv(total, config.rows), splits)
    launch(
        _softmax,
        grid,
        *job.patches,
        *job.operands,
        labels,
        state,
        inverses,
        *sizes,
        job.scale,
        device=device,
        **job.products,
        **job.tiles,
    )
    launch(
        _entropies,
        grid,
        *job.patches,
        *job.operands,
        state,
        inverses,
        found,
        *sizes,
        splits,
        job.scale,
        device=device,
        GRADIENT=gradient,
        **job.products,
        **job.tiles,
    )
    rank = job.numbers(b, p, dtype=torch.int32)
    rows = job.numbers(3, total if gradient else 0)
    programs = triton.cdiv(total, _RANKED)
    sums = job.numbers(2, programs, dtype=torch.float64)
    launch(
        _ranks,
        (programs,),
        state,
        found,
        rank,
        rows,
        sums,
        total,
        splits,
        top_k,
        job.scale,
        device=device,
        GRADIENT=gradient,
        BB=_RANKED,
    )
    value, by = job.numbers(), job.numbers()
    launch(_total, (1,), sums, value, by, programs, 1 / tau, device=device, BB=_SUMMED)
    return Value(value, rank, by, rows, inverses)
