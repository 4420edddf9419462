"""Low-rank updates of weight matrices, W + scale · B A, put on a model and taken off or merged.

Updates attach to the parameters a model has, by parametrisation: whoever reads the parameter, also
a fused attention that takes all of ``in_proj_weight``, sees the updated one. Several matrices that
share a parameter (open_clip's q, k and v) share one parametrisation, and rows of other matrices
pass through untouched. ``merge`` leaves a model of the original kind with the original keys.

Source: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastood.models.matrices import Matrix

__all__ = ["Factors", "LowRank", "attach", "attached", "detach", "merge"]

Factors = tuple[nn.Parameter, nn.Parameter]
"""A (r, in) and B (out, r)."""


class LowRank(nn.Module):
    """Parametrisation of one parameter: low-rank updates of the matrices kept in it.

    W' = W + scale · B A for each matrix, A (r, in), B (out, r). Where B₀ A₀ is part of W already,

        W' = W + scale · (B A - B₀ A₀) = W + scale · ((B - B₀) A + B₀ (A - A₀))

    The update is made and added in the wider of both dtypes and returned in the parameter's. Rows
    that belong to no matrix, and all of them while B = 0 or nothing has moved from A₀ and B₀, are
    the original's bit for bit: the second form then adds exact zeros, however products are rounded,
    and it does not lose the digits of small changes to a difference of two large products.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Matrix, Factors]],
        scale: float,
        start: Mapping[Matrix, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.matrices = tuple(matrix for matrix, _ in parts)
        self.A = nn.ParameterList([a for _, (a, _) in parts])
        self.B = nn.ParameterList([b for _, (_, b) in parts])
        self.start = tuple(start.get(matrix) for matrix in self.matrices)
        self.scale = scale
        self.order: tuple[str, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        updated = [
            (matrix.rows, self._updated(matrix, weight, self._update(*factors)))
            for matrix, *factors in zip(self.matrices, self.A, self.B, self.start, strict=True)
        ]
        if updated[0][0] is None:
            return updated[0][1]
        pieces, end = [], 0
        for rows, piece in sorted(updated, key=lambda found: found[0] or (0, 0)):
            assert rows is not None
            pieces += [weight[end : rows[0]], piece]
            end = rows[1]
        return torch.cat([*pieces, weight[end:]])

    def _update(self, a: Tensor, b: Tensor, start: tuple[Tensor, Tensor] | None) -> Tensor:
        if start is None:
            return self.scale * (b @ a)
        a_0, b_0 = start
        return self.scale * ((b - b_0) @ a + b_0 @ (a - a_0))

    def _updated(self, matrix: Matrix, weight: Tensor, update: Tensor) -> Tensor:
        w = matrix.of(weight)
        found = (w + update).to(w.dtype)
        return found.mT if matrix.transposed else found


def attach(
    model: nn.Module,
    updates: Mapping[Matrix, Factors],
    *,
    scale: float,
    start: Mapping[Matrix, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Put low-rank updates on matrices of ``model``, in place.

    Args:
        updates: for each matrix A (r, in) and B (out, r); these very parameters are used.
        scale: alpha / r.
        start: A₀ and B₀ of matrices of which scale · B₀ A₀ is a part already.
    Raises:
        ValueError: no updates; A and B of other shapes; a parameter that already has a
            parametrisation (``merge`` or ``detach`` first).
    Notes:
        The parameters below stop requiring a gradient. Until ``merge`` or ``detach`` a state dict
        of the model has other keys, so that it is not taken for one of the original.
    """
    if not updates:
        raise ValueError("updates: expected at least one matrix, got none")
    homes: dict[str, list[tuple[Matrix, Factors]]] = {}
    for matrix, (a, b) in updates.items():
        out, width = matrix.shape
        if a.shape != (len(a), width) or b.shape != (out, len(a)):
            raise ValueError(
                f"updates: expected A (r, {width}) and B ({out}, r) for {matrix.address}, got "
                f"{tuple(a.shape)} and {tuple(b.shape)}; is this another model?"
            )
        if parametrize.is_parametrized(model.get_submodule(matrix.module), matrix.parameter):
            raise ValueError(
                f"updates: {matrix.key} already has a parametrisation; merge or detach it first"
            )
        homes.setdefault(matrix.key, []).append((matrix, (a, b)))
    for parts in homes.values():
        matrix = parts[0][0]
        module = model.get_submodule(matrix.module)
        getattr(module, matrix.parameter).requires_grad_(False)
        low_rank = LowRank(parts, scale, start or {})
        low_rank.order = tuple(module._parameters)
        parametrize.register_parametrization(module, matrix.parameter, low_rank, unsafe=True)


def attached(model: nn.Module) -> tuple[Matrix, ...]:
    """The matrices of ``model`` that have an update."""
    return tuple(m for _, _, low_rank in _homes(model) for m in low_rank.matrices)


def merge(model: nn.Module) -> nn.Module:
    """Write the updates into the weights: the same outputs, the original keys, no updates left.

    Raises:
        ValueError: if there are none.
    """
    _remove(model, merged=True)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the updates off: the original model.

    Raises:
        ValueError: if there are none.
    """
    _remove(model, merged=False)
    return model


def _homes(model: nn.Module) -> list[tuple[nn.Module, str, LowRank]]:
    found = []
    for module in model.modules():
        held = getattr(module, "parametrizations", None)
        if parametrize.is_parametrized(module) and isinstance(held, nn.ModuleDict):
            for name, chain in held.items():
                if isinstance(chain, parametrize.ParametrizationList) and len(chain) == 1:
                    low_rank = chain[0]
                    if isinstance(low_rank, LowRank):
                        found.append((module, name, low_rank))
    return found


def _remove(model: nn.Module, *, merged: bool) -> None:
    homes = _homes(model)
    if not homes:
        raise ValueError("model: expected one with low-rank updates, found none")
    for module, name, low_rank in homes:
        with torch.no_grad():
            parametrize.remove_parametrizations(module, name, leave_parametrized=merged)
        # keys in the order of before, whatever was registered last
        again = {n: module._parameters.pop(n) for n in low_rank.order if n in module._parameters}
        module._parameters.update(again)
