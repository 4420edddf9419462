"""In which numbers the kernels multiply on a GPU. Sums are float32, always.

=========== ============================================ ==========================
name        a product of                                 for
=========== ============================================ ==========================
``fp16``    float16                                      float16 features; on request
``bf16``    bfloat16                                     bfloat16 features
``tf32``    float32 rounded to 10 bits                   comparison
``fp16x3``  float16 high and low halves, three products  float32 features
``fp32``    float32, without the matrix units            comparison
=========== ============================================ ==========================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "Precision", "check_precision", "resolve"]

Precision = Literal["fp16", "bf16", "tf32", "fp16x3", "fp32"]
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "tf32", "fp16x3", "fp32")

_HALVES: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def check_precision(precision: str | None) -> Precision | None:
    """``precision`` if it names one.

    Raises:
        ValueError: if it does not.
    """
    if precision is None:
        return None
    for known in PRECISIONS:
        if precision == known:
            return known
    raise ValueError(
        f"precision: expected None or one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}"
    )


def resolve(precision: str | None, *features: Tensor) -> Precision:
    """What ``precision`` means for these features: half-precision ones run as they are, if all of
    them are of the same kind; everything else at float32 grade.

    A prepared bank is not among ``features``: it is kept in float32, what the images are decides.

    Raises:
        ValueError: on an unknown name.
    """
    asked = check_precision(precision)
    if asked is not None:
        return asked
    kinds = {_HALVES.get(x.dtype, "fp16x3") for x in features}
    return kinds.pop() if len(kinds) == 1 else "fp16x3"
