"""Tar shards (webdataset): indexed once, members read by their offset."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastood.data.classes import group_by_folder, match_names, names_of_numbers, some
from fastood.data.folder import ClassNames, describe_classes, describe_others
from fastood.data.imageset import ImageItem, ImageSet
from fastood.data.paths import byte_order, is_hidden, is_image_name, path_text, unique_texts
from fastood.errors import DataError

__all__ = ["expand_braces", "find_shards", "is_shard_name", "load_shards"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 100_000


def is_shard_name(name: str) -> bool:
    """True for ``.tar`` and compressed tar archives."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def expand_braces(pattern: str) -> list[str]:
    """``a{000..002}.tar`` and ``{x,y}.tar`` as webdataset writes them; ranges keep their zeros."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inner = found.group(1)
    bounds = _RANGE.fullmatch(inner)
    if bounds:
        low, high = (int(b) for b in bounds.groups())
        if not 0 <= high - low < _MOST_SHARDS:
            raise DataError(f"{pattern}: the range {{{inner}}} is empty or too long")
        choices = [f"{i:0{len(bounds.group(1))}d}" for i in range(low, high + 1)]
    else:
        choices = inner.split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def find_shards(pattern: str) -> list[Path]:
    """Shards that a path, glob or brace pattern stands for.

    Raises:
        DataError: if one that a brace pattern names does not exist, or a glob finds none.
    """
    shards: list[Path] = []
    for path in expand_braces(pattern):
        if any(c in path for c in "*?["):
            shards += (Path(p) for p in glob.glob(path, recursive=True))  # noqa: PTH207 - absolute
        else:
            shards.append(Path(path))
    missing = [p for p in shards if not p.is_file()]
    if missing or not shards:
        raise DataError(
            f"{path_text(pattern)}: expected tar shards, "
            + (f"missing: {some([str(p) for p in missing])}" if missing else "none found")
        )
    return sorted(set(shards), key=lambda p: byte_order(str(p)))


class _Source:
    """Random access into a shard; a compressed one is unpacked to a temporary file once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._plain: Any = None
        if not path.name.lower().endswith(".tar"):
            self._plain = tempfile.TemporaryFile(prefix="fastood-")  # noqa: SIM115 - lives on
            _decompress(path, self._plain)

    def open(self) -> tarfile.TarFile:
        if self._plain is None:
            return tarfile.open(self.path, "r:")
        self._plain.seek(0)
        return tarfile.open(fileobj=self._plain, mode="r:")

    def read(self, offset: int, size: int) -> bytes:
        if self._plain is None:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        else:
            with self._lock:
                self._plain.seek(offset)
                data = self._plain.read(size)
        if len(data) != size:
            raise OSError(f"the shard ends after {len(data)} of {size} bytes of this member")
        return bytes(data)


def _decompress(path: Path, target: Any) -> None:
    import bz2
    import gzip
    import lzma
    import shutil

    name = path.name.lower()
    opener: Callable[[Path], Any] = (
        bz2.open if name.endswith("bz2") else lzma.open if name.endswith("xz") else gzip.open
    )
    try:
        with opener(path) as packed:
            shutil.copyfileobj(packed, target, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path_text(path)}: cannot be unpacked: {error}") from error


@dataclass(frozen=True)
class _ReadMember:
    """``ImageItem.read`` for one member of a shard."""

    source: _Source
    offset: int
    size: int

    def __call__(self) -> bytes:
        return self.source.read(self.offset, self.size)


@dataclass
class _Member:
    shard: Path
    name: str
    read: _ReadMember
    label: int | None = None
    class_name: str | None = None


def _index(path: Path, others: Counter[str]) -> list[_Member]:
    """Image members of one shard with the labels beside them."""
    source = _Source(path)
    files: dict[str, _ReadMember] = {}
    try:
        with source.open() as archive:
            for info in archive:
                name = info.name.removeprefix("./")
                if any(is_hidden(part) for part in name.split("/")):
                    continue
                if info.isreg() and not info.issparse():
                    files[name] = _ReadMember(source, info.offset_data, info.size)
                elif info.islnk() and info.linkname.removeprefix("./") in files:
                    files[name] = files[info.linkname.removeprefix("./")]
            _check_end(archive)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path_text(path)}: not a complete tar archive: {error}; was the download cut short?"
        ) from error
    images = {n: _Member(path, n, read) for n, read in files.items() if is_image_name(n)}
    by_sample: dict[str, list[_Member]] = {}
    for member in images.values():
        by_sample.setdefault(_sample(member.name), []).append(member)
    for name, read in files.items():
        if name in images:
            continue
        kind = name.rpartition(".")[2].lower()
        samples = by_sample.get(_sample(name), [])
        if kind in ("cls", "json") and samples:
            label, class_name = _sidecar(kind, read(), f"{path_text(path)}!{path_text(name)}")
            for member in samples:
                member.label = label if label is not None else member.label
                member.class_name = class_name if class_name is not None else member.class_name
        elif not samples:
            others[Path(name).suffix.lower()] += 1
    return list(images.values())


