"""What both ways of the energy-bound loss share: cosines of plain rows, and what is saved.

The classes are being learned and change with every step, so unlike in a bank nothing is prepared of
them: programs divide rows by their norms, cast and split them as they read them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.operands import scaled_first
from fastood.kernels.precision import Precision
from fastood.kernels.products import as_operand, low_half, product

__all__ = ["Inputs", "Options", "cosines", "multiply", "same_sign", "summed"]

# One float32 tensor holds what is saved: B numbers each of ...
INVERSE = tl.constexpr(0)  # 1 / norm of the image
LABEL = tl.constexpr(1)  # similarity of the label's class
BASE = tl.constexpr(2)  # the largest similarity without the best class's
LOG = tl.constexpr(3)  # log2 of the sum of exp((s - BASE) / tau) over classes but the best
OTHERS = tl.constexpr(4)  # what multiplies the softmax over these in the gradient
OWN = tl.constexpr(5)  # the gradient of the best class's similarity
EDITED = tl.constexpr(6)  # the gradient of the edited similarity
CHANGED = tl.constexpr(7)  # the edited similarity
SCALE = tl.constexpr(8)  # what multiplies the masked feature (renorm), else 1
BEST = tl.constexpr(9)  # the best class, its bits
LOSS = tl.constexpr(10)
SURE = tl.constexpr(11)  # the largest probability
RISE = tl.constexpr(12)  # the edited similarity less the original
SIZE = tl.constexpr(13)  # a bound on the gradients of the row's logits
# ... then 1 / norm of K classes, then
COUNTER = tl.constexpr(0)  # programs that are through with their rows
LARGEST = tl.constexpr(1)  # the largest SIZE, 1 if all are 0
# and then the states of parts of the classes: (B, 4, splits).
FIELDS = 14
FIELD_COUNT = tl.constexpr(FIELDS)
SCALARS = 2
SCALAR_COUNT = tl.constexpr(SCALARS)


class Options(NamedTuple):
    """Those of ``fastood.ops.ebm.energy_bound`` that the kernels know."""

    precision: Precision
    tau: float
    weight: float
    by_label: bool
    ce_original: bool
    renorm: bool
    normalize_image: bool
    normalize_text: bool


class Inputs(NamedTuple):
    """Tensors, with elements of a row side by side."""

    image: Tensor
    text: Tensor
    labels: Tensor

    @property
    def arguments(self) -> tuple[Tensor, int, Tensor, int, Tensor, int]:
        image, text, labels = self
        return image, image.stride(0), text, text.stride(0), labels, labels.stride(0)

    def constants(self, options: Options) -> dict[str, object]:
        """What is compiled in, but for tile sizes."""
        precision = options.precision
        return {
            "D": self.image.shape[1],
            "MODE": precision,
            "FIRST_IMAGE": options.normalize_image and scaled_first(self.image, precision),
            "FIRST_TEXT": options.normalize_text and scaled_first(self.text, precision),
            "NORMALIZE_IMAGE": options.normalize_image,
            "NORMALIZE_TEXT": options.normalize_text,
        }


@triton.jit
def cosines(
    x,  # rows ``x_stride`` apart
    x_stride,
    rows,  # (M,) in range
    x_scales,  # (M,)
    y,
    y_stride,
    columns,  # (N,) in range
    y_scales,  # (N,)
    D: tl.constexpr,
    BD: tl.constexpr,
    MODE: tl.constexpr,  # a precision
    FIRST_X: tl.constexpr,  # scale while casting, or else the sums
    FIRST_Y: tl.constexpr,
):
    """(M, N) float32 products of ``x[rows] * x_scales`` with ``y[columns] * y_scales``."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    rest = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    of_x = x + rows.to(tl.int64)[:, None] * x_stride
    of_y = y + columns.to(tl.int64)[None, :] * y_stride
    for start in range(0, D, BD):
        k = start + tl.arange(0, BD)
        if D % BD == 0:
            a = tl.load(of_x + k[None, :])
            b = tl.load(of_y + k[:, None])
        else:
            a = tl.load(of_x + k[None, :], mask=(k < D)[None, :], other=0.0)
            b = tl.load(of_y + k[:, None], mask=(k < D)[:, None], other=0.0)
        if FIRST_X:
            a = a.to(tl.float32) * x_scales[:, None]
        if FIRST_Y:
            b = b.to(tl.float32) * y_scales[None, :]
        acc, rest = multiply(a, b, acc, rest, MODE)
    acc = summed(acc, rest, MODE)
    if not FIRST_X:
        acc *= x_scales[:, None]
    if not FIRST_Y:
        acc *= y_scales[None, :]
    return acc


@triton.jit
def multiply(a, b, acc, rest, MODE: tl.constexpr):
    """``a @ b`` added to ``acc``, and to ``rest`` what is 2048 times too large."""
    if MODE == "fp16x3":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        acc = product(a_high, b_high, acc, MODE)
        rest = product(a_high, low_half(b, b_high), rest, MODE)
        rest = product(low_half(a, a_high), b_high, rest, MODE)
    else:
        acc = product(as_operand(a, MODE), as_operand(b, MODE), acc, MODE)
    return acc, rest


@triton.jit
def summed(acc, rest, MODE: tl.constexpr):
    """What ``multiply`` added up."""
    if MODE == "fp16x3":
        acc += rest * (1.0 / 2048.0)
    return acc


@triton.jit
def same_sign(a, b):
    """Where the product is positive, also if it is too small to be seen."""
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))
