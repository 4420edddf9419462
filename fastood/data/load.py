"""One function that turns whatever a user has into an :class:`ImageSet`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastood.data.folder import ClassNames, load_folder
from fastood.data.hub import is_hub_dataset, load_hub_dataset
from fastood.data.imageset import ImageSet
from fastood.data.layouts import recognise
from fastood.data.lists import load_list_file, load_paths, load_split_file
from fastood.data.paths import FEATURE_SUFFIXES, is_image_name, path_text
from fastood.data.shards import find_shards, is_shard_name, load_shards
from fastood.errors import DataError

__all__ = ["load_images"]


def load_images(
    source: Any,
    *,
    name: str | None = None,
    split: str | None = None,
    class_names: ClassNames = None,
    limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
    match: str = "name",
) -> ImageSet:
    """Find the images of a set, in an order that depends on their paths alone.

    Args:
        source: a folder (with or without class subfolders), a ``path label`` list (``.txt``) or
            CSV, a CoOp ``split_zhou_*.json`` or a folder with one, a tar shard or a glob or brace
            pattern of shards (``data-{000..012}.tar``), one image file, a list of image files,
            or a Hugging Face ``datasets.Dataset``.
        name: name for tables; taken from the path if None.
        split: which split, where the source has several.
        class_names: names in label order, or a mapping folder → name. They must pair up one to
            one with the classes found (case, ``_``, ``-`` and spaces do not matter).
        limit: use at most this many images, evenly spaced over the sorted list.
        root: folder that the paths of a list are relative to; searched around the list if None.
        match: ``"name"``, or ``"order"`` to pair ``class_names`` with the sorted class folders.

    Returns:
        The set; ``layout`` says in words what was recognised, ignored and missing.

    Raises:
        DataError: if the source is missing, unreadable, of unknown kind, holds no image, holds
            several sets, or does not fit ``class_names``.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 image, got {limit}")
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a list of names, got the text {class_names!r}")
    base = None if root is None else Path(root).expanduser()
    options: dict[str, Any] = {"name": name, "class_names": class_names}
    if isinstance(source, ImageSet):
        images = source
    elif is_hub_dataset(source):
        images = load_hub_dataset(source, split=split, **options)
    elif isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):  # Path("") is the working folder: an unset variable in a script
            raise DataError("source: expected a path, got an empty text")
        images = _from_path(Path(source).expanduser(), split, base, match, options)
    elif isinstance(source, Sequence) and all(isinstance(p, (str, os.PathLike)) for p in source):
        images = load_paths(source, **options)
    else:
        raise TypeError(
            "source: expected a path, a list of paths, an ImageSet or a Hugging Face Dataset, got "
            f"{type(source).__name__}"
        )
    return images if limit is None else _limited(images, limit)


def _from_path(
    path: Path, split: str | None, root: Path | None, match: str, options: dict[str, Any]
) -> ImageSet:
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise DataError(f"{path_text(path)}: {error.strerror or error}") from error
    if folder:
        return _from_folder(path, split, root, match, options)
    suffix = path.suffix.lower()
    if is_shard_name(path.name) and (file or any(c in str(path) for c in "{*?[")):
        shards = [path] if file else find_shards(str(path))
        return load_shards(shards, split=split, match=match, **options)
    if not file:
        raise DataError(_missing(path))
    if suffix == ".json":
        return load_split_file(path, split=split, root=root, match=match, **options)
    if split is not None:
        raise DataError(f"split: {path_text(path)} has no splits, got split={split!r}")
    if suffix in (".txt", ".csv", ".lst"):
        return load_list_file(path, root=root, match=match, **options)
    if is_image_name(path.name):
        return load_paths([path], **options)
    if suffix in FEATURE_SUFFIXES:
        raise DataError(f"{path_text(path)}: holds features, not images; use load_features")
    raise DataError(
        f"{path_text(path)}: expected a folder, a list (.txt, .csv), a CoOp split (.json), a tar "
        "shard (.tar, .tar.gz) or an image"
        + ("; unpack the archive first" if suffix in (".zip", ".rar", ".7z", ".gz") else "")
    )


def _from_folder(
    path: Path, split: str | None, root: Path | None, match: str, options: dict[str, Any]
) -> ImageSet:
    layout = recognise(path)
    if layout is not None and len({s.name for s in layout.sets}) > 1:
        sets = ", ".join(s.name for s in layout.sets[:12])
        raise DataError(
            f"{path_text(path)}: is a collection ({layout.name}) of several sets, pass one of "
            f"them: {sets}{' ...' if len(layout.sets) > 12 else ''}"
        )
    files = sorted(path.glob("split_zhou_*.json"))
    if len(files) == 1:
        return load_split_file(files[0], split=split, root=root, match=match, **options)
    images = load_folder(path, split=split, match=match, **options)
    if layout is None:
        return images
    return dataclasses.replace(images, layout=f"{layout.name}: {images.layout}")


def _missing(path: Path) -> str:
    """The message for a path that does not exist, with the nearest thing that does."""
    parent = path.absolute().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = path.absolute().relative_to(parent).parts[0]
    try:
        near = difflib.get_close_matches(wanted, os.listdir(parent), n=3)  # noqa: PTH208 - names
    except OSError:
        near = []
    text = f"{path_text(path)}: no such file or folder; {path_text(parent)} exists"
    return f"{text}, did you mean {' or '.join(map(path_text, near))}?" if near else text


def _limited(images: ImageSet, limit: int) -> ImageSet:
    n = len(images)
    if n <= limit:
        return images
    items = tuple(images.items[i * n // limit] for i in range(limit))
    layout = f"{images.layout}; limited to {limit} of {n} images, evenly spaced"
    return dataclasses.replace(images, items=items, layout=layout)
