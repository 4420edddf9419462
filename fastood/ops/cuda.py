"""Rows of given similarities on a GPU, by the CUDA C++ kernels.

Scores and statistics of a matrix that is there already, B rows of K similarities, in one launch
(two where few rows have very many classes). Takes any row stride, allocates its outputs and at
most a megabyte besides, waits for nothing and can be captured in a CUDA graph. Rows with NaN or
Inf give NaN. Accumulated in float32 and float64, finished in float64.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from fastood.errors import KernelError
from fastood.ops import loader
from fastood.ops.cudalib import MAX_REQUESTS, MAX_TAUS, MAX_TOPS, Library, RowJob, RowPlan
from fastood.ops.requests import Kind, Request, needs
from fastood.ops.rows import RowStatistics

__all__ = ["similarity_scores", "similarity_statistics", "usable"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_HELD = 3
"""Top values that scores alone hold at least, so that their last digit does not depend on what
else is asked; with one more, the largest of the rest, they fill a list of four."""

_UNSPLIT = 8192
"""Classes up to which no row is shared by several blocks: no workspace (see ``plan_of``)."""

_libraries: dict[int, tuple[Library, int]] = {}  # by device: and its multiprocessors


def usable(similarity: Tensor, c: int = 1) -> str | None:
    """None if these kernels can compute rows of ``similarity (B, K)``, else the reason.

    Neither compiles nor loads anything.
    """
    if not similarity.is_cuda:
        return f"similarity is on {similarity.device}"
    if similarity.dtype not in _TYPES:
        return f"{similarity.dtype} is not among float32, bfloat16 and float16"
    if c > MAX_TOPS:
        return f"c = {c} is more than {MAX_TOPS}"
    return _unavailable(similarity.device.index)


@lru_cache(maxsize=64)
def _unavailable(device: int) -> str | None:
    status = loader.cuda_status(loader.cuda_arch(device))
    return status.why if status.state == "unavailable" else None


def similarity_scores(
    requests: tuple[Request, ...], similarity: Tensor, *, classes: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(R, B) float32 scores of rows of ``similarity (B, K)``, and (B,) int64 of their best class.

    Raises:
        ValueError: on shapes, dtypes or requests that do not fit.
        BuildError: if the kernels cannot be compiled.
        KernelError: if a launch fails.
    """
    x = _readable(similarity)
    out = torch.empty((len(requests), x.shape[0]), dtype=torch.float32, device=x.device)
    best = torch.empty((x.shape[0],), dtype=torch.int64, device=x.device) if classes else None
    for first in range(0, max(1, len(requests)), MAX_REQUESTS):
        part = requests[first : first + MAX_REQUESTS]
        job = RowJob.from_buffer_copy(_scores_job(part, x.shape[1]))
        job.scores = out[first : first + MAX_REQUESTS].data_ptr() or None
        if best is not None and first == 0:
            job.classes = best.data_ptr() or None
        _run(job, x)
    return out, best


def similarity_statistics(
    similarity: Tensor, *, taus: tuple[float, ...], c: int = 1, moments: bool = False
) -> RowStatistics:
    """What ``fastood.ops.rows.similarity_statistics`` returns, of rows on a GPU; c up to 16.

    Raises:
        ValueError: on shapes, dtypes, temperatures or a ``c`` that do not fit.
        BuildError: if the kernels cannot be compiled.
        KernelError: if a launch fails.
    """
    x = _readable(similarity)
    b, t = x.shape[0], len(taus)
    if not 1 <= c <= x.shape[1]:
        raise ValueError(f"c: expected 1 <= c <= K = {x.shape[1]}, got {c}")
    job = RowJob.from_buffer_copy(_statistics_job(tuple(taus), c, moments))
    device, float32 = x.device, torch.float32
    found = RowStatistics(
        torch.empty((b, c), dtype=float32, device=device),
        torch.empty((b, c), dtype=torch.int64, device=device),
        torch.empty((b, t), dtype=torch.float64, device=device),
        torch.empty((b, t if moments else 0), dtype=float32, device=device),
        torch.empty((b, t if moments else 0), dtype=float32, device=device),
    )
    job.values, job.index, job.rest, job.neg_entropy, job.variance = (
        part.data_ptr() or None for part in found
    )
    _run(job, x)
    return found


