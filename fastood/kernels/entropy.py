"""Entropy and variance of softmax over the classes: a pass of their own, few scores need them.

Two forms, as in ``fastood.reference``. About a centre, with u = (s - centre) / tau and
e = expm1(u), both keep their digits while softmax is nearly uniform (every |u| <= 20). About the
largest, with y = (s - top) / tau and p = exp(y), they are right where it is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import shares
from fastood.kernels.launch import launch
from fastood.kernels.source import Source, row_scales, similarities
from fastood.kernels.wide import expm1, log1p

__all__ = ["entropies"]

_FIELDS = 11  # centre, count, Σu, Σ(e - u), Σue, Σee, max |u|, top, Σp, Σyp, Σpp
_RANGE = tl.constexpr(20.0)
_LOG2E = tl.constexpr(1.4426950408889634)
_FINISHED = 32


@triton.jit
def _beyond(u):
    """exp(u) - 1 - u of float32, |u| <= 20."""
    high = 1 + u * (1 / 6) * (1 + u * (1 / 7) * (1 + u * (1 / 8) * (1 + u * (1 / 9))))
    small = u * u * (1 / 2) * (1 + u * (1 / 3) * (1 + u * (1 / 4) * (1 + u * (1 / 5) * high)))
    return tl.where(tl.abs(u) < 0.5, small, tl.exp2(u * _LOG2E) - 1.0 - u)


@triton.jit
def _column(number, x, at):
    """``x (BB,)`` as column ``number`` of a (BB, TP) tensor, zero elsewhere."""
    return tl.where(at == number, x[:, None], 0.0)


@triton.jit(do_not_specialize=["B", "K", "PER"])
def _sums(
    x,
    stride,
    high,
    low,
    out,  # (11, SPLITS, B, T) float64
    B,
    K,
    PER,
    inverses,  # 1 / tau
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
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
    of_rows = row_scales(x, stride, rows, D, BD, MODE, NORMALIZE)
    at = tl.arange(0, TP)[None, :]
    inverse = tl.zeros((1, TP), tl.float32) + inverses[T - 1]
    for t in tl.static_range(T - 1):
        inverse = tl.where(at == t, inverses[t], inverse)

    centre = tl.zeros((BB,), tl.float32)
    top = tl.full((BB,), float("-inf"), tl.float32)
    far = tl.zeros((BB,), tl.float32)
    total = tl.zeros((BB,), tl.float64)
    r_sum = tl.zeros((BB, TP), tl.float64)
    ue_sum = tl.zeros((BB, TP), tl.float64)
    ee_sum = tl.zeros((BB, TP), tl.float64)
    p_sum = tl.zeros((BB, TP), tl.float64)
    yp_sum = tl.zeros((BB, TP), tl.float64)
    pp_sum = tl.zeros((BB, TP), tl.float64)
    for column in range(start, stop, BN):
        columns = column + tl.arange(0, BN)
        inside = (columns < stop)[None, :]
        s = similarities(x, stride, rows, of_rows, high, low, columns, stop, D, BD, MODE, FIRST)
        if column == start:  # near the middle: sums about it cancel little
            count = tl.minimum(stop - start, BN).to(tl.float32)
            centre = tl.sum(tl.where(inside, s, 0.0), axis=1) / count
        here = tl.max(s, axis=1)
        highest = tl.maximum(top, here)
        moved = tl.where(top > float("-inf"), (top - highest), 0.0)
        by = (moved[:, None] * inverse).to(tl.float64)
        factor = tl.where((top > float("-inf"))[:, None], tl.exp(by), 0.0)
        pp_sum *= factor * factor
        yp_sum = factor * (yp_sum + by * p_sum)
        p_sum *= factor
        top = highest
        off = tl.where(inside, s - centre[:, None], 0.0)
        below = s - tl.where(top > float("-inf"), top, 0.0)[:, None]
        total += tl.sum(off, axis=1).to(tl.float64)
        far = tl.maximum(far, tl.max(tl.abs(off), axis=1))
        for t in tl.static_range(T):
            u = tl.minimum(tl.maximum(off * inverses[t], -_RANGE), _RANGE)
            r = _beyond(u)  # alone: sums of e would drown its digits in those of u
            e = u + r
            r_sum += _column(t, tl.sum(r, axis=1), at).to(tl.float64)
            ue_sum += _column(t, tl.sum(u * e, axis=1), at).to(tl.float64)
            ee_sum += _column(t, tl.sum(e * e, axis=1), at).to(tl.float64)
            y = tl.where(inside, below * inverses[t], 0.0)
            p = tl.where(inside, tl.exp2(y * _LOG2E), 0.0)
            p_sum += _column(t, tl.sum(p, axis=1), at).to(tl.float64)
            yp_sum += _column(t, tl.sum(y * p, axis=1), at).to(tl.float64)
            pp_sum += _column(t, tl.sum(p * p, axis=1), at).to(tl.float64)

    field = tl.num_programs(1).to(tl.int64) * B * T
    to = out + (split.to(tl.int64) * B + rows)[:, None] * T + at
    mask = (own < B)[:, None] & (at < T)
    none = tl.zeros((BB, TP), tl.float64)
    tl.store(to, none + centre.to(tl.float64)[:, None], mask=mask)
    tl.store(to + field, none + (stop - start), mask=mask)
    tl.store(to + 2 * field, total[:, None] * inverse.to(tl.float64), mask=mask)
    tl.store(to + 3 * field, r_sum, mask=mask)
    tl.store(to + 4 * field, ue_sum, mask=mask)
    tl.store(to + 5 * field, ee_sum, mask=mask)
    tl.store(to + 6 * field, (far[:, None] * inverse).to(tl.float64), mask=mask)
    tl.store(to + 7 * field, none + top.to(tl.float64)[:, None], mask=mask)
    tl.store(to + 8 * field, p_sum, mask=mask)
    tl.store(to + 9 * field, yp_sum, mask=mask)
    tl.store(to + 10 * field, pp_sum, mask=mask)


@triton.jit(do_not_specialize=["B", "SPLITS", "K"])
def _finish(
    sums,
    out,  # (2, T, B) float32
    B,
    SPLITS,
    K,
    taus,
    T: tl.constexpr,
    BB: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1).to(tl.int64)
    field = B.to(tl.int64) * SPLITS * T
    for t in tl.static_range(T):
        tau = (tl.zeros((BB,), tl.float32) + taus[t]).to(tl.float64)
        at = sums + rows * T + t
        centre = tl.load(at)
        n = tl.load(at + field)
        u = tl.load(at + 2 * field)
        e = u + tl.load(at + 3 * field)
        ue = tl.load(at + 4 * field)
        ee = tl.load(at + 5 * field)
        far = tl.load(at + 6 * field)
        top = tl.load(at + 7 * field)
        p = tl.load(at + 8 * field)
        yp = tl.load(at + 9 * field)
        pp = tl.load(at + 10 * field)
        for split in range(1, SPLITS):
            other = at + B.to(tl.int64) * split * T
            # about the first split's centre: u + d and exp(u + d) - 1 = f e + g
            d = (tl.load(other) - centre) / tau
            f, g = tl.exp(d), expm1(d)
            n2, u2 = tl.load(other + field), tl.load(other + 2 * field)
            e2, ue2 = u2 + tl.load(other + 3 * field), tl.load(other + 4 * field)
            ee2 = tl.load(other + 5 * field)
            n += n2
            u += u2 + n2 * d
            e += f * e2 + n2 * g
            ue += f * ue2 + g * u2 + d * (f * e2 + n2 * g)
            ee += f * f * ee2 + 2 * f * g * e2 + n2 * g * g
            far = tl.maximum(far, tl.load(other + 6 * field) + tl.abs(d))
            top2, p2 = tl.load(other + 7 * field), tl.load(other + 8 * field)
            yp2, pp2 = tl.load(other + 9 * field), tl.load(other + 10 * field)
            highest = tl.maximum(top, top2)
            by, by2 = (top - highest) / tau, (top2 - highest) / tau
            w, w2 = tl.exp(by), tl.exp(by2)
            yp = w * (yp + by * p) + w2 * (yp2 + by2 * p2)
            pp = w * w * pp + w2 * w2 * pp2
            p = w * p + w2 * p2
            top = highest
        k = (tl.zeros((BB,), tl.float32) + K).to(tl.float64)
        m = e / k
        near = far <= 20.0
        one = tl.where(near, 1 + m, 1.0)
        entropy = (u / k + ue / k) / one - log1p(tl.where(near, m, 0.0))
        variance = (ee / k - m * m) / (k * one * k * one)
        peaked = tl.log(k) - tl.log(p) + yp / p
        spread = pp / (k * p * p) - 1 / (k * k)
        bad = (p != p) | ~(tl.abs(top) < float("inf"))
        entropy = tl.where(bad, float("nan"), tl.where(near, entropy, peaked))
        variance = tl.where(bad, float("nan"), tl.where(near, variance, spread))
        to = out + t * B.to(tl.int64) + rows
        tl.store(to, entropy.to(tl.float32), mask=own < B)
        tl.store(to + T * B.to(tl.int64), variance.to(tl.float32), mask=own < B)


def entropies(of: Source, taus: tuple[float, ...]) -> Tensor:
    """(2, T, B) float32: log K - H(softmax(s / tau)), and the variance of softmax(s / tau)."""
    device = of.x.device
    of = of.narrower()
    splits, per = shares(of.config, of.b, of.k, device)
    found = torch.empty((2, len(taus), of.b), dtype=torch.float32, device=device)
    sums = torch.empty((_FIELDS, splits, of.b, len(taus)), dtype=torch.float64, device=device)
    launch(
        _sums,
        (-(-of.b // of.config.rows), splits),
        *of.arguments,
        sums,
        of.b,
        of.k,
        per,
        tuple(1 / tau for tau in taus),
        device=device,
        **of.constants,
        T=len(taus),
        TP=1 << (len(taus) - 1).bit_length(),
        **of.config.options,
    )
    launch(
        _finish,
        (-(-of.b // _FINISHED),),
        sums,
        found,
        of.b,
        splits,
        of.k,
        taus,
        device=device,
        T=len(taus),
        BB=_FINISHED,
        num_warps=1,
    )
    return found
