"""From the partial states of rows to their scores or statistics: one small kernel each.

As in ``csrc/cpu/epilogue.h``: everything is relative to the largest similarity and in float64, the
only rounding a score sees is the one to float32 at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastood.kernels.state import empty_top, hold, merge_rest, vector_of
from fastood.kernels.wide import expm1, log1p, log_sum, softplus_rise

__all__ = ["finish_scores", "finish_statistics"]


@triton.jit
def _merged(state, rows, B, SPLITS, scale, C: tl.constexpr, T: tl.constexpr, TP: tl.constexpr):
    """The states of ``rows`` from their splits, in order; what ``rows.py`` has written."""
    values, classes = empty_top(rows.shape[0], C)
    shift = tl.zeros_like(rows).to(tl.float32) + float("-inf")
    z = tl.zeros((rows.shape[0], TP), tl.float32)
    at = tl.arange(0, TP)[None, :]
    for split in range(SPLITS):
        record = state + (split * B + rows) * (2 * C + 1 + T)
        for j in tl.range(C, num_stages=1, loop_unroll_factor=1):
            value = tl.load(record + j)
            owner = tl.load(record + C + j).to(tl.int32, bitcast=True)
            values, classes, out = hold(values, classes, value, owner)
            shift, z = merge_rest(shift, z, out, 1.0, scale)
        own = tl.load(record + 2 * C)
        own_z = tl.load(
            (record + 2 * C + 1)[:, None] + at, mask=(at < T) & (rows >= 0)[:, None], other=0.0
        )
        shift, z = merge_rest(shift, z, own, own_z, scale)
    return values, classes, shift, z


@triton.jit
def _ranks(values, classes):
    """(BB, C) how many of the held come before each."""
    theirs, mine = values[:, None, :], values[:, :, None]
    earlier = classes[:, None, :] < classes[:, :, None]
    before = (theirs > mine) | ((theirs == mine) & earlier)
    return tl.sum(before.to(tl.int32), axis=2)


@triton.jit
def _of_rank(values, rank, which):
    return tl.max(tl.where(rank == which, values, float("-inf")), axis=1)


@triton.jit
def _joint(own, chosen, rest, gap, to, count):
    """Energy change when the chosen are reset together."""
    none = float("-inf")
    together = tl.log(tl.sum(tl.where(chosen, tl.exp(own), 0.0), axis=1))
    beyond = tl.where(chosen, none, own)
    high = tl.max(beyond, axis=1)
    finite = tl.where(high > none, high, 0.0)
    left = finite + tl.log(tl.sum(tl.exp(beyond - finite[:, None]), axis=1))
    left = log_sum(left, rest)
    all_reset = to + tl.log(count)
    most = tl.max(tl.where(chosen, tl.abs(gap), 0.0), axis=1)
    small = chosen & (most <= 1.0)[:, None]
    mean = tl.sum(tl.where(small, expm1(tl.where(small, gap, 0.0)), 0.0), axis=1) / count
    whole = tl.where(most <= 1.0, log1p(mean), together - all_reset)
    return softplus_rise(together - left, all_reset - left, whole)


@triton.jit
def _one_by_one(own, chosen, rest, gap, to, C: tl.constexpr):
    """Sum of the energy changes when each of the chosen is reset."""
    # others[b, j]: log sum over every class but the j-th held, relative to their own largest:
    # next to the best they may vanish
    here = tl.arange(0, C)
    others = tl.where((here[:, None] == here[None, :])[None, :, :], float("-inf"), own[:, None, :])
    high = tl.maximum(tl.max(others, axis=2), rest[:, None])
    finite = tl.where(high > float("-inf"), high, 0.0)
    sums = tl.sum(tl.exp(others - finite[:, :, None]), axis=2) + tl.exp(rest[:, None] - finite)
    left = finite + tl.log(sums)
    rise = softplus_rise(own - left, to[:, None] - left, gap)
    return tl.sum(tl.where(chosen, rise, 0.0), axis=1)


@triton.jit
def _chosen(number, numbers, COUNT: tl.constexpr):
    """``numbers[number]`` of a tuple, where the number is not a constant."""
    out = numbers[0]
    for i in tl.static_range(1, COUNT):
        out = tl.where(number == i, numbers[i], out)
    return out


@triton.jit(do_not_specialize=["B", "SPLITS", "R"])
def finish_scores(
    state,
    out,  # (R, B) float32
    nearest,  # (B,) int64, or anything
    B,
    SPLITS,
    R,
    scales,  # log2(e) / tau
    taus,
    codes,  # of each score, see below; floats, which Triton does not make constants of: one kernel
    resets,  # serves any scores
    RP: tl.constexpr,  # places in ``codes``
    NEAREST: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1).to(tl.int64)
    scale = vector_of(scales, T, TP)
    values, classes, shift, z = _merged(state, rows, B, SPLITS, scale, C, T, TP)
    rank = _ranks(values, classes)
    v = values.to(tl.float64)
    best = tl.max(v, axis=1)
    poison = (tl.sum((z != z).to(tl.int32), axis=1) > 0) | ~(tl.abs(best) < float("inf"))
    at = tl.arange(0, TP)[None, :]
    zero = tl.zeros_like(best)
    for j in range(R):
        code = (_chosen(j, codes, RP) + tl.zeros((1,), tl.float32)).to(tl.int32)
        code = tl.sum(code, axis=0)
        kind, flag, c, t = code & 7, (code >> 3) & 1, (code >> 4) & 15, (code >> 8) & 31
        tau = (zero.to(tl.float32) + _chosen(t, taus, T)).to(tl.float64)
        beside = (v - best[:, None]) / tau[:, None]
        of_rest = tl.sum(tl.where(at == t, z, 0.0), axis=1).to(tl.float64)
        gap = tl.where(of_rest > 0.0, (shift.to(tl.float64) - best) / tau, 0.0)
        partition = tl.sum(tl.exp(beside), axis=1) + of_rest * tl.exp(gap)
        score = best  # numbers of fastood.ops.requests.Kind
        if kind == 1:
            score = best / tau
        if kind == 2:
            score = 1.0 / partition
        if kind == 3:
            # in units of logits, or of cosines
            score = (best / tau + tl.log(partition)) * tl.where(flag != 0, 1.0, tau)
        if kind == 6:
            second = _of_rank(v, rank, 1)
            score = best - second
            if flag != 0:
                score = -expm1(-score / tau) / partition
        if kind == 7:
            reset = (zero.to(tl.float32) + _chosen(j, resets, RP)).to(tl.float64)
            log_rest = gap + tl.log(of_rest)
            chosen = rank < c
            change = (v - reset[:, None]) / tau[:, None]
            to = (reset - best) / tau
            if (flag != 0) & (c > 1):
                score = _joint(beside, chosen, log_rest, change, to, zero + c)
            else:
                score = _one_by_one(beside, chosen, log_rest, change, to, C)
        score = tl.where(poison, float("nan"), score)
        tl.store(out + B.to(tl.int64) * (code >> 13) + rows, score.to(tl.float32), mask=own < B)
    if NEAREST:
        first = tl.min(tl.where(rank == 0, classes, 2**31 - 1), axis=1)
        tl.store(nearest + rows, tl.where(poison, 0, first).to(tl.int64), mask=own < B)


@triton.jit(do_not_specialize=["B", "SPLITS", "c"])
def finish_statistics(
    state,
    values_out,  # (B, c) float32
    classes_out,  # (B, c) int64
    rest_out,  # (B, T) float64
    B,
    SPLITS,
    c,
    scales,
    taus,
    C: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, B - 1).to(tl.int64)
    inside = own < B
    scale = vector_of(scales, T, TP)
    values, classes, shift, z = _merged(state, rows, B, SPLITS, scale, C, T, TP)
    rank = _ranks(values, classes)
    best = tl.max(values, axis=1)
    poison = (tl.sum((z != z).to(tl.int32), axis=1) > 0) | ~(tl.abs(best) < float("inf"))
    wanted = inside[:, None] & (rank < c)
    to = rows[:, None] * c + rank
    tl.store(values_out + to, tl.where(poison[:, None], float("nan"), values), mask=wanted)
    # a class that exists, whatever the row: it will be used as an index
    tl.store(classes_out + to, tl.where(poison[:, None], rank, classes).to(tl.int64), mask=wanted)
    # of the values held, those beyond c belong to the rest
    beyond = tl.where(rank < c, float("-inf"), values)
    beside = (beyond - best[:, None]).to(tl.float64)
    at = tl.arange(0, TP)[None, :]
    for t in tl.static_range(T):
        tau = (tl.zeros_like(best) + taus[t]).to(tl.float64)
        of_rest = tl.sum(tl.where(at == t, z, 0.0), axis=1).to(tl.float64)
        gap = tl.where(of_rest > 0.0, (shift - best).to(tl.float64) / tau, 0.0)
        logs = beside / tau[:, None]
        high = tl.max(logs, axis=1)
        finite = tl.where(high > float("-inf"), high, 0.0)
        left = finite + tl.log(tl.sum(tl.exp(logs - finite[:, None]), axis=1))
        rest = tl.where(poison, float("nan"), log_sum(left, gap + tl.log(of_rest)))
        tl.store(rest_out + rows * T + t, rest, mask=inside)
