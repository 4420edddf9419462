"""What ``fastood.ops.cuda`` does, with tensors on the CPU and the emulated kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastood.ops import cuda
from fastood.ops.cudalib import RowJob, RowPlan
from fastood.ops.requests import Request
from fastood.ops.rows import RowStatistics

GUARD = -12345.0
"""Around every output; whatever is written there is out of bounds."""


class Outputs:
    """Tensors in the middle of larger ones, whose margins have to stay as they are."""

    def __init__(self) -> None:
        self.all: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = int(torch.Size(shape).numel())
        whole = torch.full((size + 128,), GUARD, dtype=torch.float64).to(dtype)
        self.all.append((whole, size))
        return whole[64 : 64 + size].view(shape)

    def check(self) -> None:
        for whole, size in self.all:
            edges = torch.cat([whole[:64], whole[64 + size :]])
            assert bool((edges == torch.tensor(GUARD, dtype=torch.float64).to(whole.dtype)).all())


def plan_of(library: ctypes.CDLL, job: RowJob) -> RowPlan:
    plan = RowPlan()
    assert library.emulate_plan(ctypes.byref(job), ctypes.byref(plan)) == 0
    return plan


def run(
    library: ctypes.CDLL, job: RowJob, x: Tensor, *, multiprocessors: int = 132, **forced: Any
) -> RowPlan:
    """Runs the emulated kernels; ``forced`` replaces fields of the plan."""
    cuda._describe(job, x, multiprocessors)
    plan = plan_of(library, job)
    for name, value in forced.items():
        setattr(plan, name, value)
    state_bytes = 2048
    workspace = torch.zeros(max(1, len(x)) * plan.splits * state_bytes, dtype=torch.uint8)
    job.workspace, job.workspace_bytes = workspace.data_ptr(), workspace.numel()
    assert library.emulate_rows(ctypes.byref(job), ctypes.byref(plan)) == 0, "threads did not meet"
    return plan


def in_parts(x: Tensor, splits: int) -> dict[str, int]:
    """A plan that splits rows of few classes, as only rows of very many are."""
    segment = -(-x.shape[1] // splits)
    return {
        "threads": 256,
        "block": 256,
        "splits": splits,
        "segment": segment,
        "grid": len(x) * splits,
    }


def scores(
    library: ctypes.CDLL, requests: tuple[Request, ...], x: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    job = RowJob.from_buffer_copy(cuda._scores_job(requests, x.shape[1]))
    outputs = Outputs()
    values = outputs.empty(len(requests), len(x))
    classes = outputs.empty(len(x), dtype=torch.int64)
    job.scores, job.classes = values.data_ptr(), classes.data_ptr()
    run(library, job, x, **options)
    outputs.check()
    return values, classes


def statistics(
    library: ctypes.CDLL, x: Tensor, taus: tuple[float, ...], c: int, moments: bool, **options: Any
) -> RowStatistics:
    job = RowJob.from_buffer_copy(cuda._statistics_job(taus, c, moments))
    outputs, b, t = Outputs(), len(x), len(taus)
    found = RowStatistics(
        outputs.empty(b, c),
        outputs.empty(b, c, dtype=torch.int64),
        outputs.empty(b, t, dtype=torch.float64),
        outputs.empty(b, t if moments else 0),
        outputs.empty(b, t if moments else 0),
    )
    job.values, job.index, job.rest = (part.data_ptr() for part in found[:3])
    if moments:
        job.neg_entropy, job.variance = (part.data_ptr() for part in found[3:])
    run(library, job, x, **options)
    outputs.check()
    return found
