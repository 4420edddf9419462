"""The library as nvcc makes it: no spills, the interface Python expects, what the host decides."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch

from fastood.ops import cuda
from fastood.ops.build import build, cuda_extension
from fastood.ops.cudalib import Library, Request, RowJob, RowPlan
from fastood.ops.loader import baked_key
from fastood.ops.requests import Kind
from fastood.ops.requests import Request as Asked


@pytest.fixture(scope="session")
def library(nvcc: str) -> Library:
    """For what the host decides, whatever the architecture."""
    del nvcc
    return Library(build(cuda_extension("9.0")).path)


def test_kernels_neither_spill_nor_need_a_stack(built):
    """One row of a kernel's lines in the log of ptxas; the launch bounds leave registers enough."""
    log = built.log.read_text()
    number = built.info["arch"].replace(".", "")
    kernels = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{number}'", log)
    assert len(kernels) == 7 and sum("rows_kernel" in name for name in kernels) == 6
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    )
    assert len(frames) >= len(kernels)
    assert set(frames) == {("0", "0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 128
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    assert max(shared) <= 16_384


def test_the_compiler_has_nothing_to_warn_of(built):
    assert "warning" not in built.log.read_text()


def test_the_library_says_what_it_is(built):
    library = Library(built.path)
    assert library.key == built.key == baked_key(built.path)
    assert library.message(0) == "success" and "tau" in library.message(-4)
    assert built.info["compiler"].startswith("nvcc ") and "torch" not in built.info


# --- the plan -------------------------------------------------------------------------------------


def job_of(b: int, k: int, **fields: Any) -> RowJob:
    """A job that is fine, but for `fields`."""
    job = RowJob()
    job.data, job.B, job.K, job.stride, job.type = 4096, b, k, k, 0
    job.c, job.multiprocessors = min(3, k), 132
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def plan_of(library: Library, job: RowJob) -> tuple[int, RowPlan]:
    plan = RowPlan()
    return library.rows_plan(ctypes.byref(job), ctypes.byref(plan)), plan


@pytest.mark.parametrize("b", [0, 1, 100, 263, 264, 1_000_000])
@pytest.mark.parametrize("k", [1, 2, 512, 513, 8192, 8193, 131_072, 2**31 - 1])
@pytest.mark.parametrize("c", [1, 16])
def test_every_class_of_every_row_is_in_one_part(library, b, k, c):
    status, plan = plan_of(library, job_of(b, k, c=min(c, k)))
    assert status == 0
    assert plan.list in (2, 4, 8, 16) and plan.list >= min(c + 1, 16, k)
    assert plan.threads in (32, 256) and plan.block % plan.threads == 0
    assert 1 <= plan.splits <= 32 and (plan.splits == 1 or plan.threads == 256)
    assert (plan.splits - 1) * plan.segment < k <= plan.splits * plan.segment
    assert k - (plan.splits - 1) * plan.segment >= min(c, k)  # the last part fills its list
    rows_of_a_block = plan.block // plan.threads
    assert plan.grid == -(-b // rows_of_a_block) * plan.splits
    state = library.functions.fastood_layout(3)
    assert plan.workspace_bytes == (0 if plan.splits == 1 else plan.grid * state)
    if k <= cuda._UNSPLIT:  # Python does not even ask for a plan there
        assert plan.workspace_bytes == 0
    assert plan.workspace_bytes <= 2**20


def test_too_many_blocks_are_refused(library):
    assert plan_of(library, job_of(2**33, 8))[0] == -1
    assert plan_of(library, job_of(2**31, 4096))[0] == 0  # four rows a block


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"K": 0}, -1), ({"K": 2**31}, -1), ({"B": -1}, -1), ({"stride": -1}, -1),
        ({"data": None}, -1), ({"multiprocessors": 0}, -1),
        ({"type": 3}, -2), ({"type": -1}, -2),
        ({"c": 0}, -3), ({"c": 17}, -3), ({"c": 11}, -3),
        ({"T": 17}, -4), ({"T": 1}, -4), ({"T": -1}, -4),
        ({"R": 33}, -5), ({"R": 1}, -5), ({"neg_entropy": 8}, -5),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(library, fields, status):
    job = job_of(4, 10, **fields)
    assert plan_of(library, job)[0] == status
    assert library.rows(ctypes.byref(job), None) == status and library.message(status)


@pytest.mark.parametrize(
    ("request_", "fine"),
    [
        (Request(0, 0, 1, 0, 0.0), True),
        (Request(8, 0, 1, 0, 0.0), False),
        (Request(-1, 0, 1, 0, 0.0), False),
        (Request(7, 1, 1, 0, 0.0), False),  # a temperature that is not there
        (Request(7, 0, 4, 0, 0.0), False),  # more than the c held
        (Request(7, 0, 0, 0, 0.0), False),
        (Request(4, 0, 1, 0, 0.0), False),  # entropy without moments
    ],
)
def test_requests_stay_within_the_plan(library, request_, fine):
    job = job_of(4, 10, T=1, R=1, scores=4096)
    job.taus[0] = 0.1
    job.requests[0] = request_
    assert (plan_of(library, job)[0] == 0) == fine
    job.moments = True
    assert plan_of(library, job)[0] == (0 if fine or request_.kind == 4 else -5)
    job.taus[0] = float("nan")
    assert plan_of(library, job)[0] == -4


def test_no_rows_need_no_device(library):
    job = job_of(0, 10, data=None)
    assert library.rows(ctypes.byref(job), None) == 0


def test_a_workspace_too_small_is_refused(library):
    job = job_of(1, 100_000)
    plan = plan_of(library, job)[1]
    assert plan.splits > 1
    for address, size in ((None, plan.workspace_bytes), (4096, plan.workspace_bytes - 1),
                          (4097, plan.workspace_bytes)):  # fmt: skip
        job.workspace, job.workspace_bytes = address, size
        assert library.rows(ctypes.byref(job), None) == -6


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_device_the_launch_says_so(library):
    job = job_of(4, 10)
    status = library.rows(ctypes.byref(job), None)
    assert status > 0 and library.message(status) not in ("", "unrecognized error code")


# --- what Python makes of requests ----------------------------------------------------------------


def test_jobs_hold_what_was_asked():
    requests = (
        Asked(Kind.DELTA_ENERGY, 0.01, 5, 0.1, True),
        Asked(Kind.ENERGY, 1.0, flag=True),
        Asked(Kind.VARIANCE, 1.0),
    )
    job = cuda._scores_job(requests, 100)
    assert (job.R, job.T, job.c, job.moments) == (3, 2, 5, 1)
    assert list(job.taus[:2]) == [0.01, 1.0]
    first = job.requests[0]
    assert (first.kind, first.tau, first.c, first.flag) == (7, 0, 5, 1)
    assert first.reset == float(torch.tensor(0.1))  # as float32 similarities are
    assert job.requests[1].tau == 1 and job.requests[2].kind == 5
    assert cuda._scores_job(requests[1:2], 100).c == 3 and cuda._scores_job(requests[1:2], 2).c == 2
    with pytest.raises(ValueError, match="c: expected 1 <= c <= K = 4, got 5"):
        cuda._scores_job(requests, 4)


def test_tensors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 on a CUDA device, got"):
        cuda.similarity_scores((Asked(Kind.MAX_SIMILARITY),), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected \(B, K\)"):
        cuda.similarity_statistics(torch.zeros(3), taus=(1.0,))
    assert "cpu" in str(cuda.usable(torch.zeros(2, 3)))
