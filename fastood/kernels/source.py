"""Where the similarities of a row come from: products with classes, or a tensor that has them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import Config, pick
from fastood.kernels.operands import Operand, scaled_first
from fastood.kernels.products import inverse_norms, tile

__all__ = ["Source", "features", "given", "row_scales", "similarities"]


class Source(NamedTuple):
    """What kernels take to know similarities (B, K)."""

    x: Tensor
    """Images (B, D), or similarities (B, K)."""
    high: Tensor
    low: Tensor
    b: int
    k: int
    d: int
    mode: str
    """A precision, or ``given``."""
    first: bool
    normalize: bool
    config: Config

    @property
    def arguments(self) -> tuple[Tensor, int, Tensor, Tensor]:
        return self.x, self.x.stride(0), self.high, self.low

    @property
    def constants(self) -> dict[str, object]:
        return {
            "D": self.d,
            "MODE": self.mode,
            "FIRST": self.first,
            "NORMALIZE": self.normalize,
            "BB": self.config.rows,
            "BN": self.config.columns,
            "BD": self.config.depth,
        }

    def narrower(self) -> Source:
        """With half the columns in a tile: sums carried beside it stay in registers."""
        columns = max(16, self.config.columns // 2)
        return self._replace(config=self.config._replace(columns=columns))


def features(family: str, image: Tensor, text: Operand, *, normalize: bool) -> Source:
    """Products of ``image (B, D)``, divided by its norms if asked, with classes."""
    image = image.detach()
    if image.stride(-1) != 1:
        image = image.contiguous()
    (b, d), k = image.shape, len(text.high)
    return Source(
        image,
        text.high,
        text.high if text.low is None else text.low,
        b,
        k,
        d,
        text.precision,
        scaled_first(image, text.precision),
        normalize,
        pick(family, text.precision, rows=b, width=d),
    )


def given(similarity: Tensor) -> Source:
    """Similarities (B, K) at hand."""
    s = similarity.detach()
    if s.stride(-1) != 1:
        s = s.contiguous()
    b, k = s.shape
    return Source(s, s, s, b, k, 0, "given", False, False, pick("given", "fp32", rows=b, width=k))


@triton.jit
def row_scales(
    x, stride, rows, D: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr
):
    """(BB,) what multiplies the rows."""
    scales = tl.zeros_like(rows).to(tl.float32) + 1.0
    if NORMALIZE and MODE != "given":
        scales = inverse_norms(x, stride, rows, D, BD)
    return scales


@triton.jit
def similarities(
    x,
    stride,
    rows,  # (BB,) in range
    scales,  # (BB,) from row_scales
    high,
    low,
    columns,  # (BN,) classes
    stop,  # the first class that does not count
    D: tl.constexpr,
    BD: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """(BB, BN) float32, -inf where there is no class."""
    if MODE == "given":
        at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        inside = (columns < stop)[None, :]
        s = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        s = tl.where(inside & (s == float("-inf")), float("nan"), s)  # as all that is not finite
    else:
        near = tl.minimum(columns, stop - 1)
        s = tile(x, stride, rows, scales, high, low, near, D, BD, MODE, FIRST)
        s = tl.where((columns < stop)[None, :], s, float("-inf"))
    return s
