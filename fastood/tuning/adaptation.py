"""Saved adaptations put on a model, in the order they were made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastood.errors import ModelError

if TYPE_CHECKING:
    from fastood.models.base import Encoder
    from fastood.scores.bank import Head

__all__ = ["Adapted", "adapt"]


@dataclass(frozen=True)
class Adapted:
    """A model with its adaptations.

    Attributes:
        encoder: with changed towers where an adaptation changes them (LoRA, SeTAR); its fingerprint
            then is another, so that texts are encoded again and caches do not mix.
        head: turns features into similarities (CoOp, Tip-Adapter, ...), or None: class prompts do.
        class_names: of the head, in its order; None without a head.
        made_of: for each file what it is: method, settings, training or search, digest.
    """

    encoder: Encoder
    head: Head | None
    class_names: tuple[str, ...] | None
    made_of: tuple[Mapping[str, Any], ...]


def adapt(encoder: Encoder, files: Sequence[str | os.PathLike[str]]) -> Adapted:
    """Put saved adaptations on ``encoder``; the model given is not changed.

    Any number of files that change towers may come first and one with a head last: each was
    trained on what the files before it make of the model, and says so in its fingerprint.

    Args:
        files: what ``fastood train`` or ``save_method`` wrote; recipes of ``fastood search setar``;
            JSON files with the ``lora_settings`` of SeTAR's authors.
    Raises:
        ModelError: a file for another backbone, with both sides printed; one behind a head.
        DataError: a file that is missing, damaged or none of ours.
    """
    from fastood.setar.recipe import Recipe, is_recipe
    from fastood.tuning.state import load_method, read_header

    head, names, last = None, None, None
    made_of: list[Mapping[str, Any]] = []
    for file in files:
        if last is not None:
            raise ModelError(
                f"{file}: nothing can follow {last}, which scores its own {len(names or ())} "
                "classes; give the files that change towers first, and one such file last"
            )
        header = read_header(file)
        made_of.append({"file": os.fspath(file), **header.summary()})
        if is_recipe(file):
            recipe = Recipe.read(file)
            try:
                encoder = recipe.apply(encoder)
            except (ModelError, ValueError) as error:  # of several files, which one
                raise type(error)(f"{os.fspath(file)}: {error}") from error
            continue
        method = load_method(file, encoder)
        if method.changes_towers:
            encoder = method.adapted(encoder)
        else:
            head, names, last = method.head(), method.class_names, file
    return Adapted(encoder, head, names, tuple(made_of))
