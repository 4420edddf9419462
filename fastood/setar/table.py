"""Every evaluated candidate of a search, on disk as soon as it is known.

A folder holds ``search.json``, the settings that decide about the result, and ``candidates.csv``,
a line for each candidate. A search that is given the same settings again takes what is there
instead of computing it. A folder without a candidate (an image could not be read, say) is free for
other settings.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastood._version import __version__
from fastood.atomic import claim, write_text
from fastood.data.paths import path_text
from fastood.differences import differences
from fastood.errors import DataError
from fastood.setar.objective import Value
from fastood.setar.recipe import RECIPE

__all__ = ["CANDIDATES", "SETTINGS", "Row", "Table"]

CANDIDATES, SETTINGS = "candidates.csv", "search.json"
_REPORT = "report.html"
_FORMAT, _VERSION = "fastood-setar-search", 1

_KEY = ("visit", "matrix", "ratio", "count", "seconds")
_VALUES = (
    "objective", "loss", "cross_entropy", "patches", "ood_share", "ood_patches", "ties",
    "empty_batches", "accuracy",
)  # fmt: skip
_WHOLE = ("visit", "count", "ood_patches", "ties", "empty_batches")
_METRICS = ("auroc", "aupr", "fpr")


@dataclass(frozen=True)
class Row:
    """One evaluated candidate.

    Attributes:
        visit: from 1; 0 is the model as it is.
        matrix: address, ``"image.11.up"``; empty for the model as it is.
        ratio, count: what it drops.
        value: its objective and the parts of it.
        seconds: it took, an equal share of what was run together.
    """

    visit: int
    matrix: str
    ratio: float
    count: int
    value: Value
    seconds: float = 0.0

    @property
    def key(self) -> tuple[int, str, int]:
        return self.visit, self.matrix, self.count

    def cells(self) -> dict[str, Any]:
        """Flat, for a line of the table."""
        value = self.value.as_dict()
        scores = value.pop("scores")
        found = {name: getattr(self, name) for name in _KEY} | value
        for metrics in scores.values():
            found |= metrics
        return found


class Table:
    """The candidates of one search, in the order they were computed.

    Args:
        folder: where they are kept; None keeps them in memory only.
        settings: JSON values that decide about the result.
        score: of the objective, for the names of its columns.
        overwrite: put this search in the place of one that is there. That one is kept until the
            first candidate of this one is known.
    Raises:
        DataError: the folder holds another search (says what differs), a damaged table, or cannot
            be written.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        *,
        score: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self._score = score
        self._folder = folder
        self._columns = (*_KEY, *_VALUES, *(_METRICS if score is not None else ()))
        self._rows: dict[tuple[int, str, int], Row] = {}
        head = {"format": _FORMAT, "version": _VERSION, "fastood": __version__}
        self._content = json.loads(json.dumps({**head, "settings": dict(settings)}))
        self._begun = folder is None
        self._claim: int | None = None
        if folder is None:
            return
        if folder.is_dir():
            self._take(folder)
        try:
            self._open(folder, overwrite)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the folder to other searches."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _take(self, folder: Path) -> None:
        try:
            self._claim = claim(folder)
        except BlockingIOError:
            raise DataError(
                f"{path_text(folder)}: another search is running there; wait for it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            raise DataError(f"{path_text(folder)}: {error.strerror or error}") from error

    def _open(self, folder: Path, overwrite: bool) -> None:
        state, file = folder / SETTINGS, folder / CANDIDATES
        if overwrite and any((folder / n).exists() for n in (SETTINGS, CANDIDATES, RECIPE)):
            return
        if state.exists():
            begun = _has_rows(file)
            changed = _changes(state, self._content)
            if changed and begun:
                raise DataError(
                    f"{path_text(folder)}: holds another search ({'; '.join(changed[:5])}"
                    f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}); choose "
                    "another folder, or start again (fastood search setar --overwrite)"
                )
            if begun:
                self._read(file)
                self._begun = True
                return
        for name in (CANDIDATES, RECIPE) if not state.exists() else ():
            if (folder / name).exists():
                raise DataError(
                    f"{path_text(folder)}: holds {name} without {SETTINGS}, so it is not known of "
                    "which search; choose another folder, or remove the file"
                )
        self._begin(folder)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows.values())

    def find(self, visit: int, matrix: str, count: int) -> Row | None:
        return self._rows.get((visit, matrix, count))

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows; when this returns they are on disk."""
        rows = tuple(rows)
        self._rows |= {row.key: row for row in rows}
        if self._folder is None:
            return
        if not self._begun:
            self._begin(self._folder)
        file = self._folder / CANDIDATES
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        for row in rows:
            cells = row.cells()
            writer.writerow({k: repr(v) if isinstance(v, float) else v for k, v in cells.items()})
        try:
            with file.open("a", encoding="utf-8", newline="") as opened:
                opened.write(text.getvalue())
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise DataError(
                f"{path_text(file)}: cannot be written ({error.strerror or error})"
            ) from error

    def _begin(self, folder: Path) -> None:
        """Settings and an empty table, in the place of whatever search was there."""
        try:
            for name in (RECIPE, _REPORT, CANDIDATES):  # none is left of other settings
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path_text(folder)}: {error.strerror or error}") from error
        text = json.dumps(self._content, indent=1, ensure_ascii=False)
        write_text(folder / SETTINGS, text + "\n")
        if self._claim is None:
            self._take(folder)
        write_text(folder / CANDIDATES, ",".join(self._columns) + "\n")
        self._begun = True

    def _read(self, file: Path) -> None:
        """Take the finished lines; what a killed run left of the last one is cut off."""
        try:
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(file, len(whole))
            lines = list(csv.DictReader(io.StringIO(whole.decode("utf-8"))))
            rows = [self._row(line) for line in lines]
        except OSError as error:
            raise DataError(f"{path_text(file)}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise DataError(
                f"{path_text(file)}: is damaged ({error}); remove it to compute everything again"
            ) from error
        self._rows = {row.key: row for row in rows}

    def _row(self, line: Mapping[str, str]) -> Row:
        read: dict[str, Any] = {
            name: int(line[name]) if name in _WHOLE else float(line[name])
            for name in ("visit", "count", "seconds", *_VALUES)
        }
        for name in _VALUES:
            if not math.isfinite(read[name]):
                raise ValueError(f"{name} is {read[name]}")
        ratio = line["ratio"]
        value = {name: read[name] for name in _VALUES}
        if self._score is not None and line["auroc"]:
            value["scores"] = {self._score: {m: float(line[m]) for m in _METRICS}}
        return Row(
            read["visit"],
            line["matrix"],
            float(ratio) if "." in ratio or "e" in ratio else int(ratio),
            read["count"],
            Value.from_dict(value),
            read["seconds"],
        )


def _has_rows(file: Path) -> bool:
    """Whether a finished line follows the names of the columns."""
    try:
        return file.exists() and file.read_bytes().count(b"\n") > 1
    except OSError as error:
        raise DataError(f"{path_text(file)}: {error.strerror or error}") from error


def _changes(file: Path, content: Mapping[str, Any]) -> list[str]:
    """What is other in the settings of ``content``."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path_text(file)}: cannot be read ({error})") from error
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise DataError(f"{path_text(file)}: expected the settings of a search of fastood")
    if saved.get("version") != _VERSION:
        raise DataError(
            f"{path_text(file)}: was written by fastood {saved.get('fastood')} in version "
            f"{saved.get('version')!r}, this one reads {_VERSION}"
        )
    return list(differences(saved.get("settings"), content["settings"]))
