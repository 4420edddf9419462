"""Tiles of cosines: rows of images times rows of classes, in each precision. Device functions."""

from __future__ import annotations

import triton
import triton.language as tl

from fastood.kernels.launch import INTERPRETED

__all__ = ["as_operand", "inverse_norms", "low_half", "product", "round_tf32", "tile"]

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def inverse_norms(x, stride, rows, D: tl.constexpr, BD: tl.constexpr):
    """(BB,) float32 1 / ‖x[rows]‖; not finite for a row that is zero or not finite itself.

    The one extra read of the rows comes from memory, those of the products then from the cache.
    """
    base = x + rows.to(tl.int64) * stride
    squares = tl.zeros_like(rows).to(tl.float32)
    largest = tl.zeros_like(rows).to(tl.float32)
    for start in tl.static_range(0, D, BD):
        k = start + tl.arange(0, BD)
        v = tl.load(base[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(v * v, axis=1)
        if x.dtype.element_ty != tl.float16:
            largest = tl.maximum(largest, tl.max(tl.abs(v), axis=1))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares))
    if x.dtype.element_ty != tl.float16:
        # squares of 1e20 overflow and of 1e-25 vanish
        extreme = (largest > 1e15) | ((largest < 1e-15) & (largest > 0))
        if tl.max(extreme.to(tl.int32), axis=0) != 0:
            scale = tl.where(extreme, tl.div_rn(1.0, largest), 1.0)
            squares = tl.zeros_like(squares)
            for start in tl.static_range(0, D, BD):
                k = start + tl.arange(0, BD)
                v = tl.load(base[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
                v = v.to(tl.float32) * scale[:, None]
                squares += tl.sum(v * v, axis=1)
            inverse = scale * tl.div_rn(1.0, tl.sqrt_rn(squares))
    return inverse


@triton.jit
def _without_bits(x, COUNT: tl.constexpr):
    """float32 rounded to nearest even with the last COUNT bits of its mantissa zero."""
    bits = x.to(tl.int32, bitcast=True)
    half: tl.constexpr = (1 << (COUNT - 1)) - 1
    bits = (bits + half + ((bits >> COUNT) & 1)) & -(1 << COUNT)
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def round_tf32(x):
    """float32 with 10 bits of mantissa: the matrix unit would cut the others off."""
    return _without_bits(x, 13)


@triton.jit
def low_half(x, high):
    """What ``high``, float16, leaves of ``x``, scaled out of float16's subnormal range."""
    return ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def as_operand(x, MODE: tl.constexpr):
    """``x`` as it is multiplied (fp16x3: its high half)."""
    if MODE == "bf16":
        if _INTERPRETED:  # which cuts off what the processor rounds
            x = _without_bits(x.to(tl.float32), 16)
        y = x.to(tl.bfloat16)
    elif MODE == "tf32":
        y = round_tf32(x.to(tl.float32))
    elif MODE == "fp32":
        y = x.to(tl.float32)
    else:
        y = x.to(tl.float16)
    return y


@triton.jit
def product(a, b, acc, MODE: tl.constexpr):
    """``acc + a @ b`` of operands, summed in float32."""
    if MODE == "fp32":
        acc = tl.dot(a, b, acc, input_precision="ieee")
    elif MODE == "bf16" and _INTERPRETED:  # NumPy knows no bfloat16, and would multiply its bits
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def tile(
    x,  # (B, D) images, rows ``stride`` apart
    stride,
    rows,  # (BB,) int, in range
    inverse,  # (BB,) float32, multiplies the rows
    high,  # (K, D) classes as operands, contiguous
    low,  # (K, D) their low halves (fp16x3), else anything
    columns,  # (BN,) int, in range
    D: tl.constexpr,
    BD: tl.constexpr,
    MODE: tl.constexpr,  # a precision
    FIRST: tl.constexpr,  # scale images while casting them, or else the sums
):
    """(BB, BN) float32 products of ``x[rows] * inverse`` with classes ``columns``."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    rest = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    of_image = x + rows.to(tl.int64)[:, None] * stride
    of_class = columns.to(tl.int64)[None, :] * D
    for start in range(0, D, BD):
        k = start + tl.arange(0, BD)
        if D % BD == 0:
            a = tl.load(of_image + k[None, :])
            b = tl.load(high + of_class + k[:, None])
        else:
            a = tl.load(of_image + k[None, :], mask=(k < D)[None, :], other=0.0)
            b = tl.load(high + of_class + k[:, None], mask=(k < D)[:, None], other=0.0)
        if FIRST:
            a = a.to(tl.float32) * inverse[:, None]
        if MODE == "fp16x3":
            if D % BD == 0:
                b_low = tl.load(low + of_class + k[:, None])
            else:
                b_low = tl.load(low + of_class + k[:, None], mask=(k < D)[:, None], other=0.0)
            a = a.to(tl.float32)
            a_high = a.to(tl.float16)
            acc = product(a_high, b, acc, MODE)
            rest = product(a_high, b_low, rest, MODE)
            rest = product(low_half(a, a_high), b, rest, MODE)
        else:
            acc = product(as_operand(a, MODE), b, acc, MODE)
    if MODE == "fp16x3":
        acc += rest * (1.0 / 2048.0)
    if not FIRST:
        acc *= inverse[:, None]
    return acc
