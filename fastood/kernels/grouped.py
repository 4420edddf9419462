"""Grouped negatives (NegLabel): mean over groups g of sigmoid(lse(classes) - lse(negatives of g)).

K + M exponentials a row, in two launches. The columns (classes, then negatives in group order) are
cut into *pieces*, each a part of the classes or of one group. ``_sums`` (blocks of rows × splits of
the pieces) walks its columns in tiles that touch any number of pieces, exponentiates each
similarity once and writes (shift, z) of each row and piece: its sum is exp(shift / tau) z.
``_finish`` makes log-sum-exps of the pieces, in order, and the score of them, in float64. A piece
belongs to one program, so nothing is added atomically. Never a (B, K + M) array.

Letters: B images, D width, K classes, G groups of m negatives.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels import source
from fastood.kernels.configs import splits_for
from fastood.kernels.launch import launch
from fastood.kernels.operands import Operand, native, prepare
from fastood.kernels.precision import Precision
from fastood.kernels.products import tile
from fastood.kernels.source import row_scales

__all__ = ["Columns", "columns", "scores", "specialisations", "sums"]

_PIECE = 512
"""Columns of a piece at most: splits are balanced to half of this."""
_SCRATCH = 64 << 20
"""Bytes of (shift, z) at a time, more rows are done in turn; 4,096 rows and 100 groups: 3.4 MB."""
_CAREFUL_TAU = 0.004
"""Below this CLIP's cosines spread over more than 2^-64 of a sum in almost every tile."""
_FINISHED = (16, 32)  # rows of one program of the second launch, and groups at a time

_LOWEST = tl.constexpr(2.0**-64)  # 128 columns flushed at 2^-126 are nothing next to it
_LOG2E = tl.constexpr(math.log2(math.e))


class Columns(NamedTuple):
    """What a bank prepares: K classes, then the negatives in group order without padding."""

    operand: Operand
    pieces: Tensor
    """(pieces + 1,) int32, on the device: where each begins, and the end of all."""
    k: int
    of_classes: int
    """Pieces of the classes, the first ones."""
    groups: int
    of_group: int
    """Pieces of each group."""

    @property
    def total(self) -> int:
        """Pieces."""
        return self.of_classes + self.groups * self.of_group