def _readable(x: Tensor) -> Tensor:
    """Any strides of rows; the classes of a row lie one behind the other."""
    if x.dim() != 2:
        raise ValueError(f"similarity: expected (B, K), got {tuple(x.shape)}")
    if not x.is_cuda or x.dtype not in _TYPES:
        raise ValueError(
            "similarity: expected float32, bfloat16 or float16 on a CUDA device, got "
            f"{x.dtype} on {x.device}; impl='reference' takes any float anywhere"
        )
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _set_taus(job: RowJob, taus: tuple[float, ...]) -> None:
    if len(taus) > MAX_TAUS:
        raise ValueError(f"tau: expected at most {MAX_TAUS} temperatures in one pass: {len(taus)}")
    job.T = len(taus)
    for i, tau in enumerate(taus):
        job.taus[i] = tau


@lru_cache(maxsize=256)
def _scores_job(requests: tuple[Request, ...], k: int) -> RowJob:
    """What of a job does not depend on tensors; never written to."""
    wanted = needs(requests)
    job = RowJob()
    _set_taus(job, wanted.taus)
    job.c = min(max(wanted.c, _HELD), k)
    job.moments = wanted.moments
    job.R = len(requests)
    for i, r in enumerate(requests):
        if r.c > k:
            raise ValueError(f"c: expected 1 <= c <= K = {k}, got {r.c}")
        # where a similarity equals its reset the change is zero, not the rounding of the reset
        reset = ctypes.c_float(r.reset).value if r.kind == Kind.DELTA_ENERGY else 0.0
        to = job.requests[i]
        to.kind, to.tau, to.c = int(r.kind), wanted.taus.index(r.tau), r.c
        to.flag, to.reset = int(r.flag), reset
    return job


@lru_cache(maxsize=256)
def _statistics_job(taus: tuple[float, ...], c: int, moments: bool) -> RowJob:
    job = RowJob()
    _set_taus(job, taus)
    job.c, job.moments = c, moments
    return job


def _library(device: int) -> tuple[Library, int]:
    found = _libraries.get(device)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        found = _libraries[device] = (loader.cuda(device), properties.multi_processor_count)
    return found


def _describe(job: RowJob, x: Tensor, multiprocessors: int) -> None:
    job.data = x.data_ptr() or None
    job.B, job.K = x.shape
    job.stride, job.type = x.stride(0), _TYPES[x.dtype]
    job.multiprocessors = multiprocessors


def _run(job: RowJob, x: Tensor) -> None:
    device = x.device.index
    library, multiprocessors = _library(device)
    _describe(job, x, multiprocessors)
    workspace = _workspace(library, job, x) if job.K > _UNSPLIT else None
    if torch.cuda.current_device() == device:
        status = library.rows(ctypes.byref(job), torch._C._cuda_getCurrentRawStream(device))
    else:
        with torch.cuda.device(device):
            status = library.rows(ctypes.byref(job), torch._C._cuda_getCurrentRawStream(device))
    del workspace  # kept until here; the allocator knows which stream uses it
    if status != 0:
        _refuse(library, status)


def _workspace(library: Library, job: RowJob, x: Tensor) -> Tensor | None:
    plan = RowPlan()
    status = library.rows_plan(ctypes.byref(job), ctypes.byref(plan))
    if status != 0:
        _refuse(library, status)
    if plan.workspace_bytes == 0:
        return None
    workspace = torch.empty((plan.workspace_bytes,), dtype=torch.uint8, device=x.device)
    job.workspace, job.workspace_bytes = workspace.data_ptr(), plan.workspace_bytes
    return workspace


def _refuse(library: Library, status: int) -> None:
    text = library.message(status)
    raise ValueError(text) if status < 0 else KernelError(f"cuda kernels: {text} ({status})")
