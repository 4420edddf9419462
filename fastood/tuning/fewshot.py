"""A few images of each class, drawn so that a seed gives the same ones everywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from fastood.atomic import write_text
from fastood.data.imageset import ImageSet
from fastood.data.load import load_images
from fastood.data.paths import path_text
from fastood.errors import DataError
from fastood.features.featureset import FeatureChunk, FeatureSet

__all__ = [
    "coop_split",
    "few_shot",
    "known_labels",
    "labels_and_names",
    "take_features",
    "take_images",
    "write_split",
]

_VALIDATION_SHOTS = 4


@overload
def few_shot(
    data: ImageSet,
    shots: int | None,
    seed: int = ...,
    *,
    class_names: Sequence[str] | None = ...,
    random_state: random.Random | None = ...,
) -> ImageSet: ...


@overload
def few_shot(
    data: FeatureSet,
    shots: int | None,
    seed: int = ...,
    *,
    class_names: Sequence[str] | None = ...,
    random_state: random.Random | None = ...,
) -> FeatureSet: ...


def few_shot(
    data: ImageSet | FeatureSet,
    shots: int | None,
    seed: int = 1,
    *,
    class_names: Sequence[str] | None = None,
    random_state: random.Random | None = None,
) -> ImageSet | FeatureSet:
    """``shots`` images of every class.

    Classes are visited in the order of their first image in ``data``, and for each
    ``random.Random(seed).sample`` draws among its images in the order of ``data`` (one generator
    for all classes). That depends on the order and the seed alone, on no platform and no version
    of Python. An image set is ordered by path; for the images a CoOp split file gives, which is
    in an order of its own, see :func:`coop_split`.

    Args:
        data: images or features with labels.
        shots: images per class; None keeps all (the classes are checked all the same).
        seed: of the draw.
        class_names: the K names that labels index; ``data.class_names`` if None.
        random_state: draw with this generator instead of a new one of ``seed``.

    Returns:
        The chosen images, in the order of ``data``.

    Raises:
        ValueError: shots < 1; images without a label; classes without images, or with fewer than
            ``shots``, with their names and counts.
    """
    labels = known_labels(data)
    names = tuple(class_names if class_names is not None else data.class_names or ())
    if not names:
        names = tuple(f"class {k}" for k in range(max(labels) + 1))
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    _check(data.name, groups, names, shots)
    if shots is None:
        return data
    chosen = _sample(groups, shots, random_state or random.Random(seed))
    note = f"{shots} shots per class, seed {seed}"
    if isinstance(data, ImageSet):
        return take_images(data, sorted(chosen), note)
    return take_features(data, sorted(chosen), note)


def coop_split(
    source: str | os.PathLike[str],
    shots: int | None,
    seed: int = 1,
    *,
    root: str | os.PathLike[str] | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The few-shot training and validation images that CoOp's code draws from a split file.

    The file (``split_zhou_*.json``) lists ``[path, label, class name]`` under ``train`` and
    ``val``, in an order that matters. As CoOp does it, one generator of ``seed`` first draws
    ``shots`` images of every training class, classes in order of appearance, then goes on to draw
    ``min(shots, 4)`` of every validation class.

    Differences: a class with fewer images than shots is an error here, where CoOp repeats images.
    Read from KaiyangZhou/Dassl.pytorch and KaiyangZhou/CoOp, not compared with a list of the
    images behind a published number (there is none): that nothing else draws from Python's
    generator between seeding and sampling there is **unverified**. ImageNet has no split file, and
    CoOp lists its folders in the order of the file system, which no seed repeats.

    Args:
        source: the split file, or a folder with one.
        shots: images per class; None keeps all.
        seed: CoOp's ``SEED`` (1, 2, 3 in the papers).
        root: folder that the paths are relative to; searched around the file if None.

    Returns:
        Training and validation images (sorted by path, like every image set).

    Raises:
        DataError: if the file has no ``train`` or ``val``, or images are missing from the disk.
        ValueError: as for :func:`few_shot`.
    """
    file = _split_file(Path(source).expanduser())
    generator = random.Random(seed)
    drawn = []
    for split, most in (("train", None), ("val", _VALIDATION_SHOTS)):
        images = load_images(file, split=split, root=root)
        where = {item.path: index for index, item in enumerate(images)}
        # The sort by path has to be undone before the draw.
        order = [str(path) for path, *_ in json.loads(file.read_bytes())[split]]
        absent = [path for path in order if path_text(path) not in where]
        if absent:
            raise DataError(
                f"{path_text(file)}: {len(absent)} images of {split!r} cannot be told apart or "
                f"found by their path (first {path_text(absent[0])})"
            )
        listed = take_images(images, [where[path_text(path)] for path in dict.fromkeys(order)])
        count = shots if shots is None or most is None else min(shots, most)
        chosen = few_shot(
            listed, count, seed, class_names=images.class_names, random_state=generator
        )
        back = sorted(range(len(chosen)), key=lambda i: where[chosen.items[i].path])
        drawn.append(dataclasses.replace(take_images(chosen, back), layout=chosen.layout))
    return drawn[0], drawn[1]


