"""SeTAR: weights of a CLIP without some of their singular directions, and the search for them.

``search(encoder, images)`` finds a ``Recipe``; ``recipe.apply(encoder)`` makes the model.

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
    from fastood.setar.authors import published
    from fastood.setar.lowrank import (
        Factors,
        LowRankBasis,
        TruncatedSVD,
        count_of,
        low_rank,
        truncated_svd,
    )
    from fastood.setar.objective import Objective, Value
    from fastood.setar.plan import Plan, make_plan
    from fastood.setar.recipe import Pick, Recipe
    from fastood.setar.run import Found, search

__all__ = [
    "Factors",
    "Found",
    "LowRankBasis",
    "Objective",
    "Pick",
    "Plan",
    "Recipe",
    "TruncatedSVD",
    "Value",
    "count_of",
    "low_rank",
    "make_plan",
    "published",
    "search",
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
    "objective": ("Objective", "Value"),
    "plan": ("Plan", "make_plan"),
    "authors": ("published",),
    "recipe": ("Pick", "Recipe"),
    "run": ("Found", "search"),
}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
