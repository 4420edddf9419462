"""Scores and decisions of one folder, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastood.atomic import replacing
from fastood.errors import DataError
from fastood.pipeline.core import ScoredSet
from fastood.pipeline.output import OutputFolder
from fastood.text import visible

__all__ = ["Screening"]


@dataclass(frozen=True)
class Screening:
    """Columns ``path``, ``predicted``, one per score, and ``decision`` if a threshold decided."""

    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls, scored: ScoredSet, class_names: Sequence[str], is_ood: np.ndarray | None
    ) -> Screening:
        columns: dict[str, list[Any]] = {
            "path": list(scored.features.paths),
            "predicted": [class_names[k] for k in scored.predicted],
        }
        for label, values in scored.scores.items():
            columns[label] = values.values.tolist()
        if is_ood is not None:
            columns["decision"] = ["ood" if out else "id" for out in is_ood]
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["path"])

    def rows(self) -> list[dict[str, Any]]:
        names = list(self.columns)
        return [
            dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True)
        ]

    def save(self, folder: OutputFolder) -> None:
        """Write ``scores.csv`` and ``scores.parquet``, each atomically."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        folder.make()
        readable = {
            name: [visible(v) if isinstance(v, str) else v for v in values]
            for name, values in self.columns.items()
        }
        try:
            table = pa.table(readable)
            # files opened here: Arrow itself takes no path that is not UTF-8
            with replacing(folder.path / "scores.parquet") as file, file.open("wb") as sink:
                pyarrow.parquet.write_table(table, sink)
            with replacing(folder.path / "scores.csv") as file, file.open("wb") as sink:
                pyarrow.csv.write_csv(table, sink)
        except OSError as error:
            raise DataError(f"{folder.path}: cannot be written: {error}") from error
