"""EBM loss, forward and backward: the gradient of the classes with frozen images.

    pytest bench/bench_ebm.py --benchmark-only

The bare product is one of three such a step needs (forward, recomputed in the backward, gradient).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastood
from bench import peers
from bench.bench_scores import product
from bench.shapes import TAU, TRAINING, Features, Shape, features
from bench.suite import Goal, Work

WEIGHT = 0.1
IMPLEMENTATIONS = ["torch.mm", "oneDNN", "eager", "compile", "reference", "fastood"]


def step(loss: Callable[[Tensor], Tensor], text: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of ``text``."""
    t = text.detach().requires_grad_()
    value = loss(t)
    (gradient,) = torch.autograd.grad(value, t)
    return value.detach(), gradient


def truth_of(
    loss: Callable[[Features], Callable[[Tensor], Tensor]], f: Features
) -> tuple[Tensor, Tensor]:
    f64 = f._replace(image=f.image.double(), local=f.local.double(), text=f.text.double())
    return step(loss(f64), f64.text)


def ebm_step(shape: Shape = TRAINING) -> Work:
    f = features(shape)
    b, k, d, *_ = shape
    compiled = peers.compiled(peers.ebm_loss)

    def ours(impl: str) -> Callable[[Features], Callable[[Tensor], Tensor]]:
        return lambda f: (
            lambda t: fastood.ebm_loss(f.image, t, f.labels, tau=TAU, weight=WEIGHT, impl=impl)
        )

    return Work(
        name=f"ebm_loss, forward and backward {shape}",
        calls={
            "eager": lambda: step(
                lambda t: peers.ebm_loss(f.image, t, f.labels, TAU, WEIGHT), f.text
            ),
            "compile": lambda: step(lambda t: compiled(f.image, t, f.labels, TAU, WEIGHT), f.text),
            "reference": lambda: step(ours("reference")(f), f.text),
            "fastood": lambda: step(ours("cpu")(f), f.text),
        },
        truth=lambda: truth_of(ours("reference"), f),
        flops=6.0 * b * k * d,
        moved=4.0 * (b + 2 * k) * d,
        product=product(f),
        # of the largest number: a gradient has entries near zero
        by_largest=True,
        tolerance={"fastood": (1e-4, 0.0), "": (1e-3, 0.0)},
        goals={"fastood": (Goal("speedup", 3.0, 5.0, "eager"),)},
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_ebm_step(run, impl):
    run(ebm_step, impl, peak=True)
