"""Hugging Face ``datasets`` objects, without importing the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastood.data.classes import match_names, names_of_numbers, pick_split
from fastood.data.folder import ClassNames, describe_classes
from fastood.data.imageset import ImageItem, ImageSet
from fastood.errors import DataError

__all__ = ["is_hub_dataset", "load_hub_dataset"]


def is_hub_dataset(source: Any) -> bool:
    """True for objects of the ``datasets`` library (recognised by module name)."""
    return type(source).__module__.split(".")[0] == "datasets"


@dataclass(frozen=True)
class _ReadRow:
    """``ImageItem.read`` for one row; the column is cast so that bytes come back undecoded."""

    dataset: Any
    column: str
    row: int

    def __call__(self) -> bytes:
        value = self.dataset[self.row][self.column]
        if value is None:
            raise OSError("the row has no image")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return Path(value["path"]).read_bytes()


def load_hub_dataset(
    dataset: Any, *, name: str | None, split: str | None, class_names: ClassNames
) -> ImageSet:
    """Rows of a ``datasets.Dataset`` (or one split of a ``DatasetDict``), in their own order.

    The image column is the first of type ``Image``; labels come from the first ``ClassLabel``
    column, else from an integer column called ``label`` or ``labels``.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        dataset = dataset[pick_split([str(key) for key in dataset], split, f"the {kind}")]
    elif split is not None:
        raise DataError(f"split: a {kind} has no splits, got split={split!r}")
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"source: expected a datasets.Dataset with a length, got {type(dataset).__name__}; "
            "load it with streaming=False"
        )
    features = dataset.features
    column = next((c for c, f in features.items() if type(f).__name__ == "Image"), None)
    if column is None:
        raise DataError(
            f"source: expected a column of type Image, the dataset has {dict(features)}; cast it "
            "with dataset.cast_column(name, datasets.Image())"
        )
    if len(dataset) == 0:
        raise DataError("source: the dataset has no rows")
    labelled = [c for c, f in features.items() if type(f).__name__ == "ClassLabel"]
    for c in ("label", "labels"):
        if "int" in str(getattr(features.get(c), "dtype", "")):
            labelled.append(c)
    labels: list[int | None] = [None] * len(dataset)
    names: tuple[str, ...] | None = None
    if labelled:
        raw = dataset[labelled[0]]
        labels = [None if v is None or int(v) < 0 else int(v) for v in raw]
        own = getattr(features[labelled[0]], "names", None)
        names = tuple(own) if own else None
    if class_names is not None:
        labels, names = _rename(labels, names, class_names)
    raw_rows = dataset.cast_column(column, type(features[column])(decode=False))
    raw_rows = raw_rows.select_columns([column]).with_format(None)
    width = len(str(len(dataset) - 1))
    items = tuple(
        ImageItem(path=f"{i:0{width}d}", read=_ReadRow(raw_rows, column, i), label=labels[i])
        for i in range(len(dataset))
    )
    info = getattr(dataset, "info", None)
    default = getattr(info, "dataset_name", None) or "dataset"
    layout = f"Hugging Face dataset, image column {column!r}" + describe_classes(items)
    return ImageSet(name or str(default), f"datasets:{default}", items, names, layout)


def _rename(
    labels: list[int | None], own: tuple[str, ...] | None, class_names: Any
) -> tuple[list[int | None], tuple[str, ...]]:
    if own is not None:
        index, names = match_names(own, class_names, where="the dataset")
        return [None if v is None else index[own[v]] for v in labels], names
    return labels, names_of_numbers(class_names, labels, "the dataset")
