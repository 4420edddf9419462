"""Picks of a recipe and the matrices of a model they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.copies import network_of
from fastood.models.matrices import Matrix, list_matrices, swin_layers
from fastood.setar.lowrank import LowRankBasis
from fastood.setar.picks import Pick

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["basis_of", "describe", "match"]


def match(
    encoder: Encoder, picks: Sequence[Pick], found_on: Mapping[str, Any]
) -> list[tuple[Pick, Matrix]]:
    """The matrix of each pick in ``encoder``, and the pick with its number of directions.

    Args:
        found_on: ``describe`` of the model the picks are from; may be empty.
    Raises:
        ModelError: matrices the model does not have, or of other shapes than those picked from.
        ValueError: numbers of directions above those of a matrix; two picks of one.
    """
    network = network_of(encoder)
    listed = list_matrices(network)
    known = {matrix.address: matrix for matrix in listed}
    stages = _stages(network)
    name = found_on.get("name")
    origin = "" if name is None else f"; the recipe was found on {name}"
    found = []
    for pick in picks:
        plain = _flat(pick, stages, encoder.name)
        matrix = known.get(plain.address)
        if matrix is None:
            raise ModelError(f"{encoder.name} has no {pick.address}; {_what(listed)}{origin}")
        shape = found_on.get("matrices", {}).get(matrix.address)
        if shape is not None and tuple(shape) != matrix.shape:
            raise ModelError(
                f"{pick.address} of {encoder.name} is {matrix.shape}, but {tuple(shape)} where it "
                f"was picked{origin}; load that model"
            )
        found.append((plain.counted(matrix), matrix))
    addresses = [matrix.address for _, matrix in found]
    if len(set(addresses)) < len(addresses):
        raise ValueError("picks: expected each matrix once, got a block by both of its names")
    return found


def basis_of(weight: Tensor, matrix: Matrix, name: str) -> LowRankBasis:
    """The decomposition of one matrix of a model.

    Raises:
        ModelError: weights that are not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError(
            f"{name}: {matrix.address} has NaN or Inf in its weights, so it has no singular "
            "values; is the file damaged, or did a training diverge?"
        )
    return LowRankBasis(weight)


def describe(encoder: Encoder, matrices: Sequence[Matrix]) -> dict[str, Any]:
    """What a recipe notes of its model; JSON values."""
    stages = _stages(network_of(encoder))
    return {
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "embed_dim": encoder.embed_dim,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "matrices": {matrix.address: list(matrix.shape) for matrix in matrices},
        **({} if stages is None else {"stages": stages}),
    }


def _stages(network: nn.Module) -> list[int] | None:
    """Blocks of each stage of a Swin; None for towers of one stage."""
    stages = [stage for stage, _ in swin_layers(network)]
    return [stages.count(stage) for stage in sorted(set(stages))] or None


def _flat(pick: Pick, stages: list[int] | None, name: str) -> Pick:
    """The pick with its block counted through all stages."""
    if not isinstance(pick.layer, tuple):
        return pick
    stage, block = pick.layer
    if stages is None:
        raise ModelError(f"{name} has no stages, so no {pick.address}; is the recipe of a Swin?")
    if stage >= len(stages) or block >= stages[stage]:
        raise ModelError(f"{name} has no {pick.address}; its stages have {stages} blocks")
    return replace(pick, layer=sum(stages[:stage]) + block)


def _what(matrices: Sequence[Matrix]) -> str:
    """What a model has, for whoever asked for something else."""
    parts = []
    for tower in ("image", "text"):
        own = [matrix for matrix in matrices if matrix.tower == tower]
        if own:
            kinds = list(dict.fromkeys(m.kind for m in own if m.layer is not None))
            depth = 1 + max((m.layer for m in own if m.layer is not None), default=-1)
            proj = " and proj" if any(m.kind == "proj" for m in own) else ""
            parts.append(f"{tower}.0..{depth - 1} of {', '.join(kinds)}{proj}")
    return f"it has {'; '.join(parts)}" if parts else "none of its matrices can be addressed"
