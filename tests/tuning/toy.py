"""A method small enough to reason about: a linear head on features, with a term of patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.models.base import Encoder
from fastood.scores.bank import ClassBank
from fastood.tuning.method import Batch, Method, Term
from fastood.tuning.recipes import Recipe
from tests.features.toy_encoder import ToyEncoder


class ToyHead(Method):
    """Cross-entropy of W z, and the mean square of the patches that W likes: its own count."""

    name = "toy"
    needs = "features"
    recipe = Recipe(4, 8, "sgd", 0.05, warmup_lr=0.01)

    def __init__(
        self, encoder: Encoder, class_names: Sequence[str], *, seed: int = 0, weight: float = 0.1
    ) -> None:
        super().__init__(encoder, class_names, {"seed": seed, "weight": weight})
        start = torch.randn(
            len(class_names), encoder.embed_dim, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = nn.Parameter(start.to(self.dtype) / 10)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.share = weight

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        z = F.normalize(batch.image.to(self.weight), dim=-1)
        rows = self.world.gather_rows(
            self.weight[self.world.part(len(self.weight))], len(self.weight)
        )
        logits = z @ rows.T
        ce = F.cross_entropy(logits, batch.labels, reduction="sum")
        liked = logits.detach() > 0.1  # how many differs from process to process
        odd = (logits.square() * liked).sum()
        if torch.is_grad_enabled():
            self.seen += 1
        return [
            Term("ce", ce, len(z)),
            Term("liked", odd, liked.sum(), self.share),
            Term("note", logits.detach().sum(), len(z), 0.0),
        ], logits.argmax(dim=1)

    def head(self) -> ClassBank:
        return ClassBank(self.weight.detach().clone())


def toy_features(
    n: int = 44, k: int = 4, d: int = 16, *, seed: int = 0, name: str = "toy"
) -> FeatureSet:
    """Features of k classes that a linear head can learn."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % k
    image = centres[labels] + 0.8 * torch.randn(n, d, generator=g)
    names = tuple(f"class {i}" for i in range(k))
    paths = tuple(f"{name}/{i}.png" for i in range(n))
    return FeatureSet(name, paths, np.asarray(labels), names, (FeatureChunk(0, image),))


def toy_method(**settings: object) -> ToyHead:
    return ToyHead(ToyEncoder(), tuple(f"class {i}" for i in range(4)), **settings)
