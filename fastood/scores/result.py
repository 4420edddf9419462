"""Scores that remember what they are: which method, which model, which way is up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["Orientation", "ScoreKey", "Scores"]

Orientation = Literal["id", "ood"]


@dataclass(frozen=True)
class ScoreKey:
    """What must agree before two sets of scores, or scores and a threshold, may be compared."""

    score: str
    """Registered name, for example ``"mcm"``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Resolved options: tau, c, weight, ..."""
    model: str | None = None
    """Fingerprint of the weights (and of an adaptation, if any)."""
    prompts: str | None = None
    """Digest of class names, templates and negatives, in order."""


@dataclass(frozen=True)
class Scores:
    """One number per image with its orientation.

    Attributes:
        values: (n,) float array.
        higher: ``"id"`` if larger means in-distribution, ``"ood"`` otherwise.
        key: what was computed; None for scores of unknown origin.
        name: name of the image set.
    """

    values: np.ndarray
    higher: Orientation = "id"
    key: ScoreKey | None = None
    name: str = ""

    def __post_init__(self) -> None:
        values = self.values
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            # numpy has no bfloat16
            values = (values if values.element_size() >= 4 else values.float()).numpy()
        values = np.asarray(values)
        if values.ndim != 1:
            raise ValueError(f"values: expected one number per image (n,), got {values.shape}")
        if self.higher not in ("id", "ood"):
            raise ValueError(f'higher: expected "id" or "ood", got {self.higher!r}')
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    def toward(self, higher: Orientation) -> np.ndarray:
        """The values, negated if needed so that larger means ``higher``."""
        if higher == self.higher:
            return self.values
        # unsigned integers would wrap around
        return -(self.values.astype(np.float64) if self.values.dtype.kind == "u" else self.values)
