"""Weight matrices without some of their singular directions, as SeTAR removes them.

Letters: N matrices of one shape (m, n), W = U S V', singular values strongest first. A number of
directions x is a share of min(m, n) if it is a float below 1, else that many. Three parts can be
taken away: the weakest directions ("minor"), the strongest ("principal"), or "random" ones.

Everything is computed in float64 on the device of the weights and returned in their dtype, factors
in float64. Nothing is differentiable. Singular vectors are found up to their sign, and up to
rotations within singular values that are equal.

Source: arXiv 2406.12629.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from fastood.ops.lowrank import TailBasis, check_finite, drop_tails, resolution, tail_basis
from fastood.scores.inputs import check_count

__all__ = [
    "Factors",
    "LowRankBasis",
    "Part",
    "TruncatedSVD",
    "check_part",
    "count_of",
    "low_rank",
    "truncated_svd",
]

Part = Literal["minor", "principal", "random"]

_WEAK = 1e-4
"""Singular vectors of the long side are W v / s. Below this much of the largest s, rounding of the
Gram matrix shows in float32 results (an angle of about 2e-16 / 1e-4²), and an SVD gives them."""

_LAST_SEED = 2**63 - 1


class TruncatedSVD(NamedTuple):
    """W ≈ U diag(S) Vh, by the largest singular values."""

    U: Tensor
    """(N, m, rank), or (m, rank)."""
    S: Tensor
    """(N, rank), descending."""
    Vh: Tensor
    """(N, rank, n)."""


class Factors(NamedTuple):
    """The part of the weights that was dropped, as a product B A."""

    A: Tensor
    """(N, r, n), or (r, n), float64: sqrt(S1) V1'."""
    B: Tensor
    """(N, m, r), float64: W V1 / sqrt(S1) = U1 sqrt(S1)."""


def count_of(x: Any, n: int) -> int:
    """How many of ``n`` singular directions ``x`` means.

    Args:
        x: a float in [0, 1) is a share: round(n x), halves to the even number, as the authors
            have it; an integer is a number, 0 <= x <= n.
        n: min(m, n) of the matrix, >= 1.
    Raises:
        ValueError: a share outside [0, 1), a number above ``n``, what is neither.
    Example:
        >>> [count_of(x, 768) for x in (0.0, 0.05, 0.4, 12)]
        [0, 38, 307, 12]
    """
    if isinstance(x, bool) or not isinstance(x, Real):
        raise ValueError(
            f"drop: expected a share in [0, 1) or an integer number of directions, got {x!r}"
        )
    if isinstance(x, Integral):
        number = int(x)
        if not 0 <= number <= n:
            raise ValueError(
                f"drop: expected 0 <= directions <= min(m, n) = {n}, got {number}; "
                "a share is a float"
            )
        return number
    if not 0 <= float(x) < 1:  # NaN is outside too
        raise ValueError(
            f"drop: expected a share in [0, 1), got {float(x)}; a number of directions is an int"
        )
    return round(n * float(x))


def truncated_svd(weights: Tensor, *, rank: int) -> TruncatedSVD:
    """The ``rank`` largest singular values of each matrix, and their vectors.

    Args:
        weights: (N, m, n), or one matrix (m, n); floating point.
        rank: 1 <= rank <= min(m, n).
    Returns:
        U (N, m, rank), S (N, rank) and Vh (N, rank, n) in the dtype of the weights (float16 has no
        S above 65504), without N for one matrix. Columns of U and rows of Vh are orthonormal, also
        where singular values are zero.
    Raises:
        ValueError: on shapes, dtypes and values that are not finite; a rank out of range.
    Example:
        >>> u, s, vh = truncated_svd(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
        >>> s
        tensor([3., 2.])
    """
    stack = _stack(weights)
    n_matrices, m, n = stack.shape
    rank = check_count("rank", rank, 1, min(m, n), high_name="min(m, n) = ")
    u, s, vh = (stack.new_empty(n_matrices, *size) for size in ((m, rank), (rank,), (rank, n)))
    if stack.dtype == torch.float64:  # its rounding asks for more than W v / s gives
        check_finite(stack)
        vectors = None
    else:
        vectors = tail_basis(stack).vectors
    for i, matrix in enumerate(stack):
        found = None if vectors is None else _strongest(matrix.double(), vectors[i], rank)
        u[i], s[i], vh[i] = _by_svd(matrix.double(), rank) if found is None else found
    return TruncatedSVD(u, s, vh) if weights.ndim == 3 else TruncatedSVD(u[0], s[0], vh[0])


