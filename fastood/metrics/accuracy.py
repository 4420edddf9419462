"""Accuracy of the predicted classes on ID images, with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastood.metrics.normal import wilson

__all__ = ["Accuracy", "accuracy"]


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose predicted class is the labelled one."""

    value: float
    n: int
    interval: tuple[float, float]
    """Wilson interval."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"value": self.value, "n": self.n, "interval": list(self.interval)}


def _labels(given: Any, name: str) -> np.ndarray:
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    array = np.asarray(given)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one class per image, shape (n,), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one class, got none")
    if array.dtype.kind not in "iuU":
        raise TypeError(
            f"{name}: expected class numbers or class names, got dtype {array.dtype}; "
            f"every image needs a label, leave out those without"
        )
    return array


def accuracy(predicted: Any, labels: Any, *, confidence: float = 0.95) -> Accuracy:
    """Classification accuracy over all ID images, whether accepted as ID or not.

    Args:
        predicted: (n,) class numbers or names; array, tensor or sequence.
        labels: (n,) likewise.
        confidence: of the Wilson interval, a fraction in (0, 1).

    Returns:
        value, n and interval.

    Raises:
        TypeError: for anything but integers or text, and for one of each.
        ValueError: for different lengths or no images.

    Example:
        >>> accuracy([0, 1, 1, 2], [0, 1, 2, 2]).value
        0.75
    """
    one, other = _labels(predicted, "predicted"), _labels(labels, "labels")
    if one.shape != other.shape:
        raise ValueError(f"labels: expected {one.size} to match predicted, got {other.size}")
    if (one.dtype.kind == "U") != (other.dtype.kind == "U"):
        raise TypeError("predicted and labels: expected both as numbers or both as names")
    correct = int((one == other).sum())
    return Accuracy(correct / one.size, one.size, wilson(correct, one.size, confidence))
