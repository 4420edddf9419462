"""The per-image table: which image, from which set, and every score it got."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastood.atomic import replacing
from fastood.errors import DataError
from fastood.text import visible

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "ScoreTable"]

COLUMNS = ("set", "role", "path", "label", "class_name", "predicted")
"""The columns before the scores, in file order."""

_RAW_PATH = "path_bytes"
_PARQUET, _CSV = "scores.parquet", "scores.csv"


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One row per image, one float column per score (higher = more in-distribution).

    Attributes:
        set: (n,) name of the image set.
        role: (n,) ``"id"`` or ``"ood"``.
        path: (n,) path inside the set, as the set lists it.
        label: (n,) true class index or None.
        class_name: (n,) true class name or None.
        predicted: (n,) class of the largest similarity, or None.
        scores: label of a score to its (n,) float array.

    The text columns are object arrays. ``scores.csv`` holds file names exactly as they are, also
    ones that begin with ``=`` or ``@``: it is data to be read back, so nothing is prefixed; import
    it into a spreadsheet with the columns typed as text if the names come from strangers.
    """

    set: np.ndarray
    role: np.ndarray
    path: np.ndarray
    label: np.ndarray
    class_name: np.ndarray
    predicted: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_columns(
        cls,
        *,
        set: Sequence[str] | np.ndarray,  # the column's name in every file this writes
        role: Sequence[str] | np.ndarray,
        path: Sequence[str] | np.ndarray,
        scores: Mapping[str, Any],
        label: Sequence[int | None] | np.ndarray | None = None,
        class_name: Sequence[str | None] | np.ndarray | None = None,
        predicted: Sequence[str | None] | np.ndarray | None = None,
    ) -> ScoreTable:
        """A checked table from columns of equal length.

        Raises:
            ValueError: columns of different length, an unknown role, or a score label that is
                empty or the name of another column.
            TypeError: a text column with something other than text.
        """
        n = len(path)
        columns = {
            "set": _text("set", set, n),
            "role": _text("role", role, n),
            "path": _text("path", path, n),
            "label": _labels(label, n),
            "class_name": _text("class_name", class_name, n, optional=True),
            "predicted": _text("predicted", predicted, n, optional=True),
        }
        wrong = sorted({r for r in columns["role"] if r not in ("id", "ood")})
        if wrong:
            raise ValueError(f'role: expected "id" or "ood" in every row, got {wrong[0]!r}')
        checked: dict[str, np.ndarray] = {}
        for name, values in scores.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"scores: expected a name for every score, got {name!r}")
            if name in COLUMNS or name == _RAW_PATH:
                raise ValueError(f"scores: {name!r} is another column; rename the score")
            checked[name] = _floats(name, values, n)
        return cls(**columns, scores=checked)

    def __len__(self) -> int:
        return len(self.path)

    def set_names(self, role: str | None = None) -> list[str]:
        """Names of the sets in the order they first appear."""
        names = self.set if role is None else self.set[self.role == role]
        return list(dict.fromkeys(names.tolist()))

    def rows(self, *, role: str, set: str | None = None) -> np.ndarray:
        """Indices of the rows of one role (and one set), in order."""
        mask = self.role == role
        if set is not None:
            mask = mask & (self.set == set)
        return np.flatnonzero(mask)

    def values(self, score: str, *, role: str, set: str | None = None) -> np.ndarray:
        """One score of one role (and one set).

        Raises:
            ValueError: the table has no such score.
        """
        if score not in self.scores:
            raise ValueError(f"score: expected one of {list(self.scores)}, got {score!r}")
        return self.scores[score][self.rows(role=role, set=set)]

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``scores.parquet`` and ``scores.csv`` into ``folder``, each atomically.

        Floats keep their dtype in parquet and are written in csv as the shortest text that reads
        back to the same value. File names that are not UTF-8 keep their bytes: raw in csv, and in
        an extra column ``path_bytes`` in parquet.
        """
        import pyarrow.csv
        import pyarrow.parquet

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        raw = _undecodable(self.path)
        table = self._arrow(raw)
        # files opened here: Arrow itself takes no path that is not UTF-8
        with replacing(folder / _PARQUET) as temporary, temporary.open("wb") as sink:
            pyarrow.parquet.write_table(table, sink, compression="zstd")
        with replacing(folder / _CSV) as temporary:
            if raw:
                self._plain_csv(temporary)  # Arrow writes nothing but UTF-8
            else:
                with temporary.open("wb") as sink:
                    pyarrow.csv.write_csv(table, sink)
        return folder / _PARQUET, folder / _CSV

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ScoreTable:
        """Read the table that ``save`` wrote, from ``folder`` or from the parquet file itself.

        Raises:
            DataError: no ``scores.parquet`` there, or not one of ours.
        """
        import pyarrow as pa
        import pyarrow.parquet

        file = Path(folder)
        if file.is_dir():
            file = file / _PARQUET
        if not file.is_file():
            raise DataError(f"{file}: no such file; expected the folder `fastood eval` wrote to")
        try:
            with file.open("rb") as source:
                table = pyarrow.parquet.read_table(source)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read as parquet ({error})") from error
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(
                f"{file}: expected columns {', '.join(COLUMNS)}; {missing[0]} is missing"
            )
        meta = json.loads((table.schema.metadata or {}).get(b"fastood", b"{}"))
        extra = {*COLUMNS, _RAW_PATH}
        labels = meta.get("scores", [n for n in table.column_names if n not in extra])
        text = {name: table.column(name).to_pylist() for name in COLUMNS}
        if _RAW_PATH in table.column_names:
            text["path"] = [os.fsdecode(b) for b in table.column(_RAW_PATH).to_pylist()]
        try:
            scores = {name: table.column(name).to_numpy() for name in labels}
            return cls.from_columns(**text, scores=scores)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: not a table of scores ({error})") from error

    def _plain_csv(self, file: Path) -> None:
        numbers = [values.astype(str) for values in self.scores.values()]  # shortest text
        text = [getattr(self, name) for name in COLUMNS]
        with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow([*COLUMNS, *self.scores])
            writer.writerows(zip(*text, *numbers, strict=True))

    def _arrow(self, raw: bool) -> pyarrow.Table:
        import pyarrow as pa

        columns: dict[str, Any] = {}
        for name in COLUMNS:
            values = getattr(self, name)
            if name == "label":
                columns[name] = pa.array(values.tolist(), pa.int64())
            elif name == "path" and raw:
                columns[name] = pa.array([visible(p) for p in values], pa.string())
            else:
                columns[name] = pa.array(values.tolist(), pa.string())
        columns |= {name: pa.array(values) for name, values in self.scores.items()}
        if raw:
            columns[_RAW_PATH] = pa.array([os.fsencode(p) for p in self.path], pa.binary())
        meta = {"fastood": json.dumps({"schema": 1, "scores": list(self.scores), "higher": "id"})}
        return pa.table(columns).replace_schema_metadata(meta)


def _check_length(name: str, got: int, n: int) -> None:
    if got != n:
        raise ValueError(f"{name}: expected one entry per image ({n} in path), got {got}")


def _text(name: str, values: Any, n: int, *, optional: bool = False) -> np.ndarray:
    out = np.empty(n, dtype=object)
    if values is None and optional:
        return out  # an object array starts as None
    _check_length(name, len(values), n)
    for i, value in enumerate(values):
        if isinstance(value, str):
            out[i] = str(value)
        elif not (optional and value is None):
            expected = "text or None" if optional else "text"
            raise TypeError(f"{name}: expected {expected} in row {i}, got {type(value).__name__}")
    return out


def _labels(values: Any, n: int) -> np.ndarray:
    out = np.empty(n, dtype=object)
    if values is None:
        return out
    _check_length("label", len(values), n)
    for i, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"label: expected int or None in row {i}, got {type(value).__name__}")
        out[i] = int(value)
    return out


def _floats(name: str, values: Any, n: int) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"scores[{name!r}]: expected one number per image (n,), got {array.shape}")
    _check_length(f"scores[{name!r}]", len(array), n)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"scores[{name!r}]: expected numbers, got {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _undecodable(paths: np.ndarray) -> bool:
    return any(not p.isascii() and any("\ud800" <= ch <= "\udfff" for ch in p) for p in paths)
