"""What the tests of the methods share: the tiny CLIP, made-up features, plain SGD."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.models import load_model
from fastood.models.base import Encoder
from fastood.tuning.method import Batch, Method, total_loss

NAMES = ("cat", "brown_dog", "airplane", "handwritten letter", "shirt", "jar of honey", "pot")
# the tiny CLIP is steep around a context of norm .02: at the recipes' rate of .002 trajectories are
# chaotic, roundings grow tenfold a step
STEPS, LR = 20, 3e-4


@cache
def encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    """The tiny CLIP, one for all tests."""
    return load_model("fastood-tiny", dtype=dtype)


@cache
def classes(dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, D) zero-shot text features, to make images near their classes."""
    return encoder(dtype).encode_text([f"a photo of a {n}." for n in NAMES])


def batches(
    count: int = STEPS, *, b: int = 6, p: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Batch]:
    """Images half way to their classes, patches a third; float64 numbers, rounded to ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    text = F.normalize(classes(torch.float64), dim=-1)
    found = []
    for _ in range(count):
        labels = torch.randint(len(NAMES), (b,), generator=g)
        noise = torch.randn(b, 1 + p, text.shape[1], generator=g, dtype=torch.float64)
        features = 0.1 * noise + text[labels][:, None]
        features[:, 1:] -= 0.7 * text[labels][:, None]
        norm = 2 + torch.rand(b, 1, 1, generator=g, dtype=torch.float64)
        features = (features * norm).to(dtype)
        found.append(Batch(features[:, 0], labels, features[:, 1:].contiguous()))
    return found


def trained(method: Method, data: Sequence[Batch], lr: float = LR) -> list[float]:
    """Losses of SGD steps with the optimiser of the recipes, at a constant rate."""
    sgd = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for batch in data:
        loss = total_loss(method.terms(batch)[0])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(float(loss.detach()))
    return losses


def close(got: Sequence[float], want: Sequence[float], dtype: torch.dtype) -> None:
    """Equal losses along a trajectory that goes somewhere."""
    from tests import tolerances

    tolerance = {
        torch.float32: tolerances.TRAJECTORY_LOSS_ATOL,
        torch.float64: tolerances.TRAJECTORY_LOSS64_ATOL,
    }[dtype]
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    assert worst <= tolerance, f"losses part by {worst:.1e}"


def still(method: Method, data: Sequence[Batch]) -> list[float]:
    """The losses of the same batches without training."""
    with torch.no_grad():
        return [float(total_loss(method.terms(batch)[0])) for batch in data]


def moved(losses: Sequence[float], without: Sequence[float]) -> bool:
    """Whether training changed the losses by far more than the trajectories may differ."""
    return max(abs(a - b) for a, b in zip(losses, without, strict=True)) > 0.05
