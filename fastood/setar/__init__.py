"""SeTAR: weights of a CLIP without some of their singular directions.

    >>> import torch
    >>> from fastood.setar import low_rank
    >>> low_rank(torch.eye(4), drop=1).norm().round()
    tensor(2.)

Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read; _MODULES says the same at run time
    from fastood.setar.lowrank import (
        Factors,
        LowRankBasis,
        TruncatedSVD,
        count_of,
        low_rank,
        truncated_svd,
    )

__all__ = [
    "Factors",
    "LowRankBasis",
    "TruncatedSVD",
    "count_of",
    "low_rank",
    "truncated_svd",
]

_MODULES = {
    "lowrank": (
        "Factors",
        "LowRankBasis",
        "TruncatedSVD",
        "count_of",
        "low_rank",
        "truncated_svd",
    ),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood.setar' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastood.setar.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
