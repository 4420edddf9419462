"""File names as text, image suffixes, and a directory walk that always gives the same order."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastood.errors import DataError

__all__ = [
    "FEATURE_SUFFIXES",
    "IMAGE_SUFFIXES",
    "ReadFile",
    "Walk",
    "byte_order",
    "is_hidden",
    "is_image_name",
    "path_text",
    "refuse_folder",
    "unique_texts",
    "walk",
]

IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "avif"),
    )
)

FEATURE_SUFFIXES = (".npz", ".npy", ".safetensors")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"})


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as one line of printable text.

    Bytes that are not UTF-8 and control characters (a newline breaks tables, an escape sequence
    takes over terminals) become ``\\xff``-style escapes.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def refuse_folder(path: str | os.PathLike[str], expected: str, inside: Sequence[str] = ()) -> None:
    """Refuse a folder where a file is meant.

    Args:
        expected: what the file would be.
        inside: names of such files; those that lie in the folder are proposed.
    Raises:
        DataError: ``path`` is a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    there = [path_text(folder / name) for name in inside if (folder / name).is_file()]
    hint = f"; did you mean {' or '.join(there)}?" if there else ""
    raise DataError(f"{path_text(path)}: expected {expected}, got a folder{hint}")


def byte_order(path: str) -> bytes:
    """Sort key: the bytes of the name, the same on every machine and in every locale."""
    return os.fsencode(path)


def is_hidden(name: str) -> bool:
    """True for dot files and the droppings of operating systems."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image_name(name: str) -> bool:
    """True if the extension, in any case, is one of an image format."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and dot) and suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class ReadFile:
    """``ImageItem.read`` for a plain file."""

    path: Path

    def __call__(self) -> bytes:
        return self.path.read_bytes()


def unique_texts(paths: Iterable[str]) -> list[str]:
    """Texts of the paths; the rare two names that escape to the same text get a counter."""
    seen: Counter[str] = Counter()
    texts = []
    for path in paths:
        text = path_text(path)
        seen[text] += 1
        texts.append(text if seen[text] == 1 else f"{text} [{seen[text]}]")
    return texts


@dataclass
class Walk:
    """What lies under a folder.

    Attributes:
        images: parts of the relative path of every file with an image extension, in byte order.
        folders: parts of every folder seen, also empty ones.
        others: extension (with dot, lower case, "" for none) → how many other files there are.
    """

    images: list[tuple[str, ...]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def walk(root: Path) -> Walk:
    """Everything below ``root``; follows links, but never into a folder it is already inside.

    Raises:
        DataError: if a folder cannot be listed (a result without it would be silently smaller).
    """
    found = Walk()
    stack: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
    while stack:
        parts, above = stack.pop()
        folder = root.joinpath(*parts)
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            if parts:
                found.folders.append(parts)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if _holds(entry.is_dir):
                        stack.append(((*parts, entry.name), above | {here}))
                    elif is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
                        # A dangling link is kept: it is reported as unreadable, not forgotten.
                        found.images.append((*parts, entry.name))
                    elif _holds(entry.is_file):
                        found.others[Path(entry.name).suffix.lower()] += 1
        except OSError as error:
            raise DataError(
                f"cannot list the folder {path_text(folder)}: {error.strerror or error}"
            ) from error
    found.images.sort(key=_parts_order)
    found.folders.sort(key=_parts_order)
    return found


def _holds(check: Callable[[], bool]) -> bool:
    """``entry.is_dir`` and the like; a link to itself leads nowhere, as one without a target."""
    try:
        return check()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _parts_order(parts: Sequence[str]) -> bytes:
    return byte_order("/".join(parts))
