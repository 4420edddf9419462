"""Scores that other projects saved, with the orientation they were saved in."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from fastood.errors import DataError

if TYPE_CHECKING:
    from fastood.scores.result import Orientation, Scores

__all__ = ["openood_npz", "setar_csv"]


def setar_csv(path: str | os.PathLike[str], *, higher: Orientation = "ood") -> dict[str, Scores]:
    """One file of per-image scores as SeTAR saves it: a column per score, a row per image.

    SeTAR and the projects it follows (MCM, GL-MCM, LoCoOp) save the *negated* score, so larger
    means out-of-distribution; the values are returned as they are and say so. A column
    ``mcm_score`` becomes ``"mcm"``; the set's name is taken from ``scores_OOD_<name>_test.csv``.

    Raises:
        DataError: no such file, no rows, or something that is not a number.
    """
    from fastood.scores.result import Scores  # its package imports torch, which tables do without

    file = Path(path)
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            header, *rows = [row for row in csv.reader(handle) if row] or [[]]
        values = np.array(rows, dtype=np.float64)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{file}: expected a header and one number per column ({error})") from error
    if not len(values) or values.shape[1] != len(header):
        raise DataError(f"{file}: expected a header and at least one row of scores")
    found = re.fullmatch(r"scores_(?:ID|OOD)_(.+?)(?:_test|_val)?", file.stem)
    name = found[1] if found else file.stem
    labels = [column.strip().removesuffix("_score") for column in header]
    return {
        label: Scores(values[:, i].copy(), higher=higher, name=name)
        for i, label in enumerate(labels)
    }


def openood_npz(path: str | os.PathLike[str]) -> dict[str, Scores]:
    """The score file of one data set as OpenOOD saves it: ``conf`` and ``label``.

    Larger ``conf`` means in-distribution and a negative label means OOD. Returns ``"id"`` and
    ``"ood"``, without the side that has no image.

    Raises:
        DataError: not an npz file with two equally long arrays of those names.
    """
    from fastood.scores.result import Scores

    file = Path(path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            conf, label = archive["conf"], archive["label"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError, BadZipFile) as error:
        raise DataError(f"{file}: expected an npz with arrays conf and label ({error})") from error
    if conf.ndim != 1 or conf.shape != label.shape:
        raise DataError(
            f"{file}: expected one conf and one label per image, got {conf.shape} and {label.shape}"
        )
    sides = {"id": conf[label >= 0], "ood": conf[label < 0]}
    return {
        role: Scores(values, higher="id", name=file.stem)
        for role, values in sides.items()
        if len(values)
    }