def _cuts(k: int, m: int, groups: int, full: int, device: torch.device) -> Tensor:
    """``Columns.pieces``, computed where they are needed: numbers of the host would have to be
    copied, which waits for the GPU and cannot be part of a graph."""
    of_classes, of_group = -(-k // _PIECE), -(-m // _PIECE)
    group = torch.arange(groups, device=device)
    begins = k + group * m - (group - full).clamp_min(0)
    sizes = m - (group >= full).long()
    parts = sizes[:, None] * torch.arange(of_group, device=device)
    parts = begins[:, None] + parts.div(of_group, rounding_mode="floor")
    classes = (k * torch.arange(of_classes, device=device)).div(of_classes, rounding_mode="floor")
    end = torch.full((1,), k + groups * m - (groups - full), device=device)
    return torch.cat([classes, parts.flatten(), end]).int()


def columns(text: Tensor, negatives: Tensor, full: int, precision: Precision) -> Columns:
    """``text (K, D)`` and ``negatives (G, m, D)`` of unit norm; groups from ``full`` on have m - 1.

    Raises:
        ValueError: if a group is empty.
    """
    k, (groups, m) = len(text), negatives.shape[:2]
    if m < 1 or (m == 1 and full < groups):
        raise ValueError(f"negatives: expected no empty group, got {groups} of at most {m}")
    rows = torch.cat(
        [text, negatives[:full].flatten(0, 1), negatives[full:, : m - 1].flatten(0, 1)]
    )
    of_classes, of_group = -(-k // _PIECE), -(-m // _PIECE)
    pieces = _cuts(k, m, groups, full, text.device)
    operand = prepare(rows, precision, normalize=False)
    return Columns(operand, pieces, k, of_classes, groups, of_group)


@triton.jit
def _share(split, splits, K, N, CLASSES, COUNT):
    """The first piece of a split: pieces of the classes are of one size, and those of groups.

    Arithmetic, not a search: what Triton derives from a reduction it knows nothing of, not even
    that rows of classes lie at multiples of D, and would no longer copy them ahead.
    """
    column = N.to(tl.int64) * split // splits
    of_classes = (column * CLASSES + K - 1) // K
    of_groups = CLASSES + ((column - K) * (COUNT - CLASSES) + N - K - 1) // (N - K)
    return tl.where(column <= K, of_classes, of_groups).to(tl.int32)


@triton.jit
def _powers(s, scale, shift):
    """exp((s - shift) / tau): differences first, so that no tau is too small."""
    return tl.exp2((s - shift[:, None]) * scale)


@triton.jit
def _merge(shift, z, other, other_z, scale):
    """Two sums as one; a sum of nothing is (-inf, 0), at most one of the two."""
    high = tl.maximum(shift, other)
    mine, theirs = tl.exp2((shift - high) * scale), tl.exp2((other - high) * scale)
    return high, z * mine + other_z * theirs


@triton.jit(do_not_specialize=["B", "K", "N", "CLASSES", "COUNT", "careful"])
def _sums(
    x,
    stride,
    high,
    low,
    pieces,  # (COUNT + 1,)
    state,  # (2, COUNT, B): shifts and z; a piece's rows side by side, as they are written
    B,
    K,
    N,  # columns
    CLASSES,  # pieces of the classes
    COUNT,  # pieces
    scale,  # log2(e) / tau
    careful,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1)
    # whole pieces for each split, as even as they allow
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = _share(split, splits, K, N, CLASSES, COUNT)
    last = _share(split + 1, splits, K, N, CLASSES, COUNT)
    begin, stop = tl.load(pieces + first), tl.load(pieces + last)
    of_rows = row_scales(x, stride, rows, D, BD, MODE, NORMALIZE)

    # Usually once: with one shift for all pieces of a tile, its largest similarity. Where a piece
    # lies so far below that its sum would lose digits, the program starts again and takes every
    # piece's own largest, at an exponential for each piece that a tile touches.
    todo = first < last
    while todo:
        worst = tl.full((BB,), 1.0, tl.float32)
        piece = first
        shift = tl.full((BB,), float("-inf"), tl.float32)
        z = tl.zeros((BB,), tl.float32)
        for start in range(begin, stop, BN):
            at = start + tl.arange(0, BN)
            inside = tl.minimum(at, stop - 1)  # repeated columns do not change the largest
            s = tile(x, stride, rows, of_rows, high, low, inside, D, BD, MODE, FIRST)
            top = tl.max(s, axis=1)
            if not NORMALIZE:  # products that overflow to -inf would just be small
                top = tl.where(tl.min(s, axis=1) == float("-inf"), float("nan"), top)
            if careful == 0:
                s = _powers(s, scale, top)
            done = start
            while done < tl.minimum(start + BN, stop):
                end = tl.load(pieces + piece + 1)
                of_piece = (at >= done) & (at < end)
                if careful == 0:
                    tile_top = top
                    # a factor, not a choice: one operation with the sum
                    tile_z = tl.sum(s * of_piece.to(tl.float32)[None, :], axis=1)
                    worst = tl.minimum(worst, tile_z)
                else:
                    some = tl.where(of_piece[None, :], s, float("-inf"))
                    tile_top = tl.max(some, axis=1)
                    tile_z = tl.sum(_powers(some, scale, tile_top), axis=1)
                    tile_z = tl.where(top == top, tile_z, float("nan"))
                shift, z = _merge(shift, z, tile_top, tile_z, scale)
                if end <= start + BN:
                    to = state + piece.to(tl.int64) * B + own
                    tl.store(to, shift, mask=own < B)
                    tl.store(to + COUNT.to(tl.int64) * B, z, mask=own < B)
                    piece += 1
                    shift = tl.full((BB,), float("-inf"), tl.float32)
                    z = tl.zeros((BB,), tl.float32)
                done = end
        todo = (careful == 0) & (tl.min(worst, axis=0) < _LOWEST)
        careful = careful + 1


@triton.jit
def _load(state, piece, rows, B, COUNT):
    """Shift and z of pieces and rows, float64."""
    at = state + piece.to(tl.int64) * B + rows
    z = tl.load(at + COUNT.to(tl.int64) * B)
    return tl.load(at).to(tl.float64), z.to(tl.float64)


@triton.jit(do_not_specialize=["B", "CLASSES", "G", "EACH"])
def _finish(
    state,
    score,  # (B,) float32
    lse,  # (B, 1 + G) float64, or anything
    B,
    CLASSES,  # pieces of the classes
    G,
    EACH,  # pieces of a group
    inverse,  # 1 / tau, in two parts
    inverse_rest,
    SUMS: tl.constexpr,
    BB: tl.constexpr,
    BG: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1)
    COUNT = CLASSES + G * EACH
    zero = tl.zeros((BB,), tl.float64)
    to_log = (tl.zeros((BB,), tl.float32) + inverse).to(tl.float64)
    to_log += (tl.zeros((BB,), tl.float32) + inverse_rest).to(tl.float64)
    scale = to_log * _LOG2E

    # piece 0 has a finite shift, unless the row is NaN
    shift, z = _load(state, tl.zeros_like(rows), rows, B, COUNT)
    for piece in range(1, CLASSES):
        other, other_z = _load(state, tl.zeros_like(rows) + piece, rows, B, COUNT)
        shift, z = _merge(shift, z, other, other_z, scale)
    log_z = tl.log(z)
    if SUMS:
        to = lse + rows.to(tl.int64) * (G + 1)
        tl.store(to, shift * to_log + log_z, mask=own < B)

    total = zero
    for start in range(0, G, BG):
        group = start + tl.arange(0, BG)
        of_group = (CLASSES + tl.minimum(group, G - 1) * EACH)[:, None]
        theirs, their_z = _load(state, of_group, rows[None, :], B, COUNT)
        for j in range(1, EACH):
            other, other_z = _load(state, of_group + j, rows[None, :], B, COUNT)
            theirs, their_z = _merge(theirs, their_z, other, other_z, scale[None, :])
        their_log = tl.log(their_z)
        # shifts first: logits of 1e4 cost no digits
        lead = (theirs - shift[None, :]) * to_log[None, :] + (their_log - log_z[None, :])
        share = 1.0 / (1.0 + tl.exp(lead))
        total += tl.sum(tl.where((group < G)[:, None], share, 0.0), axis=0)
        if SUMS:
            beside = lse + rows.to(tl.int64)[None, :] * (G + 1) + 1 + group[:, None]
            value = theirs * to_log[None, :] + their_log
            tl.store(beside, value, mask=(group < G)[:, None] & (own < B)[None, :])
    tl.store(score + rows, (total / G).to(tl.float32), mask=own < B)


@lru_cache(maxsize=64)
def _factors(tau: float) -> tuple[float, float, float]:
    """log2(e) / tau, and 1 / tau as the sum of two float32 numbers."""
    inverse = struct.unpack("f", struct.pack("f", 1 / tau))[0]
    return math.log2(math.e) / tau, inverse, 1 / tau - inverse


def _run(
    image: Tensor, bank: Columns, tau: float, normalize: bool, score: Tensor, lse: Tensor | None
) -> None:
    of = source.features("grouped", image, bank.operand, normalize=normalize)
    config, device = of.config, image.device
    scale, inverse, inverse_rest = _factors(tau)
    state = torch.empty((2, bank.total, of.b), dtype=torch.float32, device=device)
    launch(
        _sums,
        (-(-of.b // config.rows), min(splits_for(config, of.b, of.k, device), bank.total)),
        *of.arguments,
        bank.pieces,
        state,
        of.b,
        bank.k,
        of.k,
        bank.of_classes,
        bank.total,
        scale,
        int(tau < _CAREFUL_TAU),
        device=device,
        **of.constants,
        **config.options,
    )
    rows, groups = _FINISHED
    launch(
        _finish,
        (-(-of.b // rows),),
        state,
        score,
        score if lse is None else lse,
        of.b,
        bank.of_classes,
        bank.groups,
        bank.of_group,
        inverse,
        inverse_rest,
        device=device,
        SUMS=lse is not None,
        BB=rows,
        BG=groups,
        num_warps=4,
    )


def _all(image: Tensor, bank: Columns, tau: float, normalize: bool, lse: Tensor | None) -> Tensor:
    b = len(image)
    score = torch.empty(b, dtype=torch.float32, device=image.device)
    at_once = max(256, _SCRATCH // (8 * bank.total) // 256 * 256)
    for i in range(0, b, at_once):
        part = slice(i, i + at_once)
        _run(image[part], bank, tau, normalize, score[part], None if lse is None else lse[part])
    return score


def scores(image: Tensor, columns: Columns, *, tau: float, normalize: bool) -> Tensor:
    """(B,) float32 scores of ``image (B, D)``.

    NaN where an image, or any class or negative, is not finite (an image of norm 0 likewise).
    """
    return _all(image, columns, tau, normalize, None)


def sums(image: Tensor, columns: Columns, *, tau: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The scores, and (B, 1 + G) float64 log-sum-exps of the classes and of each group."""
    shape = (len(image), columns.groups + 1)
    lse = torch.empty(shape, dtype=torch.float64, device=image.device)
    return _all(image, columns, tau, normalize, lse), lse


def specialisations(
    precision: Precision, rows: int, width: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls for ``aot.py``: 1,000 classes and 100 groups of 100 negatives."""
    image = torch.empty(rows, width, dtype=native(precision))
    bank = columns(torch.empty(1000, width), torch.empty(100, 100, width), 100, precision)
    for normalize in (True, False):
        label = "as it is" if not normalize else "normalized"
        yield label, partial(scores, image, bank, tau=0.01, normalize=normalize)
    yield "with sums", partial(sums, image, bank, tau=0.01, normalize=True)
