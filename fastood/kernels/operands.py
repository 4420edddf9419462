"""Classes as the kernels multiply them: normalised, cast and split once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.launch import launch
from fastood.kernels.precision import Precision
from fastood.kernels.products import as_operand, inverse_norms, low_half

__all__ = ["Operand", "native", "prepare", "scaled_first"]

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp16x3": torch.float16,
    "fp32": torch.float32,
}


def native(precision: Precision) -> torch.dtype:
    """Of features that a precision is the default for, or that it takes without a cast."""
    return torch.float32 if precision == "fp16x3" else _DTYPES[precision]


class Operand(NamedTuple):
    """Rows (K, D) ready for products in one precision."""

    precision: Precision
    high: Tensor
    """(K, D), contiguous: float16, bfloat16, or float32 (for tf32 already rounded)."""
    low: Tensor | None = None
    """fp16x3: (K, D) float16, 2048 times what ``high`` leaves."""


@triton.jit(do_not_specialize=["K"])
def _prepare(
    x,
    stride,
    high,
    low,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    rows = tl.minimum(own, K - 1)
    inverse = tl.full((BB,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = inverse_norms(x, stride, rows, D, BD)
    for start in range(0, D, BD):
        k = start + tl.arange(0, BD)
        inside = (own < K)[:, None] & (k < D)[None, :]
        v = tl.load(x + rows.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32) * inverse[:, None]
        to = rows.to(tl.int64)[:, None] * D + k[None, :]
        first = as_operand(v, MODE)
        tl.store(high + to, first, mask=inside)
        if MODE == "fp16x3":
            tl.store(low + to, low_half(v, first), mask=inside)


def prepare(rows: Tensor, precision: Precision, *, normalize: bool) -> Operand:
    """``rows (K, D)`` of any float dtype for products in ``precision``, in one launch.

    Rows that are zero or not finite become NaN if they are normalised.
    """
    rows = rows.detach()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    k, d = rows.shape
    high = torch.empty((k, d), dtype=_DTYPES[precision], device=rows.device)
    low = torch.empty_like(high) if precision == "fp16x3" else None
    launch(
        _prepare,
        (triton.cdiv(k, 4),),
        rows,
        rows.stride(0),
        high,
        high if low is None else low,
        k,
        D=d,
        MODE=precision,
        NORMALIZE=normalize,
        BB=4,
        BD=256,
        device=rows.device,
        num_warps=4,
    )
    return Operand(precision, high, low)


def scaled_first(image: Tensor, precision: Precision) -> bool:
    """Whether images are multiplied by 1 / norm before the products.

    What is cast has to be of moderate size; what goes in as it is can be scaled after the sum.
    """
    return image.dtype != _DTYPES[precision] or precision in ("tf32", "fp32")
