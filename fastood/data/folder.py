"""A folder of images, with or without class subfolders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastood.data.classes import GENERIC, SPLITS, group_by_folder, is_named, match_names, some
from fastood.data.imageset import ImageItem, ImageSet
from fastood.data.paths import IMAGE_SUFFIXES, ReadFile, byte_order, path_text, unique_texts, walk
from fastood.errors import DataError

__all__ = ["describe_classes", "describe_others", "load_folder", "set_name"]

ClassNames = Sequence[str] | Mapping[str, str] | None

_WORDNET_ID = re.compile(r"n\d{8}")


def load_folder(
    root: Path, *, name: str | None, split: str | None, class_names: ClassNames, match: str
) -> ImageSet:
    """Images below ``root`` in byte order of their relative paths.

    Subfolders are classes unless they only hold the set (``images``) or are splits (``train``,
    ``val``, ``test``; choose with ``split``). ImageNet's WordNet folders get their names from
    CoOp's ``classnames.txt`` if that file lies at or above the folder.
    """
    where = path_text(root)
    found = walk(root)
    if not found.images:
        raise DataError(
            f"{where}: expected at least one image ({', '.join(sorted(IMAGE_SUFFIXES))}) in the "
            f"folder or below, found none{describe_others(found.others)}"
        )
    group = group_by_folder(found.images, split=split, where=where)
    paths = ["/".join(found.images[i]) for i in group.keep]
    labels: list[int | None] = [None] * len(paths)
    names: tuple[str, ...] | None = None
    words = ["folder"]
    empty: list[str] = []
    if group.folders is None:
        if class_names is not None:
            raise DataError(
                f"class_names: {where} has no class subfolders to match them with; images lie "
                "directly in it"
            )
        words = ["folder with images beside subfolders, no classes"] if group.mixed else words
    else:
        folders = list(dict.fromkeys(group.folders))
        depth, filled = len(group.prefix), set(folders)
        empty = [
            parts[depth]
            for parts in found.folders
            if len(parts) == depth + 1
            and parts[:depth] == group.prefix
            and parts[depth] not in filled
        ]
        given = class_names if class_names is not None else _wordnet_names(root, folders)
        # A class whose folder is empty may still be named; another empty folder needs no name.
        named = [f for f in empty if match == "name" and class_names and is_named(f, class_names)]
        pool = sorted([*folders, *named], key=byte_order)
        index, names = match_names(pool, given, match=match, where=where)
        labels = [index[f] for f in group.folders]
        words = [f"folder with {len(folders)} class subfolder{'s' * (len(folders) != 1)}"]
        if empty:
            words.append(f"class folders without images: {some(empty)}")
    items = tuple(
        ImageItem(path=text, read=ReadFile(root / path), file=root / path, label=label)
        for text, path, label in zip(unique_texts(paths), paths, labels, strict=True)
    )
    if group.split is not None:
        words.append(f"split {path_text(group.split)}")
    words[0] += describe_classes(items)
    layout = "; ".join(words) + describe_others(found.others)
    return ImageSet(name or set_name(root), where, items, names, layout, tuple(empty))


def set_name(root: Path) -> str:
    """A short name for tables: the first folder upwards that is no ``images`` and no split."""
    for folder in (root.absolute(), *root.absolute().parents):
        if folder.name and folder.name.lower() not in GENERIC | SPLITS.keys():
            return path_text(folder.name)
    return path_text(root)


def describe_classes(items: Sequence[ImageItem]) -> str:
    """`` , 5640 images (120 per class)``-like words for the layout text."""
    text = f", {len(items)} image{'s' * (len(items) != 1)}"
    counts = Counter(item.label for item in items if item.label is not None)
    if not counts:
        return text
    low, high = min(counts.values()), max(counts.values())
    return f"{text} ({low if low == high else f'{low} to {high}'} per class)"


def describe_others(others: Mapping[str, int]) -> str:
    """What was ignored, by extension, so that nothing disappears without a word."""
    if not others:
        return ""
    counts = sorted(others.items())
    kinds = ", ".join(f"{n} {path_text(s) or 'without extension'}" for s, n in counts)
    total = sum(others.values())
    return f"; {total} other file{'s' * (total != 1)} ignored ({kinds})"


def _wordnet_names(root: Path, folders: Sequence[str]) -> dict[str, str] | None:
    """``{wnid: name}`` in file order from CoOp's classnames.txt, for the folders at hand."""
    if not all(_WORDNET_ID.fullmatch(f) for f in folders):
        return None
    for folder in [root, *list(root.absolute().parents)[:3]]:
        file = folder / "classnames.txt"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            pairs = [line.split(None, 1) for line in lines if line.strip()]
            known = {p[0]: p[1].strip() for p in pairs if len(p) == 2}
            if all(f in known for f in folders):
                return {wnid: known[wnid] for wnid in known if wnid in set(folders)}
    return None