def write_split(path: str | os.PathLike[str], **splits: ImageSet) -> Path:
    """Write image sets as a split file: ``{split: [[path, label, class name], ...]}``.

    ``load_images(path, split="train", root=...)`` reads it back, so that a draw can be kept and
    shared (``split_fewshot/shot_16-seed_1.json``).

    Raises:
        ValueError: if a set has no labels or no class names.
        DataError: if the file cannot be written.
    """
    content = {}
    for split, images in splits.items():
        if images.class_names is None:
            raise ValueError(f"{split}: {images.name} has no class names; a split file needs them")
        labels = known_labels(images)
        content[split] = [
            [item.path, label, images.class_names[label]]
            for item, label in zip(images, labels, strict=True)
        ]
    lines = ",\n".join(
        f"{json.dumps(split)}: [\n"
        + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        + "\n]"
        for split, rows in content.items()
    )
    return write_text(path, f"{{\n{lines}\n}}\n")


def take_images(images: ImageSet, index: Sequence[int], note: str | None = None) -> ImageSet:
    """The images at ``index``, in that order."""
    layout = images.layout if note is None else f"{images.layout}; {note}"
    return dataclasses.replace(images, items=tuple(images.items[i] for i in index), layout=layout)


def take_features(data: FeatureSet, index: Sequence[int], note: str | None = None) -> FeatureSet:
    """The features at ``index``, in that order, as one chunk in memory."""
    rows = torch.as_tensor(list(index), dtype=torch.int64)
    chunk = FeatureChunk(0, data.image()[rows], _local_rows(data, rows) if data.has_local else None)
    return dataclasses.replace(
        data,
        paths=tuple(data.paths[i] for i in index),
        labels=None if data.labels is None else data.labels[rows.numpy()],
        chunks=(chunk,),
        provenance=data.provenance if note is None else {**data.provenance, "subset": note},
    )


def _local_rows(data: FeatureSet, rows: torch.Tensor) -> torch.Tensor:
    """Patch features of some rows, without reading the others."""
    first = data.chunks[0].local
    assert first is not None  # callers ask has_local
    out = first.new_empty(len(rows), *first.shape[1:])
    for chunk in data.chunks:
        assert chunk.local is not None
        here = ((rows >= chunk.start) & (rows < chunk.start + len(chunk.image))).nonzero()[:, 0]
        out[here] = chunk.local[rows[here] - chunk.start]
    return out


def labels_and_names(
    data: ImageSet | FeatureSet, class_names: Sequence[str] | None
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Labels (n,) int64 and the names they index: ``class_names``, or those of ``data``.

    Raises:
        ValueError: as ``known_labels``; no names, or a label without one.
    """
    labels = torch.tensor(known_labels(data), dtype=torch.int64)
    names = class_names if class_names is not None else data.class_names
    if not names:
        raise ValueError(f"{data.name}: has no class names; pass class_names")
    largest = int(labels.max())
    if largest >= len(names):
        raise ValueError(f"{data.name}: label {largest} has no name, there are {len(names)} names")
    return labels, tuple(names)


def known_labels(data: ImageSet | FeatureSet) -> list[int]:
    """The label of every image.

    Raises:
        ValueError: if the set is empty or an image has no label.
    """
    if isinstance(data, ImageSet):
        labels = [-1 if item.label is None else item.label for item in data]
    else:
        labels = [-1] * len(data) if data.labels is None else np.asarray(data.labels).tolist()
    if not labels:
        raise ValueError(f"{data.name}: expected at least one labelled image, the set is empty")
    without = [i for i, label in enumerate(labels) if label < 0]
    if without:
        first = (
            data.items[without[0]].path if isinstance(data, ImageSet) else data.paths[without[0]]
        )
        raise ValueError(
            f"{data.name}: {len(without)} of {len(labels)} images have no label (first {first}); "
            "each needs one: folders named after classes, or a list with labels"
        )
    return labels


def _check(
    where: str, groups: dict[int, list[int]], names: tuple[str, ...], shots: int | None
) -> None:
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise ValueError(f"shots: expected a number of images >= 1, or None for all, got {shots!r}")
    if max(groups) >= len(names):
        raise ValueError(f"{where}: label {max(groups)} has no name, there are {len(names)} names")
    counts = {name: len(groups.get(k, ())) for k, name in enumerate(names)}
    empty = [name for k, name in enumerate(names) if k not in groups]
    if empty:
        raise ValueError(
            f"{where}: {len(empty)} of {len(names)} classes have no image: {_some(empty)}; remove "
            "them from the class names or add images"
        )
    few = [
        f"{name} ({counts[name]})" for k, name in enumerate(names) if len(groups[k]) < (shots or 1)
    ]
    if few:
        raise ValueError(
            f"{where}: {len(few)} of {len(names)} classes have fewer than {shots} images: "
            f"{_some(few)}; ask for fewer shots"
        )


def _sample(groups: dict[int, list[int]], shots: int, generator: random.Random) -> list[int]:
    return [i for items in groups.values() for i in generator.sample(items, shots)]


def _split_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("split_zhou_*.json"))
        if len(files) != 1:
            raise DataError(
                f"{path_text(path)}: expected one split_zhou_*.json in the folder, found "
                f"{len(files)}; pass the file itself"
            )
        return files[0]
    if not path.is_file():
        raise DataError(f"{path_text(path)}: no such split file")
    return path


def _some(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
