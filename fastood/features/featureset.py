"""Features of one image set, as the scores want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureChunk", "FeatureSet", "Skipped"]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    path: str
    reason: str


@dataclass(frozen=True)
class FeatureChunk:
    """A run of consecutive valid images.

    Attributes:
        start: index of the first row within the *valid* rows of the set.
        image: (b, D) features as the tower returned them (not normalised).
        local: (b, P, D) or None.
    """

    start: int
    image: Tensor
    local: Tensor | None = None


@dataclass(frozen=True)
class FeatureSet:
    """Everything known about an encoded image set; unreadable images are already left out.

    Attributes:
        name: name of the image set.
        paths: n paths, in row order.
        labels: (n,) int64, -1 where unknown; None if no image has a label.
        class_names: names the labels index, or None.
        chunks: memory-mapped pieces in order; iterate ``blocks()`` rather than concatenating.
        skipped: images left out, with the reason.
        encoded: how many images had to be encoded now, the rest came from the cache.
        provenance: model, fingerprint, preprocess, dtype, batch size, versions.
    """

    name: str
    paths: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    chunks: tuple[FeatureChunk, ...]
    skipped: tuple[Skipped, ...] = ()
    encoded: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def has_local(self) -> bool:
        return bool(self.chunks) and all(c.local is not None for c in self.chunks)

    def blocks(self) -> Iterator[FeatureChunk]:
        yield from self.chunks

    def image(self) -> Tensor:
        """(n, D): all global features in memory."""
        if not self.chunks:
            raise ValueError(f"{self.name}: no image could be encoded")
        return torch.cat([c.image for c in self.chunks])
