"""L-MCM: the largest softmax probability over an image's patches, in one pass over patches and
classes.

Rows are the B·P flattened patches. A program takes a tile of them and walks over the classes with a
running maximum and, for each temperature, the sum Z of exp((s - maximum) / tau); the largest
probability of the row is then 1 / Z. Images end anywhere inside a tile, so each image's best patch
is found by an atomic maximum over integers: of positive floats the bits order as the numbers do,
NaN above all, and a maximum does not depend on the order of its arguments. A tile is reduced to one
number per image first. Where the tiles are too few to fill the GPU, several programs share the
classes of a row and a second kernel merges what they found.

Letters: B images, P patches, R = B·P rows, K classes, D width, T temperatures, S splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import Config, pick, shares
from fastood.kernels.launch import launch
from fastood.kernels.operands import Operand, native, prepare, scaled_first
from fastood.kernels.precision import Precision
from fastood.kernels.source import row_scales, similarities
from fastood.kernels.state import vector_of

__all__ = ["local_scores", "local_similarity_scores", "offsets", "scale_of", "specialisations"]

_TAUS = 4  # temperatures of one launch; each costs an exponential per cosine
_MERGED = 64  # patches at a time when splits are merged
_NAN = tl.constexpr(0x7FC00000)


# ------------------------------------------------------------------------------ device functions


@triton.jit
def offsets(rows, P, image_stride, patch_stride):
    """Where flattened patches ``rows`` begin, in elements."""
    image = rows // P
    patch = rows - image * P
    return image.to(tl.int64) * image_stride + patch.to(tl.int64) * patch_stride


@triton.jit
def _add_tile(s, top, sums, scales, T: tl.constexpr, TP: tl.constexpr):
    """``top (BB)`` and ``sums (BB, TP)`` with the tile ``s (BB, BN)``; -inf does not count.

    A row with NaN, or with nothing but -inf, gets NaN sums, whatever its maximum.
    """
    high = tl.maximum(top, tl.max(s, axis=1))
    below = s - high[:, None]
    lane = tl.minimum(tl.arange(0, TP), T - 1)[None, :]  # past T: as the last, never stored
    for t in tl.static_range(T):
        part = tl.sum(tl.exp2(below * scales[t]), axis=1)
        kept = sums * tl.exp2((top - high) * scales[t])[:, None]
        sums = tl.where(lane == t, kept + part[:, None], sums)
    return high, sums


@triton.jit
def _ordered(sums):
    """Integers that order as the probabilities 1 / ``sums`` do, their bits; NaN above all."""
    p = tl.div_rn(1.0, sums)
    return tl.where(p == p, p.to(tl.int32, bitcast=True), _NAN)


@triton.jit
def _keep_best(out, sums, rows, P, images, T: tl.constexpr, TP: tl.constexpr, BY_ROW: tl.constexpr):
    """The images' scores ``out (T, images)``, zeroed at first, with these rows."""
    lane = tl.arange(0, TP)
    bits = _ordered(sums)
    image = rows // P
    if BY_ROW:
        at = lane[None, :] * images + image[:, None]
        tl.atomic_max(out + at, bits, mask=(lane < T)[None, :], sem="relaxed")
    else:
        for i in range(tl.min(image, axis=0), tl.max(image, axis=0) + 1):
            best = tl.max(tl.where((image == i)[:, None], bits, 0), axis=0)
            at = lane * images + i
            tl.atomic_max(out + at, best, mask=lane < T, sem="relaxed")


