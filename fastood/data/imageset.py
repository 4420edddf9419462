"""A set of images on disk (or in an archive): names and bytes, nothing decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ImageItem", "ImageSet"]


@dataclass(frozen=True)
class ImageItem:
    """One image that can be read when needed.

    Attributes:
        path: what the user recognises it by: a file path relative to the set's root, or
            ``shard.tar!member``; unique within a set and the sort key.
        read: returns the encoded bytes.
        file: the plain file behind it if there is one, so that size and mtime can stand in for a
            known content digest.
        part: which part of ``file`` it is (a tar member), None for the whole file.
        label: class index into ``ImageSet.class_names``, or None.
    """

    path: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    file: Path | None = None
    label: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images sorted by path, with class names where the layout gives them.

    Attributes:
        name: short name for tables, for example ``"dtd"``.
        root: where it came from, for provenance.
        items: sorted by ``path``.
        class_names: as found on disk, or None.
        layout: what was recognised, in words ("folder with 47 class subfolders").
        without_images: class folders in which there is no image.
    """

    name: str
    root: str
    items: tuple[ImageItem, ...]
    class_names: tuple[str, ...] | None = None
    layout: str = "folder"
    without_images: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[ImageItem]:
        return iter(self.items)

    def class_counts(self) -> dict[str, int]:
        """Images per class name, zero for a class without any; empty without class names.

        Names that occur twice (ImageNet's "missile") are counted together.
        """
        names = self.class_names or ()
        counts = dict.fromkeys(names, 0)
        for item in self.items:
            if item.label is not None and item.label < len(names):
                counts[names[item.label]] += 1
        return counts
