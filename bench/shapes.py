"""The sizes that are measured, and features of those sizes.

``FASTOOD_BENCH_SMOKE=1`` makes every size tiny: it proves that the benchmarks run, and measures
nothing. Letters: B images, D width, K classes, P patches, M negatives in G groups.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMOKE = os.environ.get("FASTOOD_BENCH_SMOKE") == "1"

TAU = 0.01


class Shape(NamedTuple):
    """Sizes of one piece of work; 0 where a letter has no meaning."""

    b: int
    k: int
    d: int = 512
    p: int = 0
    m: int = 0
    g: int = 0

    def __str__(self) -> str:
        images = f"{self.b}x{self.p}" if self.p else f"{self.b}"
        classes = f"({self.k}+{self.m}, G={self.g})" if self.m else f"{self.k}"
        return f"{images} x {classes} x {self.d}"


def _size(full: Shape, smoke: Shape) -> Shape:
    return smoke if SMOKE else full


ROWS = _size(Shape(4096, 1000), Shape(48, 40, 64))
ONE_IMAGE = _size(Shape(1, 1000), Shape(1, 40, 64))
NEGATIVES = _size(Shape(2000, 1000, m=10_000, g=100), Shape(24, 40, 64, m=200, g=20))
PATCHES = _size(Shape(32, 1000, p=196), Shape(4, 40, 64, p=9))
TRAINING = _size(Shape(256, 1000), Shape(16, 40, 64))
PATCH_TRAINING = _size(Shape(32, 1000, p=196), Shape(4, 40, 64, p=9))
TINY = Shape(4, 24, 64, p=4, m=40, g=4)
"""Warms a library up before its memory is measured; smaller than any scratch that counts."""

# One panel of classes, several, many; few rows, one block of rows, many; CLIP widths.
PRODUCTS = (
    [Shape(48, 40, 64)]
    if SMOKE
    else [
        Shape(64, 1000),
        Shape(256, 1000),
        Shape(1024, 100),
        Shape(1024, 1000),
        Shape(4096, 1000),
        Shape(6272, 1000),
        Shape(1024, 1000, 768),
        Shape(1024, 1000, 1024),
        Shape(2000, 11_000),
    ]
)

SCORES = (500, 100) if SMOKE else (50_000, 10_000)
"""ID and OOD scores: ImageNet-1k's validation images against one far-OOD set."""


class Features(NamedTuple):
    """CLIP-like features: cosines of 0.1 to 0.35 with the classes, lengths of 5 to 15."""

    image: Tensor
    """(B, D) any norm, as an encoder gives them."""
    text: Tensor
    """(K, D) unit rows."""
    local: Tensor
    """(B, P, D) any norm."""
    negatives: Tensor
    """(M, D) unit rows."""
    labels: Tensor
    """(B,) int64."""


def features(shape: Shape, *, seed: int = 0) -> Features:
    """Reproducible features of ``shape``; the true class of each image is ``labels``."""
    b, k, d, p, m, _ = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g) / d**0.5

    common = normal(d)
    text = F.normalize(0.8 * common + normal(k, d), dim=-1)
    negatives = F.normalize(0.8 * common + normal(m, d), dim=-1)
    labels = torch.randint(k, (b,), generator=g)
    image = 0.25 * common + 0.12 * text[labels] + normal(b, d)
    lengths = 5 + 10 * torch.rand(b, 1, generator=g)
    patches = 0.5 * image[:, None] + 0.2 * common + normal(b, p, d)
    return Features(image * lengths, text, 8 * patches, negatives, labels)
