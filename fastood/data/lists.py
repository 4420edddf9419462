"""Sets given as lists: ``path label`` files, CSV, CoOp split files, or Python lists of paths."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastood.data.classes import match_names, names_of_numbers, pick_split, some
from fastood.data.folder import ClassNames, describe_classes, set_name
from fastood.data.imageset import ImageItem, ImageSet
from fastood.data.paths import ReadFile, byte_order, is_image_name, path_text, unique_texts
from fastood.errors import DataError

__all__ = ["load_list_file", "load_paths", "load_split_file"]

_LABELLED = re.compile(r"(.*\S)[ \t]+(-?[0-9]+)")

_PATH_HEADS = ("path", "file", "filename", "filepath", "image", "imagepath", "img", "imgpath")
_LABEL_HEADS = ("label", "labels", "labelid", "class", "classid", "classname", "target")


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

    Paths are relative to ``root``, or to the folder around the list that holds most of them; a
    list made on Windows may have ``\\`` in them. A CSV with a header may have more columns, if it
    names these two. Negative labels (OpenOOD's mark for OOD) mean "no label".
    """
    entries = _read_csv(file) if file.suffix.lower() == ".csv" else _read_lines(file)
    if not entries:
        raise DataError(f"{path_text(file)}: expected 'path label' lines, the file has none")
    kind = "CSV list" if file.suffix.lower() == ".csv" else "list file"
    base, hits = _find_root(entries, file, root)
    if not hits and all("\\" in e.path for e in entries):
        entries = [dataclasses.replace(e, path=e.path.replace("\\", "/")) for e in entries]
        base, _ = _find_root(entries, file, root)
    return _build(
        entries,
        file=file,
        name=name or path_text(file.stem),
        class_names=class_names,
        base=base,
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
        base=_find_root(entries, file, root)[0],
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
    for line in text.split("\n"):  # splitlines would also break names at U+2028 and the like
        line = line.strip()
        if not line:
            continue
        labelled = _LABELLED.fullmatch(line)
        if labelled:
            entries.append(_Entry(labelled[1], _label(int(labelled[2]))))
        else:
            entries.append(_Entry(line, None))
    return entries


def _read_csv(file: Path) -> list[_Entry]:
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        rows = [
            row for row in csv.reader(io.StringIO(text, newline="")) if any(map(str.strip, row))
        ]
    except csv.Error as error:
        raise DataError(f"{path_text(file)}: expected CSV 'path,label'; {error}") from error
    where = (0, 1)
    if rows and not any(is_image_name(cell.strip()) for cell in rows[0]) and "/" not in rows[0][0]:
        where = _columns(rows.pop(0), path_text(file))
    entries = []
    for row in rows:
        path, label = (row[i].strip() if i < len(row) else "" for i in where)
        if not path:
            continue
        if not label:
            entries.append(_Entry(path, None))
        elif _is_int(label):
            entries.append(_Entry(path, _label(int(label))))
        else:
            entries.append(_Entry(path, None, label))
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


def _columns(header: Sequence[str], where: str) -> tuple[int, int]:
    """Which columns hold path and label; of three or more, a guess would be a wrong label."""
    heads = [re.sub(r"[^a-z]", "", cell.lower()) for cell in header]
    path = next((i for i, head in enumerate(heads) if head in _PATH_HEADS), None)
    label = next((i for i, head in enumerate(heads) if head in _LABEL_HEADS), None)
    if len(heads) <= 2 and (path in (0, None)) and (label in (1, None)):
        return 0, 1
    if path is None or label is None:
        raise DataError(
            f"{where}: expected columns called 'path' and 'label', got "
            f"{', '.join(path_text(cell) for cell in header)}"
        )
    return path, label


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _label(value: int) -> int | None:
    return value if value >= 0 else None


def _find_root(entries: Sequence[_Entry], file: Path, root: Path | None) -> tuple[Path, int]:
    """The folder the paths are relative to: the one under which most of a sample exists.

    Returns:
        The folder, and how many of the sample exist under it.
    """
    step = max(1, len(entries) // 50)
    sample = [e.path for e in entries[::step]]
    if root is not None:
        if not root.is_dir():
            raise DataError(f"root: expected a folder, got {path_text(root)}")
        return root, sum(_is_file(root / path) for path in sample)
    folder = file.absolute().parent
    around = [folder, *list(folder.parents)[:4]]
    known = ("images", "jpg", "data", "images_classic", "images_largescale")
    candidates = [*around, *(a / k for a in around for k in known)]
    candidates += sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.name)[:200]
    best, hits = folder, 0
    for candidate in candidates:
        if candidate.is_dir():
            n = sum(_is_file(candidate / path) for path in sample)
            if n > hits:
                best, hits = candidate, n
    return best, hits


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
    missing = [e.path for e, f in zip(ordered, files, strict=True) if not _is_file(f)]
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
    return labels, names_of_numbers(class_names, labels, where)
