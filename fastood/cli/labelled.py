"""Labelled images of a command line: folders, lists, features, or CoOp's split files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastood.cli import inputs

if TYPE_CHECKING:
    from fastood.data.imageset import ImageSet
    from fastood.features.featureset import FeatureSet

__all__ = ["is_drawn", "read_shots", "read_training"]


def read_shots(text: str) -> int | None:
    """A number of images of each class; None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--shots: expected a number of images of each class or 'all', got {text}")
    return int(text)


def is_drawn(text: str) -> bool:
    """Whether ``--id`` names a CoOp split as a whole: then both of its sets are drawn together."""
    path = Path(text)
    file = path.is_file() and path.suffix.lower() == ".json"
    return file or (path.is_dir() and len(list(path.glob("split_zhou_*.json"))) == 1)


def read_training(
    id: str,
    val: str | None,
    classes: str | None,
    match: str,
    limit: int | None,
    shots: int | None,
    seed: int,
) -> tuple[ImageSet | FeatureSet, tuple[str, ...], ImageSet | FeatureSet | None]:
    """Training images, class names, validation images; of a CoOp split, drawn already.

    Raises:
        ValueError: images without classes; ``--classes`` or ``--limit`` with a split file.
    """
    if not is_drawn(id):
        images, names = inputs.read_named_set(id, classes, match=match, limit=limit)
        if names is None:
            raise ValueError(
                f"--id {id}: expected labelled images (a subfolder for each class), found no "
                "classes"
            )
        return images, names, None if val is None else inputs.read_set(val, limit=limit)
    from fastood.tuning.fewshot import coop_split

    if classes is not None or limit is not None:
        raise ValueError(f"--id {id}: a CoOp split names its classes and images; expected neither "
                         "--classes nor --limit")  # fmt: skip
    images, held = coop_split(id, shots, seed)
    return images, images.class_names or (), held if val is None else inputs.read_set(val)
