"""Linear layers of low rank as two thin ones, where that is less work.

    y = W x + b,  W (m, n) of rank k   ->   y = B (A x) + b,  A (k, n), B (m, k)

takes k (m + n) multiplications a token instead of m n. For ViT-B/16's 3072 x 768 that is less only
below k = 614: for picks of a ratio above 0.2. By the ratios 0.2, 0.25, 0.3, 0.35, 0.4 it takes
100, 94, 88, 81, 75 % of the multiplications and 104, 96, 97, 92, 86 % of the time (16 images,
float32, one thread of an x86-64 CPU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastood.models.matrices import Matrix
from fastood.setar.lowrank import LowRankBasis, Part

__all__ = ["FactoredLinear", "cheaper", "factor"]


_WORTH = 0.95
"""Share of the multiplications from which the second product is no longer paid for: see above."""


class FactoredLinear(nn.Module):
    """x (..., n) to (..., m) through k values.

    It has no ``weight``: whoever changes weights (LoRA, a second recipe) finds no matrix here and
    says so, instead of changing a product nobody keeps.
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        k, n = a.shape
        m = len(b)
        options = {"device": a.device, "dtype": a.dtype}
        self.first = nn.Linear(n, k, bias=False, **options)
        self.second = nn.Linear(k, m, bias=bias is not None, **options)
        with torch.no_grad():
            self.first.weight.copy_(a)
            self.second.weight.copy_(b)
            if bias is not None:
                self.second.bias.copy_(bias)
        self.in_features, self.out_features, self.rank = n, m, k

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def cheaper(shape: tuple[int, int], rank: int) -> bool:
    """Whether two layers through ``rank`` values are clearly less work than one of ``shape``."""
    m, n = shape
    return rank > 0 and rank * (m + n) < _WORTH * m * n


def factor(network: nn.Module, matrix: Matrix, basis: LowRankBasis, count: int, part: Part) -> bool:
    """Put two thin layers in the place of a layer whose weights lose ``count`` directions.

    Only where that is cheaper, and only in image towers, layers that are called as layers: not
    queries, keys and values that share a parameter, nor what a fused attention reads the weights
    of. Text towers stay as they are: their texts are encoded once, by a pass that knows its layers.
    Random directions stay too.

    Args:
        basis: decomposition of the matrix.
    Returns:
        Whether it was done.
    """
    layer: Any = network.get_submodule(matrix.module)
    rank = min(matrix.shape) - count
    if matrix.tower != "image" or part == "random" or not cheaper(matrix.shape, rank):
        return False
    if type(layer) is not nn.Linear or matrix.rows is not None or matrix.transposed:
        return False
    # what stays without the weakest are the strongest, and the other way round
    rest: Part = "principal" if part == "minor" else "minor"
    a, b = basis.factors(rank, part=rest)
    weight, bias = layer.weight, layer.bias
    thin = FactoredLinear(a.to(weight.dtype), b.to(weight.dtype), bias)
    thin.requires_grad_(weight.requires_grad).train(layer.training)
    owner, _, name = matrix.module.rpartition(".")
    setattr(network.get_submodule(owner), name, thin)
    return True
