"""What is asked of a fine-tuning run, checked before there is a model or a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fastood.setar.authors import backbone_of, published_training
from fastood.tuning.low_rank_method import LowRankMethod
from fastood.tuning.method import Method, check_settings
from fastood.tuning.recipes import Recipe, epochs_of_coop
from fastood.tuning.setar_ft import SeTARFT, read_picks

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["check_given", "recipe_of", "sizes_of"]


def recipe_of(
    kind: type[Method], *, shots: int | None, dataset: str | None = None, **changes: Any
) -> Recipe:
    """The authors' recipe with what is asked to be different.

    CoOp's number of epochs depends on the shots, and on whether the set is ImageNet.

    Raises:
        ValueError: a field that recipes do not have, or a value out of range.
    """
    fields = [f.name for f in dataclasses.fields(Recipe) if f.name != "source"]
    unknown = [name for name in changes if name not in fields]
    if unknown:
        raise ValueError(
            f"recipe: there is no {', '.join(map(repr, unknown))}; expected {', '.join(fields)}"
        )
    given = {name: value for name, value in changes.items() if value is not None}
    if kind.recipe.epochs == 0 and given.get("epochs"):
        raise ValueError(
            f"recipe: {kind.name} trains nothing, expected no epochs, got {given['epochs']}"
        )
    if kind.name == "coop" and "epochs" not in given:
        given["epochs"] = epochs_of_coop(shots, dataset)
    return dataclasses.replace(kind.recipe, **given)


def check_given(kind: type[Method], settings: Mapping[str, Any]) -> None:
    """Refuse settings that the method does not have, or of which it needs more; reads no model.

    Raises:
        ValueError: an unknown setting; SeTAR+FT without picks.
        DataError: SeTAR+FT with a recipe that cannot be read.
    """
    check_settings(kind, settings)
    if issubclass(kind, SeTARFT):
        read_picks(settings.get("picks"))


def sizes_of(kind: type[Method], encoder: Encoder) -> dict[str, int]:
    """Fields of the authors' recipe that depend on the network: images per step."""
    network = getattr(encoder, "model", None)
    if not issubclass(kind, LowRankMethod) or not isinstance(network, nn.Module):
        return {}
    return {"batch_size": published_training(backbone_of(network)).batch}
