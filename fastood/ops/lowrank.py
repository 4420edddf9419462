"""Weights without some of their singular directions, for many matrices of one shape at a time.

One decomposition of each matrix serves every number of directions that is tried. On the smaller
side, the Gram matrix is formed in float64 (which leaves float32 weights all their digits, squared
or not) and its symmetric eigenproblem solved; the other side's singular vectors are never needed.
Letters here: N matrices of m rows and n columns, r = min(m, n).
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastood.errors import BuildError
from fastood.ops import loader
from fastood.ops.cudalib import Library

__all__ = ["TailBasis", "check_finite", "drop_tails", "resolution", "solver_of", "tail_basis"]

_CHUNK_BYTES = {"cpu": 3 << 20, "other": 1 << 28}
"""Float64 numbers of weights worked on at a time. On the CPU they stay in the cache of a core while
one number of directions after the other is dropped, and their memory is used again. A GPU has many
cores to fill."""

_GRAM_BLOCKS = 3
"""Column blocks of a Gram matrix on the CPU, of which the lower triangle is formed: two thirds of
the multiplications. Smaller blocks save more of them and lose it again to narrow products."""


class TailBasis(NamedTuple):
    """Singular directions of matrices (N, m, n) on their smaller side, the weakest first."""

    values: Tensor
    """(N, r) float64, squared singular values, ascending."""
    vectors: Tensor
    """(N, r, r) float64; column i belongs to value i. Right singular vectors if n <= m, else left
    ones."""


def solver_of(weights: Tensor) -> Literal["gram", "svd"]:
    """How these weights are decomposed: by their Gram matrix in float64, or by a float64 SVD.

    The Gram matrix is the faster one: 768 x 768, 512 x 2048, 768 x 3072 and 1024 x 4096 take 2.1,
    2.4, 2.9 and 2.7 times as long by the best SVD (QR first, then the SVD of the triangle), one
    thread, x86-64 with AVX-512; ``python -m bench.bench_lowrank`` measures them again. It tells
    singular values apart down to 1.5e-8 of the largest. Float32 weights and shorter ones are
    rounded more coarsely than that; float64 weights are not, so theirs are found by the SVD. Not on
    a GPU, whose SVD takes a second or more for one matrix.
    """
    exact = weights.dtype == torch.float64 and weights.device.type == "cpu"
    return "svd" if exact else "gram"


def resolution(weights: Tensor) -> float:
    """Singular values at most this much of the largest cannot be told from zero.

    The root of float64's epsilon, 1.5e-8, for Gram matrices, whose eigenvalues are squares;
    max(m, n) epsilons for the SVD, as in ``numpy.linalg.matrix_rank``.
    """
    epsilon = torch.finfo(torch.float64).eps
    return epsilon**0.5 if solver_of(weights) == "gram" else max(weights.shape[-2:]) * epsilon


def tail_basis(weights: Tensor, *, solver: str | None = None) -> TailBasis:
    """The eigenvectors of W'W (n <= m) or WW' (n > m), one decomposition for all matrices.

    Args:
        weights: (N, m, n) floating point.
        solver: of Gram matrices, ``"torch"`` (``torch.linalg.eigh``) or ``"batched"`` (cuSOLVER's
            batched solver, GPU only); ``"svd"`` (QR, then ``torch.linalg.svd`` of the triangle);
            default what ``solver_of`` says, and the batched one where it can be had.
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
    if solver not in (None, "torch", "batched", "svd"):
        raise ValueError(f"solver: expected 'torch', 'batched', 'svd' or None, got {solver!r}")
    weights = weights.detach()
    if solver == "svd" or (solver is None and solver_of(weights) == "svd"):
        return _by_svd(weights)
    gram = _gram(weights)
    # the diagonal has the squared norms: whatever is not finite shows there
    check_finite(gram.diagonal(dim1=-2, dim2=-1))
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
    """The weights without the first ``count`` directions of a basis, for each count.

    W - (W V) V' with V the first ``count`` vectors (V (V' W) where they are left ones): the weakest
    of a ``tail_basis``, others if its columns were put in another order. A larger count contains
    the smaller ones: together they cost one projection on the largest.

    Args:
        weights: (N, m, n), as ``tail_basis`` had them.
        basis: of these weights; as many vectors as the largest count are enough.
        counts: how many directions to drop, 0 <= count <= min(m, n), in any order.
    Returns:
        one (N, m, n) tensor per count, in the order asked, in the dtype of the weights; computed
        in float64, whatever torch's TF32 switches say.
    Raises:
        ValueError: if the basis is of another shape or device, or a count is out of range.
    """
    n_matrices, m, n = weights.shape
    r = min(m, n)
    for count in counts:
        if not 0 <= count <= r:
            raise ValueError(f"counts: expected 0 <= count <= min(m, n) = {r}, got {count}")
    most = max(counts, default=0)
    found = tuple(basis.vectors.shape)
    if (
        found[:-1] != (n_matrices, r)
        or not most <= found[-1] <= r
        or basis.vectors.device != weights.device
    ):
        raise ValueError(
            f"basis: expected vectors {(n_matrices, r, r)} on {weights.device} for weights "
            f"{tuple(weights.shape)}, got {found} on {basis.vectors.device}"
        )
    weights = weights.detach()
    results = {count: torch.empty_like(weights) for count in sorted(set(counts))}
    tall = _tall(weights)
    for matrices, rows in _chunks(tall):
        # a copy always: float64 weights would be worked on in place
        left = tall[matrices, rows].to(torch.float64, copy=True)
        vectors = basis.vectors[matrices, :, :most]
        along, before = left @ vectors, 0
        for count, result in results.items():
            if count > before:
                segment = slice(before, count)
                _add(left, along[..., segment], vectors[..., segment].mT, alpha=-1)
                before = count
            # of everything that is dropped rounding would leave something, which a norm blows up
            _tall(result)[matrices, rows] = left if count < r else 0
    # a result of its own for counts that were asked for twice
    return [
        results[count].clone() if count in counts[:i] else results[count]
        for i, count in enumerate(counts)
    ]


