"""What is kept of a row while its similarities go by, tile after tile. Device functions.

As in ``csrc/cpu/state.h``: the C largest values stay outside every sum, a value that falls out of
them joins the rest, and the rest of a row is ``(shift, z)``: its largest similarity and, for each
temperature, Σ exp((s - shift) / tau). Nothing is obtained by taking a large part off a sum.

Shapes: BB rows, BN columns of a tile, C values held, TP temperatures (padded to a power of two).
``scales`` is the tuple of log2(e) / tau, ``scale`` the same as a tensor (TP,).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "empty_top",
    "hold",
    "merge_rest",
    "push",
    "rest_of",
    "take_best",
    "vector_of",
]

_NOBODY = tl.constexpr(2**31 - 1)  # the class of a place that holds no value


@triton.jit
def vector_of(numbers, T: tl.constexpr, TP: tl.constexpr):
    """A tuple of T numbers as a tensor (TP,), the last repeated."""
    at = tl.arange(0, TP)
    out = tl.zeros((TP,), tl.float32) + numbers[T - 1]
    for t in tl.static_range(T - 1):
        out = tl.where(at == t, numbers[t], out)
    return out


@triton.jit
def empty_top(BB: tl.constexpr, C: tl.constexpr):
    """(BB, C) values and classes of nobody; the places differ, so that one can be told."""
    values = tl.full((BB, C), float("-inf"), tl.float32)
    classes = tl.zeros((BB, C), tl.int32) + (_NOBODY - C) + tl.arange(0, C)[None, :]
    return values, classes


@triton.jit
def take_best(s, columns):
    """The largest of each row, whose it is (of equals the lowest), and the row without it."""
    best = tl.max(s, axis=1)
    at = tl.min(tl.where(s == best[:, None], columns[None, :], _NOBODY), axis=1)
    return best, at, tl.where(columns[None, :] == at[:, None], float("-inf"), s)


@triton.jit
def hold(values, classes, value, at):
    """Puts ``value (BB,)`` in the place of the last held if it comes before; what falls out.

    The order is total, larger first, then the lower class: what is held, and whose it is, does not
    depend on how the classes were split. Values of no class never come before others.
    """
    lowest = tl.min(values, axis=1)
    last = tl.max(tl.where(values == lowest[:, None], classes, -1), axis=1)
    better = (value > lowest) | ((value == lowest) & (at < last) & (value > float("-inf")))
    here = better[:, None] & (values == lowest[:, None]) & (classes == last[:, None])
    values = tl.where(here, value[:, None], values)
    classes = tl.where(here, at[:, None], classes)
    return values, classes, tl.where(better, lowest, value)


@triton.jit
def rest_of(s, scales, T: tl.constexpr, TP: tl.constexpr):
    """(BB,) the largest of ``s (BB, BN)`` and (BB, TP) sums relative to it; -inf and 0 if none."""
    shift = tl.max(s, axis=1)
    finite = tl.where(shift > float("-inf"), shift, 0.0)  # also where there are NaN only
    below = s - finite[:, None]
    at = tl.arange(0, TP)[None, :]
    z = tl.zeros((s.shape[0], TP), tl.float32)
    for t in tl.static_range(T):
        z = tl.where(at == t, tl.sum(tl.exp2(below * scales[t]), axis=1)[:, None], z)
    return shift, z


@triton.jit
def merge_rest(shift, z, other, other_z, scale):
    """Two rests, or a rest and single values ``other`` with ``other_z = 1``."""
    both = tl.maximum(shift, other)
    at = tl.where(both > float("-inf"), both, 0.0)
    first = tl.exp2((shift - at)[:, None] * scale[None, :])
    second = tl.exp2((other - at)[:, None] * scale[None, :])
    return both, z * first + other_z * second


@triton.jit
def push(
    values,
    classes,
    shift,
    z,
    s,  # (BB, BN), -inf where there is no class
    columns,  # (BN,) int32
    scales,
    scale,
    C: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
):
    """The state of rows after one more tile."""
    if C <= 2:
        for _ in tl.static_range(C):
            best, at, s = take_best(s, columns)
            values, classes, out = hold(values, classes, best, at)
            shift, z = merge_rest(shift, z, out, 1.0, scale)
    else:  # code for each of eight would take a minute to compile
        for _ in tl.range(C, num_stages=1, loop_unroll_factor=1):
            best, at, s = take_best(s, columns)
            values, classes, out = hold(values, classes, best, at)
            shift, z = merge_rest(shift, z, out, 1.0, scale)
    own, own_z = rest_of(s, scales, T, TP)
    shift, z = merge_rest(shift, z, own, own_z, scale)
    return values, classes, shift, z
