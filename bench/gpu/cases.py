"""What is measured and what it should reach, known without a GPU and before anything is built.

Goals hold for fp16 features, D = 512, on one H200. Letters: B images, D width, K classes, P
patches, M negatives in G groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.shapes import Shape

__all__ = ["CASES", "Case", "Goal", "by_name", "tiny"]

Metric = Literal["C", "gpu us", "wall us", "launches", "ms", "error", "peak / logits"]


@dataclass(frozen=True)
class Goal:
    """A bound on one number of ``fastood``; nothing fails by missing it, the report says so.

    ``"C"``: GPU time over that of the library's product; ``"wall us"``: of a call from Python;
    ``"launches"``: kernels a call; ``"peak / logits"``: memory a call takes beside its inputs and
    outputs, in units of a (B, K) float16 matrix; ``"x <name>"``: GPU time of ``<name>`` over its
    own. All are at most, the last at least.
    """

    metric: str
    least: float | None
    aim: float | None = None

    @property
    def at_most(self) -> bool:
        return not self.metric.startswith("x ")

    def met(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


@dataclass(frozen=True)
class Case:
    """One piece of work on features of one kind."""

    work: str
    label: str
    shape: Shape
    features: Literal["fp16", "bf16", "fp32"]
    goals: tuple[Goal, ...] = ()
    compiled: bool = True
    """Time torch.compile too: it compiles for seconds."""

    @property
    def name(self) -> str:
        return f"{self.work} {self.label} D={self.shape.d} {self.features}"


class Weights(NamedTuple):
    """N weight matrices of m rows and n columns."""

    n: int
    rows: int
    columns: int


LOW_RANK = {
    "12x3072x768": Weights(12, 3072, 768),
    "12x2048x512": Weights(12, 2048, 512),
    "24x4096x1024": Weights(24, 4096, 1024),
}
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Shares of the components dropped: what a search over one weight tries."""

_NOTHING_LARGE = Goal("peak / logits", 1.0)
_S1 = (Goal("C", 2.0, 1.2), Goal("wall us", 15.0, 8.0), _NOTHING_LARGE)
_S2 = (Goal("C", 1.6, 1.15), Goal("gpu us", None, 14.0), _NOTHING_LARGE)
_S3 = (Goal("C", 1.6, 1.15), Goal("x published", 15.0), _NOTHING_LARGE)
_L = (Goal("C", 1.6, 1.15), Goal("x eager fp16", 1.5, 2.3), _NOTHING_LARGE)
_EBM = (Goal("x eager fp16", 5.0), Goal("launches", 4.0), Goal("wall us", None, 40.0))
_LOW_RANK = (Goal("ms", 60.0, 35.0), Goal("error", 1e-5))

ROW_SCORES = ("delta_energy", "mcm", "energy")


def _cases() -> tuple[Case, ...]:
    """What has goals first: a run that is cut short has those."""

    def s1(d: int) -> Shape:
        return Shape(1024, 1000, d)

    def s2(d: int) -> Shape:
        return Shape(8192, 1000, d)

    def s3(d: int) -> Shape:
        return Shape(4096, 1000, d, m=10_000, g=100)

    def patches(d: int) -> Shape:
        return Shape(256, 1000, d, p=196)

    found = [Case(w, "S1 1024x1000", s1(512), "fp16", _S1) for w in ROW_SCORES]
    found += [Case(w, "S2 8192x1000", s2(512), "fp16", _S2) for w in ROW_SCORES]
    found += [
        Case("neg_label", "S3 4096x11000", s3(512), "fp16", _S3),
        Case("gl_mcm", "L 256x196x1000", patches(512), "fp16", _L),
        Case("ebm_loss", "256x1000", Shape(256, 1000), "fp16", _EBM),
        Case("ebm_loss", "1024x1000", Shape(1024, 1000), "fp16"),
        Case("low_rank", "12x3072x768", Shape(0, 0, 768), "fp32", _LOW_RANK),
    ]
    # float32 features: float32-grade by default, the other precisions beside it
    found += [
        Case("delta_energy", "S1 1024x1000", s1(512), "fp32"),
        Case("delta_energy", "S2 8192x1000", s2(512), "fp32"),
        Case("neg_label", "S3 4096x11000", s3(512), "fp32"),
        Case("gl_mcm", "L 256x196x1000", patches(512), "fp32"),
        Case("ebm_loss", "256x1000", Shape(256, 1000), "fp32"),
        Case("ebm_loss", "1024x1000", Shape(1024, 1000), "fp32"),
        Case("locoop_loss", "32x196x1000", Shape(32, 1000, p=196), "fp16"),
        Case("locoop_loss", "32x196x1000", Shape(32, 1000, p=196), "fp32"),
        Case("low_rank", "12x2048x512", Shape(0, 0, 512), "fp32"),
        Case("low_rank", "24x4096x1024", Shape(0, 0, 1024), "fp32"),
        Case("delta_energy", "S1 1024x1000", s1(512), "bf16", compiled=False),
    ]
    for kind in ("fp16", "fp32"):
        scores = ROW_SCORES if kind == "fp16" else ROW_SCORES[:1]
        found += [Case(w, "S1 1024x1000", s1(768), kind, compiled=False) for w in scores]
        found += [Case(w, "S2 8192x1000", s2(768), kind, compiled=False) for w in scores]
        found += [
            Case("neg_label", "S3 4096x11000", s3(768), kind, compiled=False),
            Case("gl_mcm", "L 256x196x1000", patches(768), kind, compiled=False),
            Case("ebm_loss", "256x1000", Shape(256, 1000, 768), kind, compiled=False),
            Case("ebm_loss", "1024x1000", Shape(1024, 1000, 768), kind, compiled=False),
        ]
    return tuple(found)


CASES = _cases()


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def tiny(case: Case) -> Case:
    """The same on a shape of a few rows: proves that it runs, measures nothing."""
    s = case.shape
    d = 32 if s.d == 512 else 48
    small = Shape(b=7, k=37, d=d, p=5 if s.p else 0, m=40 if s.m else 0, g=8 if s.g else 0)
    return dataclasses.replace(case, shape=small)


def tiny_weights(weights: Weights) -> Weights:
    return Weights(2, weights.rows // 64, weights.columns // 64)
