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
    for split in range(0, SPLITS):
        record = state + (split * B + rows) * (2 * C + 1 + T)
        for j in tl.static_range(C):
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
def _delta_energy(v, own, rank, rest, tau, reset, best, C: tl.constexpr, c: tl.constexpr, JOINT):
    """Energy change when the c largest are reset; ``own`` and ``rest`` are relative to the best."""
    chosen = rank < c
    gap = (v - reset[:, None]) / tau[:, None]
    to = (reset - best) / tau
    if JOINT and c > 1:
        none = float("-inf")
        together = tl.log(tl.sum(tl.where(chosen, tl.exp(own), 0.0), axis=1))
        beyond = tl.where(chosen, none, own)
        high = tl.max(beyond, axis=1)
        finite = tl.where(high > none, high, 0.0)
        left = finite + tl.log(tl.sum(tl.exp(beyond - finite[:, None]), axis=1))
        left = log_sum(left, rest)
        count = tl.zeros_like(to) + c
        all_reset = to + tl.log(count)
        most = tl.max(tl.where(chosen, tl.abs(gap), 0.0), axis=1)
        small = chosen & (most <= 1.0)[:, None]
        mean = tl.sum(tl.where(small, expm1(tl.where(small, gap, 0.0)), 0.0), axis=1) / count
        whole = tl.where(most <= 1.0, log1p(mean), together - all_reset)
        out = softplus_rise(together - left, all_reset - left, whole)
    else:
        # others[b, j]: log sum over every class but the j-th held, relative to their own largest:
        # next to the best they may vanish
        here = tl.arange(0, C)
        own_2 = tl.where(
            (here[:, None] == here[None, :])[None, :, :], float("-inf"), own[:, None, :]
        )
        high = tl.maximum(tl.max(own_2, axis=2), rest[:, None])
        finite = tl.where(high > float("-inf"), high, 0.0)
        sums = tl.sum(tl.exp(own_2 - finite[:, :, None]), axis=2) + tl.exp(rest[:, None] - finite)
        others = finite + tl.log(sums)
        rise = softplus_rise(own - others, to[:, None] - others, gap)
        out = tl.sum(tl.where(chosen, rise, 0.0), axis=1)
    return out


@triton.jit(do_not_specialize=["B", "SPLITS"])
def finish_scores(
    state,
    out,  # (R, B) float32
    nearest,  # (B,) int64, or anything
    B,
    SPLITS,
    scales,  # log2(e) / tau
    taus,
    resets,  # of each score
    PLAN: tl.constexpr,  # (kind, number of tau, c, flag) of each score
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
    for j in tl.static_range(len(PLAN)):
        tau = (tl.zeros_like(best).to(tl.float32) + taus[PLAN[j][1]]).to(tl.float64)
        beside = (v - best[:, None]) / tau[:, None]
        of_rest = tl.sum(tl.where(at == PLAN[j][1], z, 0.0), axis=1).to(tl.float64)
        gap = tl.where(of_rest > 0.0, (shift.to(tl.float64) - best) / tau, 0.0)
        partition = tl.sum(tl.exp(beside), axis=1) + of_rest * tl.exp(gap)
        if PLAN[j][0] == 0:  # numbers of fastood.ops.requests.Kind
            score = best
        elif PLAN[j][0] == 1:
            score = best / tau
        elif PLAN[j][0] == 2:
            score = 1.0 / partition
        elif PLAN[j][0] == 3:
            if PLAN[j][3]:
                score = best / tau + tl.log(partition)
            else:
                score = best + tau * tl.log(partition)
        elif PLAN[j][0] == 6:
            second = _of_rank(v, rank, 1)
            if PLAN[j][3]:
                score = -expm1((second - best) / tau) / partition
            else:
                score = best - second
        else:
            tl.static_assert(PLAN[j][0] == 7)
            reset = (tl.zeros_like(best).to(tl.float32) + resets[j]).to(tl.float64)
            log_rest = gap + tl.log(of_rest)
            score = _delta_energy(
                v,
                beside,
                rank,
                log_rest,
                tau,
                reset,
                best,
                C,
                PLAN[j][2],
                PLAN[j][3],
            )
        score = tl.where(poison, float("nan"), score)
        tl.store(out + j * B.to(tl.int64) + rows, score.to(tl.float32), mask=own < B)
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
