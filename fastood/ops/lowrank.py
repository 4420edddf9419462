"""Weights without their smallest singular directions, for many matrices of one shape at a time.

One decomposition of each matrix serves every number of directions that is tried. On the smaller
side, the Gram matrix is formed in float64 (a squared condition number costs nothing there) and its
symmetric eigenproblem solved; the other side's singular vectors are never needed. Letters here:
N matrices of m rows and n columns, r = min(m, n).
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastood.errors import BuildError
from fastood.ops import loader
from fastood.ops.cudalib import Library

__all__ = ["TailBasis", "drop_tails", "tail_basis"]

_CHUNK_BYTES = 1 << 30
"""Float64 copies of weights and products held at a time."""


class TailBasis(NamedTuple):
    """Singular directions of matrices (N, m, n) on their smaller side, the weakest first."""

    values: Tensor
    """(N, r) float64, squared singular values, ascending."""
    vectors: Tensor
    """(N, r, r) float64; column i belongs to value i. Right singular vectors if n <= m, else left
    ones."""


def tail_basis(weights: Tensor, *, solver: str | None = None) -> TailBasis:
    """The eigenvectors of W'W (n <= m) or WW' (n > m), one decomposition for all matrices.

    Args:
        weights: (N, m, n) floating point.
        solver: ``"torch"`` (``torch.linalg.eigh``), ``"batched"`` (cuSOLVER's batched solver, GPU
            only), default the batched one where it can be had.
    Returns:
        values and vectors in float64, on the device of the weights. Waits for a GPU twice: to see
        that the weights are finite, and that the solver converged.
    Raises:
        ValueError: on shapes and dtypes; weights with NaN or Inf; a solver that cannot be had.
    """
    if weights.dim() != 3 or not weights.is_floating_point():
        raise ValueError(
            f"weights: expected (N, m, n) floating point, got {tuple(weights.shape)} "
            f"{weights.dtype}; torch.stack matrices of one shape"
        )
    if solver not in (None, "torch", "batched"):
        raise ValueError(f"solver: expected 'torch', 'batched' or None, got {solver!r}")
    weights = weights.detach()
    gram = _gram(weights)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("weights: values must be finite, found NaN or Inf, or squares of 1e308")
    if solver == "torch" or gram.numel() == 0 or (solver is None and not gram.is_cuda):
        return TailBasis(*torch.linalg.eigh(gram))
    if not gram.is_cuda:
        raise ValueError(f"solver: 'batched' takes CUDA tensors, got one on {gram.device}")
    library = _solver_of(gram.device, demanded=solver == "batched")
    if library is None:
        return TailBasis(*torch.linalg.eigh(gram))
    found = _batched(library, gram)
    if found is None:
        if solver == "batched":
            raise ValueError(
                f"solver: 'batched' refused {gram.shape[0]} matrices of {gram.shape[1]} columns"
            )
        _warn_once("cuSOLVER's batched eigensolver failed here; torch.linalg.eigh takes its place")
        return TailBasis(*torch.linalg.eigh(_gram(weights)))
    return found


def drop_tails(weights: Tensor, basis: TailBasis, counts: Sequence[int]) -> list[Tensor]:
    """The weights without their ``count`` weakest singular directions, for each count.

    W - (W V) V' with V the first ``count`` eigenvectors (V (V' W) where they are left ones). A
    larger tail contains the smaller ones: together they cost one projection on the largest.

    Args:
        weights: (N, m, n), as ``tail_basis`` had them.
        basis: of these weights.
        counts: how many directions to drop, 0 <= count <= min(m, n), in any order.
    Returns:
        one (N, m, n) tensor per count, in the order asked, in the dtype of the weights; computed
        in float64, whatever torch's TF32 switches say.
    Raises:
        ValueError: if the basis is of another shape or device, or a count is out of range.
    """
    n_matrices, m, n = weights.shape
    r = min(m, n)
    if tuple(basis.vectors.shape) != (n_matrices, r, r) or basis.vectors.device != weights.device:
        raise ValueError(
            f"basis: expected vectors {(n_matrices, r, r)} on {weights.device} for weights "
            f"{tuple(weights.shape)}, got {tuple(basis.vectors.shape)} on {basis.vectors.device}"
        )
    for count in counts:
        if not 0 <= count <= r:
            raise ValueError(f"counts: expected 0 <= count <= min(m, n) = {r}, got {count}")
    weights = weights.detach()
    results = {count: torch.empty_like(weights) for count in sorted(set(counts))}
    step = max(1, _CHUNK_BYTES // max(1, 24 * m * n))  # three of float64 at a time
    for first in range(0, n_matrices, step):
        part = slice(first, first + step)
        left, before = weights[part].double(), 0
        vectors = basis.vectors[part]
        # what was dropped is orthogonal to the next segment, whose product with what is left is
        # the one with the weights
        for count, result in results.items():
            if count > before:
                segment = vectors[:, :, before:count]
                if n <= m:
                    left = torch.baddbmm(left, left @ segment, segment.mT, alpha=-1)
                else:
                    left = torch.baddbmm(left, segment, segment.mT @ left, alpha=-1)
                before = count
            result[part] = left
    return [results[count] for count in counts]


def _gram(weights: Tensor) -> Tensor:
    """(N, r, r) float64: W'W or WW', whichever is smaller."""
    n_matrices, m, n = weights.shape
    r = min(m, n)
    gram = torch.empty((n_matrices, r, r), dtype=torch.float64, device=weights.device)
    step = max(1, _CHUNK_BYTES // max(1, 8 * m * n))
    for first in range(0, n_matrices, step):
        part = weights[first : first + step].double()
        product = part.mT @ part if n <= m else part @ part.mT
        gram[first : first + step] = product
    return gram


# ------------------------------------------------------------------------------ cuSOLVER

_NAMES = (b"libcusolver.so.12", b"libcusolver.so.11", b"libcusolver.so")
_NAMES_12 = (b"libcusolver.so.11", b"libcusolver.so.12", b"libcusolver.so")  # that of CUDA 12
_solvers: dict[str, Library | None] = {}  # by device
_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(f"low-rank weights: {text}", RuntimeWarning, stacklevel=3)


def _solver_of(device: torch.device, *, demanded: bool) -> Library | None:
    """The library with a batched eigensolver for this device; None, and a warning, without one."""
    name = str(device)
    if name not in _solvers:
        _solvers[name] = _probe(device)
    library = _solvers[name]
    if library is None and demanded:
        raise ValueError("solver: 'batched' needs fastood's CUDA kernels and cuSOLVER of 12.6")
    return library


def _probe(device: torch.device) -> Library | None:
    try:
        library = loader.cuda(device.index)
    except BuildError as error:
        _warn_once(f"torch.linalg.eigh, one matrix at a time: {error}")
        return None
    # torch loads its linear algebra, and cuSOLVER with it, at the first call that needs it
    torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=device))
    # torch's own first: another one on the path may want a newer driver
    for name in _NAMES_12 if (torch.version.cuda or "").startswith("12.") else _NAMES:
        if library.functions.fastood_eigen_load(name) == 0:
            return library
    _warn_once("torch.linalg.eigh, one matrix at a time: this cuSOLVER has no batched solver")
    return None


def _batched(library: Library, gram: Tensor) -> TailBasis | None:
    """Overwrites ``gram``; None if the solver refuses or does not converge."""
    functions, device = library.functions, gram.device
    count, n, _ = gram.shape
    values = torch.empty((count, n), dtype=torch.float64, device=device)
    info = torch.empty((count,), dtype=torch.int32, device=device)
    there, here = ctypes.c_uint64(), ctypes.c_uint64()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        status = functions.fastood_eigen_workspace(
            device.index, n, count, gram.data_ptr(), values.data_ptr(),
            ctypes.addressof(there), ctypes.addressof(here),
        )  # fmt: skip
        if status != 0:
            return None
        on_device = torch.empty((max(1, there.value),), dtype=torch.uint8, device=device)
        on_host = torch.empty((max(1, here.value),), dtype=torch.uint8)
        status = functions.fastood_eigen(
            device.index, n, count, gram.data_ptr(), values.data_ptr(), on_device.data_ptr(),
            there.value, on_host.data_ptr(), here.value, info.data_ptr(), stream,
        )  # fmt: skip
        # reading info waits, which the host's workspace has to outlive anyway
        if status != 0 or bool(info.any()):
            return None
    # column-major eigenvectors: rows of what torch sees
    return TailBasis(values, gram.mT)