def _tall(weights: Tensor) -> Tensor:
    """(N, max(m, n), r), a view: the vectors of a basis multiply it from the right."""
    return weights if weights.shape[-1] <= weights.shape[-2] else weights.mT


def _chunks(tall: Tensor) -> Iterator[tuple[slice, slice]]:
    """Matrices, and rows of them, to work on at a time."""
    n_matrices, rows, columns = tall.shape
    limit = _CHUNK_BYTES["cpu" if tall.device.type == "cpu" else "other"] // 8  # numbers
    some = max(1, limit // max(1, rows * columns))
    height = rows if some > 1 else min(rows, max(1, limit // max(1, columns)))
    for first in range(0, n_matrices, some):
        for row in range(0, rows, max(1, height)):
            yield slice(first, first + some), slice(row, row + height)


def _add(sums: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> None:
    """sums += alpha a b, matrix by matrix; a batch of one without copies of what has gaps."""
    if len(sums) == 1:
        sums[0].addmm_(a[0], b[0], alpha=alpha)
    else:
        sums.baddbmm_(a, b, alpha=alpha)


def _by_svd(weights: Tensor) -> TailBasis:
    wide = weights.double()
    check_finite(wide)
    triangle = _tall(wide)
    if triangle.shape[1] > triangle.shape[2]:
        triangle = torch.linalg.qr(triangle, mode="r").R
    _, s, vectors = torch.linalg.svd(triangle, full_matrices=False)
    return TailBasis(s.square().flip(-1), vectors.mT.flip(-1))


def check_finite(values: Tensor) -> None:
    """Refuse weights, or their squares in float64, with NaN or Inf."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("weights: values must be finite, found NaN or Inf, or squares of 1e308")


def _gram(weights: Tensor) -> Tensor:
    """(N, r, r) float64: W'W or WW', whichever is smaller; on the CPU its lower triangle at least,
    which is all that eigh reads."""
    tall = _tall(weights)
    n_matrices, _, r = tall.shape
    gram = torch.zeros((n_matrices, r, r), dtype=torch.float64, device=weights.device)
    blocks = _GRAM_BLOCKS if weights.device.type == "cpu" and r > 64 else 1
    width = max(1, -(-r // blocks))
    for matrices, rows in _chunks(tall):
        some = tall[matrices, rows].double()
        for column in range(0, r, width):
            below, block = slice(column, r), slice(column, column + width)
            _add(gram[matrices, below, block], some[..., below].mT, some[..., block])
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