def _by_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _strongest(matrix: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, S, Vh in float64 of one matrix, from the vectors of its short side; None if some singular
    values are too small for that."""
    tall = matrix.shape[0] >= matrix.shape[1]
    short = vectors[:, -rank:].flip(-1)
    along = (matrix if tall else matrix.mT) @ short
    s = along.norm(dim=0)  # nearer to the truth than roots of eigenvalues are
    s, order = s.sort(descending=True, stable=True)
    if not float(s[-1]) > _WEAK * float(s[0]):  # zeros too
        return None
    short, long = short[:, order], along[:, order] / s
    return (long, s, short.mT) if tall else (short, s, long.mT)


@overload
def low_rank(
    weights: Tensor, *, drop: float = 0.15, part: Part = "minor", seed: int = 0
) -> Tensor: ...
@overload
def low_rank(
    weights: Tensor, *, drop: Sequence[float], part: Part = "minor", seed: int = 0
) -> list[Tensor]: ...
def low_rank(
    weights: Tensor,
    *,
    drop: float | Sequence[float] = 0.15,
    part: Part = "minor",
    seed: int = 0,
) -> Tensor | list[Tensor]:
    """The weights without a part of their singular directions.

    minor: sum_{i <= p - r} s_i u_i v_i', p = min(m, n), r = ``count_of(drop, p)``

    Args:
        weights: (N, m, n), or one matrix (m, n); floating point, finite.
        drop: share in [0, 1) or number of directions; a list gives a list.
        part: ``"minor"`` drops the weakest, ``"principal"`` the strongest, ``"random"`` r of a
            permutation.
        seed: of that permutation, which is drawn from a generator of its own, the same for every
            matrix. The authors' code takes whatever state the global generator is in, so its
            random picks are not these.
    Returns:
        in the shape and dtype of the weights. Deterministic.
    Raises:
        ValueError: on shapes, dtypes and values that are not finite; shares, numbers and names
            that do not exist.
    Example:
        >>> low_rank(torch.diag(torch.tensor([3.0, 1.0, 2.0])), drop=1).diagonal().abs()
        tensor([3., 0., 2.])
    """
    check_part(part, seed)
    _counts(drop, min(_stack(weights).shape[1:]))  # refused before the work starts
    return LowRankBasis(weights).drop(drop, part=part, seed=seed)


class LowRankBasis:
    """One decomposition of weights, for any number of ratios.

    Holds a copy of the weights: what happens to a model afterwards does not matter here.

    Args:
        weights: (N, m, n), or one matrix (m, n), whose results then have no N; floating point,
            finite.
    Attributes:
        shape: of the weights.
        size: min(m, n), of which shares are taken.
    Raises:
        ValueError: on shapes, dtypes and values that are not finite.
    Example:
        >>> basis = LowRankBasis(torch.diag(torch.tensor([3.0, 1.0, 2.0])))
        >>> [round(float(w.square().sum())) for w in basis.drop([0, 1, 2])]
        [14, 13, 9]
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = _stack(weights).clone()
        self._single = weights.ndim == 2
        self.shape = weights.shape
        self.size = min(weights.shape[-2:])
        self._basis = tail_basis(self._weights)
        self._floor = resolution(self._weights)

    @property
    def values(self) -> Tensor:
        """(N, size) float64 singular values, descending.

        Right to about 1e-8 of the largest; those of float64 weights on a CPU to rounding.
        """
        return self._one(self._basis.values.clamp_min(0).sqrt().flip(-1))

    @overload
    def drop(self, x: float, *, part: Part = "minor", seed: int = 0) -> Tensor: ...
    @overload
    def drop(self, x: Sequence[float], *, part: Part = "minor", seed: int = 0) -> list[Tensor]: ...
    @overload
    def drop(
        self, x: float | Sequence[float], *, part: Part = "minor", seed: int = 0
    ) -> Tensor | list[Tensor]: ...
    def drop(
        self, x: float | Sequence[float], *, part: Part = "minor", seed: int = 0
    ) -> Tensor | list[Tensor]:
        """The weights without a part of their directions, see ``low_rank``.

        A list of shares or numbers gives a list: larger parts contain the smaller ones, and
        together they cost little more than the largest.

        Raises:
            ValueError: shares, numbers and names that do not exist.
        """
        check_part(part, seed)
        counts = _counts(x, self.size)
        basis = self._dropped(max(counts, default=0), part, seed)
        found = [self._one(w) for w in drop_tails(self._weights, basis, counts)]
        return found if _several(x) else found[0]

    def factors(self, x: float, *, part: Part = "minor", seed: int = 0) -> Factors:
        """The dropped part as a product B A of r columns and r rows.

        A = sqrt(S1) V1',  B = W V1 / sqrt(S1),  with S1, V1 of the dropped directions

        Strongest first; of equal ones those that a smaller part would keep (minor) or drop
        (principal). ``drop(x) + B A`` is the weights to rounding. Directions whose singular
        value cannot be told from zero, at most 1.5e-8 of the largest (float64 weights on a CPU:
        max(m, n) epsilons), have zeros in A and B: their vectors are arbitrary, and they hold less
        than float32 can add to the weights.

        Returns:
            A (N, r, n) and B (N, m, r), float64.
        Raises:
            ValueError: shares, numbers and names that do not exist.
        """
        check_part(part, seed)
        values, short = self._dropped(count_of(x, self.size), part, seed)
        if part == "minor":  # the reverse of the order of dropping, also where values are equal
            short = short.flip(-1)
        elif part == "random":
            order = values.argsort(dim=-1, descending=True, stable=True)[:, None]
            short = short.gather(-1, order.expand_as(short))  # (N, size, r)
        m, n = self.shape[-2:]
        tall = self._weights if n <= m else self._weights.mT
        # one matrix in float64 at a time
        along = short.new_empty(*tall.shape[:2], short.shape[-1])
        for i, matrix in enumerate(tall):
            along[i] = matrix.double() @ short[i]
        s = along.norm(dim=1, keepdim=True)
        largest = self._basis.values[:, -1:, None].clamp_min(0).sqrt()
        root = s.sqrt()
        some = s > self._floor * largest
        short, along = torch.where(some, short * root, 0), torch.where(some, along / root, 0)
        found = (short.mT, along) if n <= m else (along.mT, short)
        return Factors(*(self._one(f) for f in found))

    def energy(self, x: float, *, part: Part = "minor", seed: int = 0) -> Tensor:
        """(N,) float64: share of the squared Frobenius norm that is dropped; 0 for W = 0.

        sum_dropped s_i² / sum s_i²

        Raises:
            ValueError: shares, numbers and names that do not exist.
        """
        check_part(part, seed)
        dropped = self._dropped(count_of(x, self.size), part, seed).values
        dropped, total = (v.clamp_min(0).sum(-1) for v in (dropped, self._basis.values))
        return self._one(torch.where(total > 0, dropped / total, 0.0))

    def negligible(self, x: float, *, part: Part = "minor", seed: int = 0) -> Tensor:
        """(N,) bool: dropping the part changes the weights by no more than they are rounded.

        |W - Ŵ| <= eps / 2 |W|, Frobenius norms; 1e-12 for float64. So it is for directions that
        were dropped before: of those a dtype keeps its rounding.

        Raises:
            ValueError: shares, numbers and names that do not exist.
        """
        rounding = max(torch.finfo(self._weights.dtype).eps / 2, 1e-12)
        return self.energy(x, part=part, seed=seed) <= rounding**2

    def _dropped(self, count: int, part: Part, seed: int) -> TailBasis:
        """The first ``count`` directions that are dropped, in the order of dropping."""
        values, vectors = self._basis
        if part == "minor":
            return TailBasis(values[:, :count], vectors[..., :count])
        if part == "principal":
            first = self.size - count
            return TailBasis(values[:, first:].flip(-1), vectors[..., first:].flip(-1))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.size, generator=generator)[:count]  # of the strongest first
        order = (self.size - 1 - order).to(values.device)
        return TailBasis(values[:, order], vectors[..., order])

    def _one(self, x: Tensor) -> Tensor:
        return x[0] if self._single else x


def _several(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _counts(x: Any, size: int) -> list[int]:
    return [count_of(value, size) for value in (x if _several(x) else [x])]


def check_part(part: str, seed: int) -> None:
    """Raise a ValueError for a part that does not exist, or a seed out of range."""
    if part not in get_args(Part):
        raise ValueError(f"part: expected one of {', '.join(get_args(Part))}, got {part!r}")
    check_count("seed", seed, 0, _LAST_SEED)


def _stack(weights: Tensor) -> Tensor:
    """(N, m, n) view of weights that have a shape and a dtype to be decomposed."""
    if not isinstance(weights, Tensor):
        raise ValueError(f"weights: expected a tensor, got {type(weights).__name__}")
    if weights.ndim not in (2, 3) or 0 in weights.shape[-2:]:
        raise ValueError(
            f"weights: expected (m, n), or (N, m, n) matrices of one shape, none of them empty, "
            f"got {tuple(weights.shape)}"
        )
    if not weights.is_floating_point():
        raise ValueError(f"weights: expected floating point, got {weights.dtype}")
    weights = weights.detach()
    return weights if weights.ndim == 3 else weights[None]
