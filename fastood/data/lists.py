"""Sets given as lists: ``path label`` files, CSV, CoOp split files, or Python lists of paths."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastood.data.classes import match_names, pick_split, some
from fastood.data.folder import ClassNames, describe_classes, set_name
from fastood.data.imageset import ImageItem, ImageSet
from fastood.data.paths import ReadFile, byte_order, is_image_name, path_text, unique_texts
from fastood.errors import DataError

__all__ = ["load_list_file", "load_paths", "load_split_file"]


@dataclass(frozen=True)
class _Entry:
    path: str
    label: int | None
    class_name: str | None = None


def load_list_file(
    file: Path,
    *,
    name: str | None,
    class_names: ClassNames,
    root: Path | None,
    match: str,
) -> ImageSet:
    """``path label`` lines (OpenOOD) or CSV ``path,label``; the label may be missing.

    Paths are relative to ``root``, or to the folder around the list that holds most of them.
    Negative labels (OpenOOD's mark for OOD) mean "no label".
    """
    entries = _read_csv(file) if file.suffix.lower() == ".csv" else _read_lines(file)
    if not entries:
        raise DataError(f"{path_text(file)}: expected 'path label' lines, the file has none")
    kind = "CSV list" if file.suffix.lower() == ".csv" else "list file"
    return _build(
        entries,
        file=file,
        name=name or path_text(file.stem),
        class_names=class_names,
        base=_find_root(entries, file, root),
        kind=kind,
        match=match,
    )


def load_split_file(
    file: Path,
    *,
    name: str | None,
    split: str | None,
    class_names: ClassNames,
    root: Path | None,
    match: str,
) -> ImageSet:
    """A CoOp split file: ``{split: [[path, label, class name], ...]}``."""
    where = path_text(file)
    try:
        content = json.loads(file.read_bytes())
        present = [key for key, rows in content.items() if isinstance(rows, list)]
        chosen = pick_split(present, split, where)
        entries = [_Entry(str(p), int(label), str(c)) for p, label, c in content[chosen]]
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: expected a CoOp split file, {{split: [[path, label, class name], ...]}}; "
            f"{error}"
        ) from error
    if not entries:
        raise DataError(f"{where}: the split {chosen!r} is empty")
    return _build(
        entries,
        file=file,
        name=name or set_name(file.parent),
        class_names=class_names,
        base=_find_root(entries, file, root),
        kind=f"CoOp split file {path_text(file.name)}, split {chosen}",
        match=match,
    )


def load_paths(
    paths: Sequence[str | os.PathLike[str]], *, name: str | None, class_names: ClassNames
) -> ImageSet:
    """A Python list of image files; no labels."""
    if not paths:
        raise DataError("source: expected at least one path, got an empty list")
    if class_names is not None:
        raise DataError("class_names: a list of paths has no classes to match them with")
    absolute = [Path(p).expanduser().absolute() for p in paths]
    base = Path(os.path.commonpath([p.parent for p in absolute]))
    folders = [p for p in absolute if p.is_dir()]
    if folders:
        raise DataError(
            f"source: expected image files in the list, got the folder {path_text(folders[0])}"
        )
    entries = [_Entry(p.relative_to(base).as_posix(), None) for p in absolute]
    return _build(
        entries, file=base, name=name or set_name(base), class_names=None, base=base,
        kind="list of paths", match="name",
    )  # fmt: skip


def _read_lines(file: Path) -> list[_Entry]:
    # surrogateescape: a path that is not UTF-8 must come back as the bytes it is on disk
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    entries = []
    for line in text.splitlines():
        line = line.strip()
        if not line:
            continue
        path, _, last = line.rpartition(" ") if " " in line else line.rpartition("\t")
        if path and _is_int(last):
            entries.append(_Entry(path.strip(), _label(int(last))))
        else:
            entries.append(_Entry(line, None))
    return entries


def _read_csv(file: Path) -> list[_Entry]:
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    rows = [row for row in csv.reader(text.splitlines()) if row and row[0].strip()]
    if rows and not is_image_name(rows[0][0].strip()) and "/" not in rows[0][0]:
        rows = rows[1:]  # a header: its first cell is no path
    entries = []
    for row in rows:
        label = row[1].strip() if len(row) > 1 else ""
        if not label:
            entries.append(_Entry(row[0].strip(), None))
        elif _is_int(label):
            entries.append(_Entry(row[0].strip(), _label(int(label))))
        else:
            entries.append(_Entry(row[0].strip(), None, label))
    named = sorted({e.class_name for e in entries if e.class_name is not None}, key=byte_order)
    if not named:
        return entries
    if any(e.label is not None for e in entries):
        raise DataError(
            f"{path_text(file)}: expected labels that are all numbers or all class names, got "
            f"both (for example {named[0]!r})"
        )
    index = {n: i for i, n in enumerate(named)}
    return [
        _Entry(e.path, None if e.class_name is None else index[e.class_name], e.class_name)
        for e in entries
    ]


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _label(value: int) -> int | None:
    return value if value >= 0 else None


def _find_root(entries: Sequence[_Entry], file: Path, root: Path | None) -> Path:
    """The folder the paths are relative to: the one under which most of a sample exists."""
    if root is not None:
        if not root.is_dir():
            raise DataError(f"root: expected a folder, got {path_text(root)}")
        return root
    folder = file.absolute().parent
    around = [folder, *list(folder.parents)[:4]]
    known = ("images", "jpg", "data", "images_classic", "images_largescale")
    candidates = [*around, *(a / k for a in around for k in known)]
    candidates += sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.name)[:200]
    step = max(1, len(entries) // 50)
    sample = [e.path for e in entries[::step]]
    best, hits = folder, 0
    for candidate in candidates:
        if candidate.is_dir():
            n = sum((candidate / path).is_file() for path in sample)
            if n > hits:
                best, hits = candidate, n
    return best


def _build(
    entries: Sequence[_Entry],
    *,
    file: Path,
    name: str,
    class_names: ClassNames,
    base: Path,
    kind: str,
    match: str,
) -> ImageSet:
    where = path_text(file)
    unique: dict[str, _Entry] = {}
    repeated = 0
    for entry in entries:
        if (first := unique.setdefault(entry.path, entry)) is not entry:
            repeated += 1
            if first.label != entry.label:
                raise DataError(
                    f"{where}: {path_text(entry.path)} is listed with the labels {first.label} "
                    f"and {entry.label}"
                )
    ordered = sorted(unique.values(), key=lambda e: byte_order(e.path))
    labels, names = _labels(ordered, class_names, match, where)
    files = [base / e.path for e in ordered]
    missing = [e.path for e, f in zip(ordered, files, strict=True) if not f.is_file()]
    if len(missing) == len(ordered):
        raise DataError(
            f"{where}: none of its {len(ordered)} images exists under {path_text(base)} (first: "
            f"{path_text(missing[0])}); pass root= with the folder the paths are relative to"
        )
    items = tuple(
        ImageItem(path=text, read=ReadFile(f), file=f, label=label)
        for text, f, label in zip(unique_texts(e.path for e in ordered), files, labels, strict=True)
    )
    layout = kind + describe_classes(items)
    if base != file.absolute().parent and base != file:
        layout += f"; images under {path_text(base)}"
    if repeated:
        layout += f"; {repeated} repeated line{'s' * (repeated != 1)} left out"
    if missing:
        layout += f"; {len(missing)} missing file{'s' * (len(missing) != 1)}: {some(missing, 3)}"
    return ImageSet(name, path_text(base), items, names, layout)


def _labels(
    entries: Sequence[_Entry], class_names: ClassNames, match: str, where: str
) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Labels and class names, from the list's own names, the given ones, or both."""
    labels = [e.label for e in entries]
    own: dict[int, str] = {}
    for entry in entries:
        if entry.class_name is None or entry.label is None:
            continue
        if own.setdefault(entry.label, entry.class_name) != entry.class_name:
            raise DataError(
                f"{where}: label {entry.label} has the class names {own[entry.label]!r} and "
                f"{entry.class_name!r}"
            )
    if own:
        found = [own[label] for label in sorted(own)]
        if class_names is None and sorted(own) == list(range(len(own))):
            return labels, tuple(found)
        index, names = match_names(found, class_names, match=match, where=where)
        return [None if e.class_name is None else index[e.class_name] for e in entries], names
    if class_names is None:
        return labels, None
    names = tuple(class_names.values() if isinstance(class_names, dict) else class_names)
    top = max((label for label in labels if label is not None), default=None)
    if top is None:
        raise DataError(f"class_names: {where} has no labels to match them with")
    if top >= len(names):
        raise DataError(
            f"class_names: {where} has labels up to {top}, which needs {top + 1} names, got "
            f"{len(names)}"
        )
    return labels, names
