"""LoCoOp loss, forward and backward: the gradient of the classes with frozen patches.

    pytest bench/bench_locoop.py --benchmark-only

``eager`` keeps probabilities and their ranking of every patch, as the published loss does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench import peers
from bench.bench_ebm import step, truth_of
from bench.shapes import PATCH_TRAINING, SMOKE, TAU, Features, Shape, features
from bench.suite import Work

WEIGHT = 0.25
IMPLEMENTATIONS = ["torch.mm", "oneDNN", "eager", "compile", "reference", "fastood"]


def locoop_step(shape: Shape = PATCH_TRAINING) -> Work:
    f = features(shape)
    b, k, d, p, *_ = shape
    top_k = 200 if shape.k > 200 and not SMOKE else shape.k // 5

    def ours(impl: str) -> Callable[[Features], Callable[[Tensor], Tensor]]:
        return lambda f: (
            lambda t: fastood.locoop_loss(
                f.image, f.local, t, f.labels, tau=TAU, weight=WEIGHT, top_k=top_k, impl=impl
            )
        )

    compiled = peers.compiled(peers.locoop_loss)

    def with_peer(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: loss(f.image, f.local, t, f.labels, TAU, WEIGHT, top_k)

    return Work(
        name=f"locoop_loss, forward and backward {shape}",
        calls={
            "eager": lambda: step(with_peer(peers.locoop_loss), f.text),
            "compile": lambda: step(with_peer(compiled), f.text),
            "reference": lambda: step(ours("reference")(f), f.text),
            "fastood": lambda: step(ours("cpu")(f), f.text),
        },
        truth=lambda: truth_of(ours("reference"), f),
        flops=6.0 * b * (p + 1) * k * d,
        moved=4.0 * (b * (p + 1) + 2 * k) * d,
        product=(F.normalize(f.local, dim=-1).flatten(0, 1), f.text),
        by_largest=True,
        # a patch on the border of the top k may fall either way in float32
        tolerance={"": (2e-3, 0.0)},
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_locoop_step(run, impl):
    run(locoop_step, impl, peak=True)
