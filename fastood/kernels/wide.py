"""float64 functions for the few numbers kept of a row. Device functions."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expm1", "log1p", "log_sum", "softplus", "softplus_rise"]


@triton.jit
def expm1(x):
    """exp(x) - 1 to the last digits (Kahan: the rounding of exp cancels)."""
    u = tl.exp(x)
    flat, gone = u == 1.0, u < 1e-16
    safe = tl.where(flat | gone | (u == float("inf")), 2.0, u)
    close = (safe - 1.0) * x / tl.log(safe)
    return tl.where(flat, x, tl.where(gone, -1.0, tl.where(u == float("inf"), u, close)))


@triton.jit
def log1p(x):
    """log(1 + x) to the last digits, likewise."""
    u = x + 1.0
    flat, huge = u == 1.0, u == float("inf")
    safe = tl.where(flat | huge, 2.0, u)
    return tl.where(flat, x, tl.where(huge, u, tl.log(u) * x / (safe - 1.0)))


@triton.jit
def log_sum(a, b):
    """log(exp(a) + exp(b)), -inf allowed."""
    high = tl.maximum(a, b)
    at = tl.where(high > float("-inf"), high, 0.0)
    return at + tl.log(tl.exp(a - at) + tl.exp(b - at))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def softplus_rise(x, y, gap):
    """softplus(x) - softplus(y) for x = y + gap, also where x is close to y or both are +-inf."""
    beyond = tl.abs(x) > 1e300
    near = tl.abs(gap) <= 1.0
    to = tl.where(beyond, 0.0, y)
    far = softplus(tl.where(beyond, 0.0, x)) - softplus(to)
    share = 1.0 / (1.0 + tl.exp(-to))
    close = log1p(share * expm1(tl.where(near, gap, 0.0)))
    return tl.where(beyond, tl.where(x > 0.0, gap, 0.0), tl.where(near, close, far))
