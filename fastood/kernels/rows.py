"""Global scores: cosines of images with all classes, reduced to a few numbers a row as they come.

Two launches: ``_states`` (blocks of rows × splits of the classes) writes the state of each row and
split, ``finish.py`` merges the splits and makes scores of them. Never a (B, K) array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels import source
from fastood.kernels.configs import shares
from fastood.kernels.entropy import entropies
from fastood.kernels.finish import finish_scores, finish_statistics
from fastood.kernels.launch import launch
from fastood.kernels.operands import Operand
from fastood.kernels.source import Source, row_scales, similarities
from fastood.kernels.state import empty_top, push, vector_of
from fastood.ops.requests import MAX_TAUS, Kind, Request

__all__ = [
    "MAX_C",
    "MAX_TAUS",
    "scores",
    "similarity_scores",
    "similarity_statistics",
    "statistics",
]

MAX_C = 8
"""Values a row can hold; for a larger c callers take the reference, in blocks of rows."""

_TOGETHER = 16  # scores of one second launch
_MOST = 2048  # of one call: the row of a score is part of a number that float32 has to hold

_FINISHED = {1: (32, 1), 2: (32, 2), 4: (16, 2), 8: (8, 4)}
"""Rows and warps of a program of the second launch, by the values held: pairs of them, in float64,
are to stay in registers."""


@triton.jit(do_not_specialize=["B", "K", "PER"])
def _states(
    x,
    stride,
    high,
    low,
    state,  # (SPLITS, B, 2 C + 1 + T): values, classes, largest and sums of the rest
    B,
    K,
    PER,  # classes of a split, a multiple of BN
    scales,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1)
    split = tl.program_id(1)
    start = split * PER
    stop = tl.minimum(start + PER, K)

    scale = vector_of(scales, T, TP)
    of_rows = row_scales(x, stride, rows, D, BD, MODE, NORMALIZE)
    values, classes = empty_top(BB, C)
    shift = tl.full((BB,), float("-inf"), tl.float32)
    z = tl.zeros((BB, TP), tl.float32)
    for column in range(start, stop, BN):
        columns = column + tl.arange(0, BN)
        s = similarities(x, stride, rows, of_rows, high, low, columns, stop, D, BD, MODE, FIRST)
        values, classes, shift, z = push(
            values, classes, shift, z, s, columns, scales, scale, C, T, TP
        )

    record = state + (split.to(tl.int64) * B + rows) * (2 * C + 1 + T)
    inside = own < B
    held = tl.arange(0, C)[None, :]
    tl.store(record[:, None] + held, values, mask=inside[:, None])
    bits = classes.to(tl.float32, bitcast=True)
    tl.store(record[:, None] + C + held, bits, mask=inside[:, None])
    tl.store(record + 2 * C, shift, mask=inside)
    at = tl.arange(0, TP)[None, :]
    tl.store((record + 2 * C + 1)[:, None] + at, z, mask=inside[:, None] & (at < T))


class _Part(NamedTuple):
    """Requests of one second launch."""

    asked: int
    codes: tuple[float, ...]
    """Of each request, see ``_code``; zeros up to a power of two."""
    resets: tuple[float, ...]


class _Pass(NamedTuple):
    """Requests that share the products."""

    parts: list[_Part]
    taus: tuple[float, ...]
    c: int


class _Plan(NamedTuple):
    passes: list[_Pass]
    entropies: list[tuple[int, Request]]
    """Requests for moments, which have a kernel of their own."""


def _code(place: int, request: Request, tau: int) -> float:
    """A request and the row of its scores as one number, exact in float32."""
    kind, flag = int(request.kind), int(request.flag)
    return float(kind | flag << 3 | request.c << 4 | tau << 8 | place << 13)


@lru_cache(maxsize=256)
def _planned(requests: tuple[Request, ...]) -> _Plan:
    if len(requests) > _MOST:
        raise ValueError(f"requests: expected at most {_MOST} scores a call, got {len(requests)}")
    moments = [
        (i, r) for i, r in enumerate(requests) if r.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE)
    ]
    others = [i for i, r in enumerate(requests) if r.kind not in (Kind.NEG_ENTROPY, Kind.VARIANCE)]
    passes = []
    while others:
        taus: dict[float, int] = {}
        of = []
        for i in others:
            if len(taus) < MAX_TAUS or requests[i].tau in taus:
                taus.setdefault(requests[i].tau, len(taus))
                of.append(i)
        others = [i for i in others if i not in of]
        parts = []
        for first in range(0, len(of), _TOGETHER):
            numbers = of[first : first + _TOGETHER]
            # few numbers of scores, few kernels to compile
            spare = (0.0,) * ((1 << (len(numbers) - 1).bit_length()) - len(numbers))
            codes = tuple(_code(i, requests[i], taus[requests[i].tau]) for i in numbers)
            resets = tuple(float(requests[i].reset) for i in numbers)
            parts.append(_Part(len(numbers), codes + spare, resets + spare))
        passes.append(_Pass(parts, tuple(taus), max(requests[i].c for i in of)))
    return _Plan(passes, moments)


class _States(NamedTuple):
    """The first launch, done."""

    buffer: Tensor
    splits: int
    scales: tuple[float, ...]
    constants: dict[str, int]


def _first(of: Source, taus: Sequence[float], c: int) -> _States:
    if c > MAX_C:
        raise ValueError(f"c: the kernels hold at most {MAX_C} values of a row, got {c}")
    if len(taus) > 1:
        of = of.narrower()
    held = 1 << (c - 1).bit_length()
    constants = {"C": held, "T": len(taus), "TP": 1 << (len(taus) - 1).bit_length()}
    scales = tuple(math.log2(math.e) / tau for tau in taus)
    device = of.x.device
    splits, per = shares(of.config, of.b, of.k, device)
    buffer = torch.empty(
        (splits, of.b, 2 * held + 1 + len(taus)), dtype=torch.float32, device=device
    )
    launch(
        _states,
        (-(-of.b // of.config.rows), splits),
        *of.arguments,
        buffer,
        of.b,
        of.k,
        per,
        scales,
        device=device,
        **of.constants,
        **constants,
        **of.config.options,
    )
    return _States(buffer, splits, scales, constants)


def _scores(
    requests: tuple[Request, ...], of: Source, classes: bool
) -> tuple[Tensor, Tensor | None]:
    device = of.x.device
    plan = _planned(requests)
    out = torch.empty((len(requests), of.b), dtype=torch.float32, device=device)
    nearest = torch.empty(of.b, dtype=torch.int64, device=device) if classes else None
    passes = plan.passes
    if classes and not passes:  # its score is overwritten below
        passes = _planned((Request(Kind.MAX_SIMILARITY),)).passes
    for number, one in enumerate(passes):
        states = _first(of, one.taus, one.c)
        block, warps = _FINISHED[states.constants["C"]]
        for part, (asked, codes, resets) in enumerate(one.parts):
            with_classes = classes and number == part == 0
            launch(
                finish_scores,
                (-(-of.b // block),),
                states.buffer,
                out,
                nearest if with_classes else out,
                of.b,
                states.splits,
                asked,
                states.scales,
                one.taus,
                codes,
                resets,
                device=device,
                RP=len(codes),
                NEAREST=with_classes,
                **states.constants,
                BB=block,
                num_warps=warps,
            )
    if plan.entropies:
        taus = tuple(dict.fromkeys(r.tau for _, r in plan.entropies))
        found = entropies(of, taus)
        for i, r in plan.entropies:
            out[i] = found[int(r.kind == Kind.VARIANCE), taus.index(r.tau)]
    return out, nearest


def scores(
    requests: tuple[Request, ...],
    image: Tensor,
    text: Operand,
    *,
    normalize: bool,
    classes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(R, B) float32 scores of ``image (B, D)``; (B,) int64 nearest classes if asked.

    NaN where an image, or any class, is not finite (an image of norm 0 likewise).
    """
    of = source.features("rows", image, text, normalize=normalize)
    return _scores(requests, of, classes)


