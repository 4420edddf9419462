"""SeTAR: weights of a CLIP without some of their singular directions.

    >>> import torch
    >>> from fastood.setar import low_rank
    >>> low_rank(torch.eye(4), drop=1).norm().round()
    tensor(2.)

Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastood.lazy import lazy_names

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
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
