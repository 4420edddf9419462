"""What candidates drop from one matrix, applied to activations instead of to the weight.

A candidate's weight is W_r = W - B_r A_r with the dropped part B_r A_r of rank r, so

    W_r x + b = y - B_r (A_r x),   y = W x + b

and y is there already. Dropped parts of the weakest (or strongest) directions are nested: A of the
largest holds those of all others as its first rows, so one product A x serves every candidate, and
each of them only adds the directions that the one before it kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastood.scores.inputs import check_count
from fastood.setar.lowrank import LowRankBasis, Part

__all__ = ["Tails"]


class Tails:
    """The dropped parts of one matrix (out, in), for several counts of directions at once.

    Attributes:
        counts: ascending, distinct, above 0.
        shape: (out, in) of the matrix.

    Build it with ``Tails.of``; factors are held in the dtype of the activations.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> tails = Tails.of(LowRankBasis(w), [1, 2], dtype=w.dtype, device="cpu")
        >>> x = torch.ones(3)
        >>> [y.round().abs().tolist() for y in tails.results(x, w @ x)]
        [[3.0, 0.0, 2.0], [3.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        counts: Sequence[int],
        shape: tuple[int, int],
        into: Sequence[Tensor],
        out_of: Sequence[Sequence[Tensor]],
    ) -> None:
        self.counts = tuple(counts)
        self.shape = shape
        self._into, self._out_of = tuple(into), tuple(map(tuple, out_of))

    @classmethod
    def of(
        cls,
        basis: LowRankBasis,
        counts: Sequence[int],
        *,
        part: Part = "minor",
        seed: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tails:
        """The parts ``basis.drop(count, part=part, seed=seed)`` takes away.

        Args:
            basis: of one matrix (out, in).
            counts: how many directions candidates drop, each in 1..min(out, in); order and
                repetitions do not matter.
            part, seed: as in ``low_rank``. Random parts are applied one by one.
            dtype, device: of the activations.
        Raises:
            ValueError: a basis of several matrices, no counts, counts out of range.
        """
        if len(basis.shape) != 2:
            raise ValueError(f"basis: expected that of one matrix, got {tuple(basis.shape)}")
        if not counts:
            raise ValueError("counts: expected at least one number of directions, got none")
        high = basis.size
        some = sorted(
            {check_count("counts", c, 1, high, high_name="min(out, in) = ") for c in counts}
        )
        into, out_of = [], []
        for many in [some[-1]] if part != "random" else some:
            a, b = basis.factors(many, part=part, seed=seed)  # strongest first
            if part == "minor":  # the weakest are dropped first
                a, b = a.flip(0), b.flip(1)
            a, b = a.to(device, dtype), b.to(device, dtype)
            into.append(a.contiguous())
            # rows of Bᵀ: contiguous segments for products from the right
            cuts = [0, *some] if part != "random" else [0, many]
            out_of.append([b[:, i:j].mT.contiguous() for i, j in pairwise(cuts)])
        out, width = basis.shape
        return cls(some, (out, width), into, out_of)

    def results(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """What the candidates' weights make of x, in the order of ``counts``.

        Args:
            x: (..., in).
            y: (..., out), W x, with or without a bias.
        Yields:
            (..., out) tensors. Each is valid until the next one is asked for, and may be written
            to only by who asks for no more. Neither x nor y is changed.
        """
        out, width = self.shape
        if x.shape[-1] != width or y.shape != (*x.shape[:-1], out):
            raise ValueError(
                f"x, y: expected (..., {width}) and (..., {out}) with the same leading sizes, got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        rows, base = x.reshape(-1, width), y.reshape(-1, out)
        for a, segments in zip(self._into, self._out_of, strict=True):
            inside = rows @ a.mT
            start, result = 0, base
            for segment in segments:
                stop = start + len(segment)
                along = inside[:, start:stop]
                if result is base:
                    result = torch.addmm(base, along, segment, alpha=-1)
                else:
                    result.addmm_(along, segment, alpha=-1)
                yield result.view(y.shape)
                start = stop
