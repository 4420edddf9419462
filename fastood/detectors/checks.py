"""Checks that a detector makes on every device, also where they wait for the GPU.

The functional scores let NaN through on a GPU to stay free of synchronisation. A detector decides
about images, so it would rather wait than call a NaN in-distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastood.scores.inputs import check_tensor

__all__ = ["require_features", "require_finite_scores"]


def require_features(name: str, x: object, dims: int, shape: str) -> Tensor:
    """A float tensor of ``dims`` dimensions whose vectors are finite and not zero."""
    x = check_tensor(name, x, (dims,), shape)
    finite = torch.isfinite(x)
    usable = finite.all(dim=-1) & (x != 0).any(dim=-1)
    if bool(usable.all()):
        return x
    unusable = ~usable.reshape(len(x), -1).all(dim=1)
    what = "NaN or Inf" if not bool(finite.all()) else "a zero vector, which has no direction,"
    raise ValueError(
        f"{name}: expected finite features, got {what} in {_rows(unusable)}; "
        "did the encoder overflow in half precision, or was an image left out without being masked?"
    )


def require_finite_scores(score: str, values: Tensor) -> Tensor:
    """Scores that can be compared with a threshold."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise ValueError(
            f"{score}: expected finite scores, got NaN or Inf in {_rows(bad)}; "
            "are the head's similarities finite?"
        )
    return values


def _rows(bad: Tensor) -> str:
    index = bad.nonzero()[:, 0].tolist()
    shown = ", ".join(str(i) for i in index[:5])
    return f"row {shown}" if len(index) == 1 else f"{len(index)} rows, first {shown}"
