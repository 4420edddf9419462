"""What a search over hyper-parameters should try, score by score."""

from __future__ import annotations

from typing import Any

__all__ = ["search_space"]

_TAU = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
_SPACES: dict[str, dict[str, list[Any]]] = {
    # max_similarity has none, and max_logit ranks the same at every tau
    **{
        name: {"tau": _TAU}
        for name in ("mcm", "msp", "energy", "neg_entropy", "variance", "l_mcm", "neg_label")
    },
    "delta_energy": {"tau": _TAU, "c": [1, 2, 5]},
    "gl_mcm": {"weight": [0.25, 0.5, 1.0, 2.0]},
    "knn": {"k": [50, 100, 200, 500, 1000]},
}


def search_space(score: str, classes: int | None) -> dict[str, list[Any]]:
    """A private copy, without what K classes rule out."""
    space = {name: list(values) for name, values in _SPACES.get(score, {}).items()}
    if classes is not None and "c" in space:
        space["c"] = [c for c in space["c"] if c <= classes]
    return space