# ------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["images", "P", "K", "share"])
def _local(
    x,  # (B, P, D) patches, or (B, P, K) cosines
    image_stride,
    patch_stride,
    high,  # (K, D) classes
    low,
    out,  # (T, B) int32 zeros; with splits (1 + T, S, R) float32: maxima and sums
    images,
    P,
    K,
    share,  # classes of one split, a multiple of BN
    scales,  # T numbers log2(e) / tau
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,  # T or the next power of two
    SPLIT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(
        own, images * P - 1
    )  # past the end: the last row again, which changes nothing
    where = offsets(rows, P, image_stride, patch_stride)
    inverse = row_scales(x, 1, where, D, BD, MODE, NORMALIZE)
    top = tl.full((BB,), float("-inf"), tl.float32)
    sums = tl.zeros((BB, TP), tl.float32)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    for start in range(begin, end, BN):
        columns = start + tl.arange(0, BN)
        s = similarities(x, 1, where, inverse, high, low, columns, end, D, BD, MODE, FIRST)
        top, sums = _add_tile(s, top, sums, scales, T, TP)
    if SPLIT:
        total = images * P
        at = out + tl.program_id(1) * total + own
        tl.store(at, top, mask=own < total)
        lane = tl.arange(0, TP)
        apart = tl.num_programs(1) * total
        to = at[:, None] + (1 + lane)[None, :] * apart
        tl.store(to, sums, mask=(own < total)[:, None] & (lane < T)[None, :])
    else:
        _keep_best(out, sums, rows, P, images, T, TP, BY_ROW)


@triton.jit(do_not_specialize=["images", "P", "splits"])
def _merge(
    found,  # (1 + T, S, R) float32 of _local
    out,  # (T, B) int32
    images,
    P,
    splits,
    scales,
    T: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
):
    """One image: its rows' splits merged in order, then the best row."""
    image = tl.program_id(0)
    lane = tl.arange(0, TP)
    scale = vector_of(scales, T, TP)
    total = images * P
    apart = splits * total
    best = tl.zeros((TP,), tl.int32)
    for start in range(0, P, BB):
        at = found + image * P + tl.minimum(start + tl.arange(0, BB), P - 1)
        top = tl.full((BB,), float("-inf"), tl.float32)
        for s in range(splits):
            top = tl.maximum(top, tl.load(at + s * total))
        sums = tl.zeros((BB, TP), tl.float32)
        for s in range(splits):
            one = at + s * total
            part = tl.load(one[:, None] + (1 + tl.minimum(lane, T - 1))[None, :] * apart)
            sums += part * tl.exp2((tl.load(one) - top)[:, None] * scale[None, :])
        best = tl.maximum(best, tl.max(_ordered(sums), axis=0))
    tl.store(out + lane * images + image, best, mask=lane < T)


# ------------------------------------------------------------------------------ launchers


def local_scores(
    taus: tuple[float, ...], local: Tensor, text: Operand, *, normalize: bool
) -> Tensor:
    """(T, B) float32: max over patches and classes of softmax_k(s_pk / tau), for each of ``taus``.

    Extra memory: none but the scores; where classes are split, (1 + T)·S numbers a patch, and S is
    no more than fills the GPU.

    Args:
        local: (B, P, D) of any float dtype, P >= 1; any strides (copied unless the last is 1).
        text: K >= 1 classes as operands; they decide the precision.
        normalize: divide the patches by their norms.
    Returns:
        NaN for an image with a patch that is zero or not finite, and for all if a class is.
    """
    d = local.shape[-1]
    return _scores(
        taus,
        local,
        (text.high, text.high if text.low is None else text.low),
        len(text.high),
        pick("patches", text.precision, rows=local.shape[0] * local.shape[1], width=d),
        {
            "D": d,
            "MODE": text.precision,
            "FIRST": scaled_first(local, text.precision),
            "NORMALIZE": normalize,
        },
    )


def local_similarity_scores(taus: tuple[float, ...], similarity: Tensor) -> Tensor:
    """``local_scores`` from given cosines ``similarity (B, P, K)``, float32 or half precision.

    Returns:
        (T, B) float32; NaN for an image with a cosine that is not finite.
    """
    b, p, k = similarity.shape
    config = pick("given", "fp32", rows=b * p, width=k)
    constants = {"D": 0, "MODE": "given", "FIRST": False, "NORMALIZE": False}
    return _scores(taus, similarity, (similarity, similarity), k, config, constants)


def _scores(
    taus: tuple[float, ...],
    x: Tensor,
    classes: tuple[Tensor, Tensor],
    k: int,
    config: Config,
    constants: dict[str, Any],
) -> Tensor:
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    b, p, _ = x.shape
    splits, share = shares(config, b * p, k, x.device)
    out = torch.empty((len(taus), b), dtype=torch.float32, device=x.device)
    if splits == 1:
        out.zero_()
    for i in range(0, len(taus), _TAUS):
        scales = tuple(scale_of(tau) for tau in taus[i : i + _TAUS])
        t = len(scales)
        scores = out[i : i + t].view(torch.int32)
        found = scores if splits == 1 else out.new_empty((1 + t, splits, b * p))
        lanes = {"T": t, "TP": triton.next_power_of_2(t)}
        launch(
            _local,
            (triton.cdiv(b * p, config.rows), splits),
            x,
            x.stride(0),
            x.stride(1),
            *classes,
            found,
            b,
            p,
            k,
            share,
            scales,
            **constants,
            **lanes,
            SPLIT=splits > 1,
            BY_ROW=4 * p < config.rows,  # so many images in a tile that reducing to each costs more
            BB=config.rows,
            BN=config.columns,
            BD=config.depth,
            device=x.device,
            **config.options,
        )
        if splits > 1:
            launch(
                _merge,
                (b,),
                found,
                scores,
                b,
                p,
                splits,
                scales,
                **lanes,
                BB=_MERGED,
                device=x.device,
                num_warps=2,
            )
    return out


def scale_of(tau: float) -> float:
    """What turns a difference of cosines into one of base-2 logits; finite, for 0 · scale."""
    return min(math.log2(math.e) / tau, 3e38)


def specialisations(
    precision: Precision, rows: int, width: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What ``aot`` compiles for an entry of the table."""
    local = torch.empty((rows // 64, 64, width), dtype=native(precision))
    text = torch.empty((1000, width))
    for label, k, taus in (("split", 1000, 1), ("whole", 1, 1), ("four taus", 1, 4)):
        classes = prepare(text[:k], precision, normalize=True)
        yield label, partial(local_scores, (0.01,) * taus, local, classes, normalize=True)
