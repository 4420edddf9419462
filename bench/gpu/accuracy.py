"""Every implementation against float64, before it is timed.

What a precision may err is known of one cosine; how much a score moves with its cosines is known
of the score. So ``allowed = steepness × cosine error / tau``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["COSINE_ERROR", "Accuracy", "Bound", "compare"]

COSINE_ERROR = {
    "fp16": 1.5e-4,  # both operands rounded to 11 bits, D = 512: worst seen on CPUs 7e-5
    "tf32": 1.5e-4,  # the same bits; cut off instead of rounded: 3.5e-4
    "bf16": 1.2e-3,  # worst seen 6e-4
    "fp16x3": 1e-6,  # float32 sums of about 512 numbers: worst seen 2e-7
    "fp32": 1e-6,
}


@dataclass(frozen=True)
class Bound:
    """What a result may differ from float64 by: ``relative × |wanted| + absolute``.

    ``by_largest`` takes the largest number of a result for ``|wanted|`` (gradients have entries
    near zero).
    """

    relative: float
    absolute: float = 0.0
    by_largest: bool = False


@dataclass(frozen=True)
class Accuracy:
    """How far a result is from float64; ``wrong`` says why it must not be timed."""

    relative: float
    absolute: float
    distinct: int | None
    distinct_float64: int | None
    wrong: str | None

    def record(self) -> dict[str, Any]:
        return {
            "max_rel_error": self.relative,
            "max_abs_error": self.absolute,
            "distinct": self.distinct,
            "distinct_float64": self.distinct_float64,
        }


def compare(found: Sequence[Tensor], truth: Sequence[Tensor], bound: Bound) -> Accuracy:
    """The worst of several tensors; NaN and wrong shapes are wrong, whatever the bound."""
    worst_relative = worst_absolute = 0.0
    wrong = None
    if len(found) != len(truth):
        wrong = f"expected {len(truth)} results, got {len(found)}"
    for got, want in zip(found, truth, strict=False):
        if got.shape != want.shape:
            wrong = f"expected {tuple(want.shape)}, got {tuple(got.shape)}"
            break
        error = (got.double() - want.double()).abs()
        scale = want.double().abs()
        if bound.by_largest:
            scale = scale.max().expand_as(scale)
        beyond = ~(error <= bound.relative * scale + bound.absolute)  # NaN is beyond
        worst_absolute = max(worst_absolute, float(error.nan_to_num(float("inf")).max()))
        relative = (error / scale.clamp_min(1e-300)).nan_to_num(float("inf"))
        worst_relative = max(worst_relative, float(relative.max()))
        if bool(beyond.any()):
            wrong = (
                f"{int(beyond.sum())} of {beyond.numel()} numbers differ from float64 by more than "
                f"{bound.relative:.2g} relative + {bound.absolute:.2g}: up to {worst_absolute:.3g}"
            )
    scores = len(truth) == 1 and truth[0].ndim == 1
    return Accuracy(
        worst_relative,
        worst_absolute,
        _distinct(found[0]) if scores and found else None,
        _distinct(truth[0]) if scores else None,
        wrong,
    )


def _distinct(x: Tensor) -> int:
    return int(torch.unique(x).numel())