def _check_end(archive: Any) -> None:
    """tarfile takes a header it cannot read for the end, and whatever follows would be lost."""
    archive.fileobj.seek(archive.offset)
    if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _sample(name: str) -> str:
    """webdataset's key: everything up to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _sidecar(kind: str, data: bytes, where: str) -> tuple[int | None, str | None]:
    try:
        if kind == "cls":
            text = data.decode().strip()
            return (int(text), None) if text.removeprefix("-").isdecimal() else (None, text)
        content = json.loads(data)
        if not isinstance(content, dict):
            return None, None
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{where}: cannot be read as a label: {error}") from error
    label = class_name = None
    for key in ("label", "cls", "class_id", "target", "class_name", "classname", "class"):
        value = content.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and label is None:
            label = value
        elif isinstance(value, str) and class_name is None:
            class_name = value
    return label, class_name


def load_shards(
    shards: Sequence[Path],
    *,
    name: str | None,
    split: str | None,
    class_names: ClassNames,
    match: str,
) -> ImageSet:
    """Images in one or more tar archives.

    Labels come from ``.cls`` or ``.json`` members of the same sample, else from class folders
    inside the archive (same rules as on disk, split folders included).
    """
    others: Counter[str] = Counter()
    base = Path(os.path.commonpath([s.absolute().parent for s in shards]))
    members = [m for shard in shards for m in _index(shard, others)]
    members.sort(key=lambda m: (byte_order(str(m.shard)), byte_order(m.name)))
    where = path_text(shards[0]) if len(shards) == 1 else f"{len(shards)} shards in {base}"
    if not members:
        raise DataError(f"{where}: expected images, found none{describe_others(others)}")
    words = [f"tar shard{'s' * (len(shards) != 1)} ({len(shards)})"]
    members, labels, names, taken = _shard_labels(members, split, class_names, match, where)
    texts = unique_texts(
        f"{m.shard.absolute().relative_to(base).as_posix()}!{m.name}" for m in members
    )
    items = tuple(
        ImageItem(path=text, read=m.read, file=m.shard.absolute(), label=label, part=m.name)
        for text, m, label in zip(texts, members, labels, strict=True)
    )
    if taken is not None:
        words.append(f"split {taken}")
    words[0] += describe_classes(items)
    layout = "; ".join(words) + describe_others(others)
    stem = re.sub(r"(\.tar)?(\.(gz|bz2|xz)|gz)?$|\.tgz$", "", shards[0].name)
    default = path_text(stem if len(shards) == 1 else base.name)
    return ImageSet(name or default, where, items, names, layout)


def _shard_labels(
    members: list[_Member], split: str | None, class_names: ClassNames, match: str, where: str
) -> tuple[list[_Member], list[int | None], tuple[str, ...] | None, str | None]:
    sidecars = any(m.label is not None or m.class_name is not None for m in members)
    parts = [tuple(m.name.split("/")) for m in members]
    group = group_by_folder(parts, split=split, where=where)
    members = [members[i] for i in group.keep]
    if not sidecars:
        if group.folders is None:
            if class_names is not None:
                raise DataError(f"class_names: {where} has neither labels nor class folders")
            return members, [None] * len(members), None, group.split
        folders = sorted(set(group.folders), key=byte_order)
        index, names = match_names(folders, class_names, match=match, where=where)
        return members, [index[f] for f in group.folders], names, group.split
    numbers = [m.label for m in members]
    if all(n is None for n in numbers):
        found = sorted({m.class_name for m in members if m.class_name is not None}, key=byte_order)
        index, names = match_names(found, class_names, match=match, where=where)
        return (
            members,
            [None if m.class_name is None else index[m.class_name] for m in members],
            names,
            group.split,
        )
    labels = [n if n is not None and n >= 0 else None for n in numbers]
    if class_names is not None:
        return members, labels, names_of_numbers(class_names, labels, where), group.split
    top = max((n for n in labels if n is not None), default=-1)
    own = {m.label: m.class_name for m in members if m.label is not None and m.class_name}
    if sorted(own) == list(range(top + 1)) and own:
        return members, labels, tuple(str(own[i]) for i in range(top + 1)), group.split
    return members, labels, None, group.split
