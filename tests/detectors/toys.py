"""Small networks and data that the detector tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastood.models import CallableEncoder
from tests.conftest import clip_like

D, K, P = 16, 5, 4


class Tower(nn.Module):
    """(B, 3, 4, 4) → (B, D), counting its calls; with patches, a pair."""

    def __init__(self, *, patches: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(D, 48, generator=generator))
        self.patches, self.images = patches, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.images += len(x)
        z = x.flatten(1) @ self.weight.T
        if not self.patches:
            return z
        turned = torch.stack([z.roll(i, dims=1) + i for i in range(P)], dim=1)
        return z, turned


def encoder(tower: Tower, *, logit_scale: float = 50.0) -> CallableEncoder:
    return CallableEncoder(
        tower,
        lambda image: torch.zeros(3, 4, 4),
        preprocess_id="zeros",
        embed_dim=D,
        patches=P if tower.patches else None,
        logit_scale=logit_scale,
    )


def text(seed: int = 0) -> Tensor:
    return clip_like(1, K, D, seed=seed)[1]


def images(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Pixels with labels 0..K-1 that shift them, every fourth marked OOD."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % K
    x = torch.randn(n, 3, 4, 4, generator=generator)
    x[:, 0, 0] += 3 * label[:, None]
    label[3::4] = -1
    x[3::4] -= 2
    return x, label


def loader(n: int = 48, batch_size: int = 10, seed: int = 1) -> DataLoader:
    return DataLoader(TensorDataset(*images(n, seed)), batch_size=batch_size)
