"""Class labels: from subfolders, and names given by the user matched to what is on disk."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastood.data.paths import byte_order, path_text
from fastood.errors import DataError

__all__ = [
    "GENERIC",
    "SPLITS",
    "Grouping",
    "group_by_folder",
    "is_named",
    "match_names",
    "names_of_numbers",
    "pick_split",
    "plain_name",
    "some",
]

GENERIC = frozenset({"images", "image", "imgs", "img", "jpegimages", "jpg", "data", "pictures"})
"""Folder names that hold a data set rather than name a class."""

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Folder names that hold a split, and the split they mean."""


@dataclass(frozen=True)
class Grouping:
    """Which images belong to the set and which class folder each lies in.

    Attributes:
        keep: indices of the images that belong to the set.
        folders: class folder of each kept image, or None if the set has no class folders.
        prefix: folders above the classes that only hold the set ("images", "val").
        split: the split that was taken, or None.
        mixed: True if images lie both beside subfolders and inside them.
    """

    keep: list[int]
    folders: list[str] | None
    prefix: tuple[str, ...]
    split: str | None
    mixed: bool = False


def pick_split(present: Sequence[str], split: str | None, where: str) -> str:
    """The entry of ``present`` that ``split`` means; the only one if ``split`` is None.

    Raises:
        DataError: if it is missing, or if several are there and none was asked for.
    """
    if split is None:
        if len(present) == 1:
            return present[0]
        raise DataError(
            f"{where} has the splits {', '.join(sorted(present))}; say which one with split="
        )
    if split in present:
        return split
    meaning = SPLITS.get(split.lower())
    alias = [p for p in present if meaning is not None and SPLITS.get(p.lower()) == meaning]
    if len(alias) == 1:
        return alias[0]
    raise DataError(
        f"split: {where} has {', '.join(sorted(present)) or 'no splits'}, got {split!r}"
    )


def group_by_folder(
    images: Sequence[tuple[str, ...]], *, split: str | None, where: str
) -> Grouping:
    """Find the class folders in a list of relative paths.

    Descends through folders that only hold the set ("images") and through split folders; what
    branches below is a class folder. Images lying directly there mean a set without classes.
    """
    keep = list(range(len(images)))
    prefix: tuple[str, ...] = ()
    taken: str | None = None
    folders: list[str] | None = None
    mixed = False
    while True:
        depth = len(prefix)
        tops = {images[i][depth] for i in keep if len(images[i]) > depth + 1}
        direct = any(len(images[i]) == depth + 1 for i in keep)
        splits = [t for t in tops if t.lower() in SPLITS]
        # Without being asked, a lone "test" beside images is a folder like any other.
        only = len(splits) == len(tops) and (len(splits) > 1 or not direct)
        if taken is None and splits and (split is not None or only):
            taken = step = pick_split(splits, split, where)
        elif direct:
            mixed = bool(tops)
            break
        elif len(tops) == 1 and next(iter(tops)).lower() in GENERIC:
            step = next(iter(tops))
        else:
            folders = [images[i][depth] for i in keep]
            break
        keep = [i for i in keep if images[i][depth] == step]
        prefix = (*prefix, step)
    if split is not None and taken is None:
        raise DataError(
            f"split: {where} has no split folders (train, val, test), got split={split!r}"
        )
    return Grouping(keep, folders, prefix, taken, mixed)


def plain_name(name: str) -> str:
    """What must agree for two names to be the same class: letters and digits, not spelling."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(text.replace("_", " ").replace("-", " ").replace("/", " ").split())


def is_named(folder: str, given: Sequence[str] | Mapping[str, str]) -> bool:
    """True if the class names given have one for this folder."""
    if isinstance(given, Mapping):
        return folder in given
    return plain_name(path_text(folder)) in {plain_name(name) for name in given}


def match_names(
    found: Sequence[str],
    given: Sequence[str] | Mapping[str, str] | None,
    *,
    match: str = "name",
    where: str,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Give every class found on disk its index into the class names.

    Args:
        found: class folders (or class names of a split file), each once, in order.
        given: None: the names found are the class names. A list: the class names, in the order
            the labels shall have. A mapping: folder → class name.
        match: ``"name"`` pairs by name (case, ``_``, ``-`` and spaces do not matter);
            ``"order"`` pairs the i-th name with the i-th folder in byte order.
        where: what is being read, for messages.

    Returns:
        ``({found: label}, class_names)``.

    Raises:
        DataError: if names and folders do not pair up one to one; lists the difference.
    """
    if match not in ("name", "order"):
        raise ValueError(f"match: expected 'name' or 'order', got {match!r}")
    if given is None:
        return {f: i for i, f in enumerate(found)}, tuple(path_text(f) for f in found)
    if isinstance(given, Mapping):
        index = {key: i for i, key in enumerate(given)}
        unnamed = [f for f in found if f not in index]
        if unnamed:
            raise DataError(
                f"class_names: the mapping names {len(index)} folders, but {where} also has "
                f"{some(unnamed)}"
            )
        return {f: index[f] for f in found}, tuple(given.values())
    names = tuple(given)
    if match == "order":
        if len(names) != len(found):
            raise DataError(
                f"class_names: expected {len(found)} names, one for each class of {where}, got "
                f"{len(names)}"
            )
        return {f: i for i, f in enumerate(sorted(found, key=byte_order))}, names
    return _pair(found, names, where), names


def names_of_numbers(
    given: Sequence[str] | Mapping[str, str], labels: Sequence[int | None], where: str
) -> tuple[str, ...]:
    """The class names given, for a set whose labels are bare numbers into them.

    Raises:
        DataError: if there are no labels, or fewer names than they need.
    """
    names = tuple(given.values() if isinstance(given, Mapping) else given)
    top = max((label for label in labels if label is not None), default=None)
    if top is None:
        raise DataError(f"class_names: {where} has no labels to match them with")
    if top >= len(names):
        raise DataError(
            f"class_names: {where} has labels up to {top}, which needs {top + 1} names, got "
            f"{len(names)}"
        )
    return names


def _pair(found: Sequence[str], names: tuple[str, ...], where: str) -> dict[str, int]:
    by_plain: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_plain.setdefault(plain_name(name), []).append(i)
    labels: dict[str, int] = {}
    used: set[int] = set()
    unnamed: list[str] = []
    ambiguous: list[str] = []
    for folder in found:
        hits = by_plain.get(plain_name(path_text(folder)), [])
        if len(hits) > 1:  # the exact spelling may still decide
            hits = [i for i in hits if names[i] == folder] or hits
        if len(hits) == 1 and hits[0] not in used:
            labels[folder] = hits[0]
            used.add(hits[0])
        elif hits:
            ambiguous.append(folder)
        else:
            unnamed.append(folder)
    unfound = [name for i, name in enumerate(names) if i not in used]
    if not (unnamed or ambiguous or unfound):
        return labels
    parts = [f"class_names: the {len(names)} names given do not match the {len(found)} classes "
             f"of {where}"]  # fmt: skip
    if unnamed:
        parts.append(f"classes without a name: {some(unnamed)}")
    if ambiguous:
        parts.append(f"classes that fit several names or share one: {some(ambiguous)}")
    if unfound:
        parts.append(f"names without a class: {some(unfound)}")
    parts.append(
        "give a mapping folder → name, or match='order' to pair them in byte order of the folders"
    )
    raise DataError("; ".join(parts))


def some(names: Sequence[str | os.PathLike[str]], most: int = 5) -> str:
    shown = ", ".join(path_text(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