def similarity_scores(
    requests: tuple[Request, ...], similarity: Tensor, *, classes: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same of given similarities (B, K)."""
    return _scores(requests, source.given(similarity), classes)


def _statistics(of: Source, taus: Sequence[float], c: int, moments: bool) -> tuple[Tensor, ...]:
    device = of.x.device
    taus = tuple(taus)
    states = _first(of, taus, c)
    values = torch.empty((of.b, c), dtype=torch.float32, device=device)
    classes = torch.empty((of.b, c), dtype=torch.int64, device=device)
    rest = torch.empty((of.b, len(taus)), dtype=torch.float64, device=device)
    block, warps = _FINISHED[states.constants["C"]]
    launch(
        finish_statistics,
        (-(-of.b // block),),
        states.buffer,
        values,
        classes,
        rest,
        of.b,
        states.splits,
        c,
        states.scales,
        taus,
        device=device,
        **states.constants,
        BB=block,
        num_warps=warps,
    )
    if not moments:
        return values, classes, rest, values.new_empty(of.b, 0), values.new_empty(of.b, 0)
    found = entropies(of, taus)
    return values, classes, rest, found[0].mT.contiguous(), found[1].mT.contiguous()


def statistics(
    image: Tensor,
    text: Operand,
    *,
    taus: Sequence[float],
    c: int,
    moments: bool,
    normalize: bool = False,
) -> tuple[Tensor, ...]:
    """The five parts of ``fastood.ops.rows.RowStatistics`` of ``image (B, D)``, c at most 8."""
    return _statistics(source.features("rows", image, text, normalize=normalize), taus, c, moments)


def similarity_statistics(
    similarity: Tensor, *, taus: Sequence[float], c: int, moments: bool
) -> tuple[Tensor, ...]:
    """The same of given similarities (B, K)."""
    return _statistics(source.given(similarity), taus, c, moments)
