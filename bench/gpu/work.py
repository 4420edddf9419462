"""What all builders return: one case, and everybody who can compute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench.gpu.accuracy import Accuracy, Bound, compare
from bench.gpu.cases import Case

__all__ = ["OURS", "Call", "Variant", "Work", "compiled", "in_tf32", "precisions"]

Call = Callable[[int], Any]
"""Computes copy i of the inputs."""

OURS = "fastood"


@dataclass(frozen=True)
class Variant:
    """One implementation of a case.

    ``role``: ``"ours"`` must be right, ``"optional"`` is ours but may be missing on this machine,
    ``"product"`` is the bare product, ``"other"`` everything else. ``copies`` below those of the
    inputs is for calls of many milliseconds. ``bare`` names the product of the same precision.
    """

    name: str
    call: Call
    role: Literal["ours", "optional", "product", "other"] = "other"
    precision: str = ""
    bound: Bound | None = None
    bare: str | None = None
    capturable: bool = True
    copies: int | None = None


@dataclass
class Work:
    """A case on its inputs. ``parts`` takes a result apart into the tensors ``truth`` gives."""

    case: Case
    variants: list[Variant]
    truth: Callable[[], Sequence[Tensor]]
    copies: int
    flops: float
    moved: float
    logits_bytes: float = 0.0
    parts: Callable[[Any], Sequence[Tensor]] = field(default=lambda found: [found])
    judge: Callable[[Any, Sequence[Tensor], Bound], Accuracy] | None = None

    def check(self, result: Any, truth: Sequence[Tensor], bound: Bound | None) -> Accuracy:
        """How far ``result`` is from ``truth``; without a bound nothing is wrong, only measured."""
        allowed = bound or Bound(0.0)
        if self.judge is not None:
            found = self.judge(result, truth, allowed)
        else:
            found = compare(self.parts(result), truth, allowed)
        return found if bound is not None else dataclasses.replace(found, wrong=None)


def precisions(kind: str) -> list[tuple[str, str | None, str]]:
    """(name of the variant, ``precision=``, what that is) for features of ``kind``."""
    if kind != "fp32":
        return [(OURS, None, kind)]
    asked = [(f"{OURS} {p}", p, p) for p in ("fp16", "tf32", "fp32")]
    return [(OURS, None, "fp16x3"), *asked]


def bare_of(precision: str) -> str:
    """The library's product that a precision is compared with: of the same grade."""
    return f"cuBLAS {'fp32' if precision == 'fp16x3' else precision}"


def compiled(function: Callable[..., Any], *, gpu: bool) -> Callable[..., Any]:
    """``torch.compile`` for one shape; without a GPU only the graph is captured."""
    return torch.compile(function, dynamic=False, backend="inductor" if gpu else "eager")


def in_tf32(call: Call) -> Call:
    """``call`` with TF32 products; elsewhere float32 means float32."""

    def run(i: int) -> Any:
        torch.set_float32_matmul_precision("high")
        try:
            return call(i)
        finally:
            torch.set_float32_matmul_precision("highest")

    return run
