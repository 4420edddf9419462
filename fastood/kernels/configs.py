"""Tile sizes of each kernel for each shape class: a committed table, so that nothing is tuned at
first use.

``configs.json`` is a list of entries, the first that fits is taken::

    {"family": "rows", "precision": "fp16", "rows": 2048, "width": 512,
     "config": {"rows": 64, "columns": 128, "depth": 64, "warps": 4, "stages": 4, "splits": 0},
     "timed": null}

``rows`` and ``width`` are the largest B (patches count as rows) and D it is meant for, null for
any; ``splits`` how many programs share the classes of a row, 0 for as many as fill the GPU.
``timed`` is the GPU an entry was measured on; null says that it is a guess.
``python -m bench.gpu.tune`` measures and rewrites the table.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastood.kernels.launch import INTERPRETED, processors
from fastood.kernels.precision import Precision

__all__ = ["TABLE", "Config", "Entry", "entries", "pick", "shares", "splits_for"]

TABLE = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How one kernel cuts its work."""

    rows: int
    """BB: images (patches) of one program."""
    columns: int
    """BN: classes of one tile."""
    depth: int
    """BD: how much of D is multiplied at a time."""
    warps: int
    stages: int
    splits: int = 0
    """Programs that share the classes of a row; 0: as many as fill the GPU."""
    resident: int = 1
    """Programs meant to share a processor: one multiplies while another reduces."""

    @property
    def options(self) -> dict[str, int]:
        """What Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Entry(NamedTuple):
    """One line of the table."""

    family: str
    precision: str
    rows: int | None
    width: int | None
    config: Config
    timed: str | None


# programs run one after the other, each as one NumPy operation: small tiles, to have several
_INTERPRETED = Config(rows=16, columns=32, depth=32, warps=4, stages=1, splits=2)


@cache
def entries() -> tuple[Entry, ...]:
    """The table."""

    def entry(found: dict[str, Any]) -> Entry:
        return Entry(**{**found, "config": Config(**found["config"])})

    return tuple(entry(found) for found in json.loads(TABLE.read_text(encoding="utf-8")))


@cache
def _entry(family: str, precision: Precision, rows: int, width: int) -> Config:
    for e in entries():
        if (e.family, e.precision) != (family, precision):
            continue
        if (e.rows is None or rows <= e.rows) and (e.width is None or width <= e.width):
            return e.config
    raise LookupError(f"{TABLE.name} has no entry for {family}, {precision}")


def pick(family: str, precision: Precision, *, rows: int, width: int) -> Config:
    """The tile sizes for B = ``rows`` and D = ``width``."""
    if INTERPRETED:
        return _INTERPRETED
    # few distinct keys for the cache: shape classes are powers of two
    return _entry(family, precision, 1 << max(0, rows - 1).bit_length(), width)


def splits_for(config: Config, rows: int, columns: int, device: torch.device) -> int:
    """Programs that share the classes of one block of rows, each with at least one tile."""
    tiles = -(-columns // config.columns)
    if config.splits:
        return max(1, min(config.splits, tiles))
    blocks = -(-rows // config.rows)
    return max(1, min(config.resident * processors(device) // blocks, tiles)) if blocks else 1


def shares(config: Config, rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """How many programs share the classes of one block of rows, and how many classes each takes:
    whole tiles, so that the last programs may not be needed."""
    tiles = -(-columns // config.columns)
    share = -(-tiles // splits_for(config, rows, columns, device)) * config.columns
    return -(-columns // share), share
