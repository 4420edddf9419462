"""Tip-Adapter's grid over alpha and beta: all 200 x 20 cells against the published loop.

    pytest bench/bench_tip.py --benchmark-only

The published loop takes both products anew in every cell. It is timed on 20 of its 4000 cells, each
alpha once and every tenth beta, and its time for the grid is 200 times that: cells differ in
nothing but two numbers. ``once`` is what most people would write instead: affinities once, one exp
and dense product for each beta, one pass for each alpha. It is timed on every tenth beta, 20 of
200. Figures of fastood are for the whole grid.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers_tuning
from bench.shapes import SMOKE, Shape
from bench.suite import Goal, Work
from fastood.tuning.tip_grid import count_right, published_grid

SHOTS = 2 if SMOKE else 16
SMALL = Shape(24, 10, 32) if SMOKE else Shape(1000, 100)
LARGE = Shape(24, 12, 32) if SMOKE else Shape(200, 1000)
GAMMA = 100.0
CELLS = 20
PUBLISHED, ONCE = f"published, {CELLS} of 4000 cells", f"once, {CELLS} of 200 betas"
IMPLEMENTATIONS = [PUBLISHED, ONCE, "fastood"]


def caches(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, labels, classes, keys and their labels: unit rows with CLIP-like cosines.

    Images and keys share a direction (cosines of .4 to .8), as features of pictures do; neither
    classes nor keys alone are right about more than half of the images.
    """
    b, k, d, *_ = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g) / d**0.5

    common, prototypes = normal(d), normal(k, d)
    text = F.normalize(0.8 * normal(d) + 0.3 * prototypes + normal(k, d), dim=-1)
    owners = torch.arange(k).repeat_interleave(SHOTS)
    keys = F.normalize(common + 0.6 * prototypes[owners] + 0.7 * normal(len(owners), d), dim=-1)
    labels = torch.randint(k, (b,), generator=g)
    image = F.normalize(common + 0.6 * prototypes[labels] + 0.7 * normal(b, d), dim=-1)
    return image, labels, text, keys, owners


def counts(zero_shot: Tensor, labels: Tensor, caches: Iterable[Tensor]) -> Tensor:
    """(betas, 20): images right for each alpha, from the cache values (B, K) of each beta."""
    alphas = published_grid()[1]
    return torch.tensor(
        [
            [int(((zero_shot + a * cache).argmax(dim=-1) == labels).sum()) for a in alphas]
            for cache in caches
        ]
    )


def grid(shape: Shape) -> Work:
    image, labels, text, keys, owners = caches(shape)
    one_hot = F.one_hot(owners, len(text)).float()
    betas, alphas = published_grid()
    step = len(betas) // CELLS
    some = betas[::step]
    cells = [(beta, alphas[j % len(alphas)]) for j, beta in enumerate(some)]
    b, k, d, *_ = shape
    m = len(keys)

    def once() -> Tensor:
        affinity, zero_shot = image @ keys.T, GAMMA * image @ text.T
        values = (torch.exp(-(beta - beta * affinity)) @ one_hot for beta in some)
        return counts(zero_shot, labels, values)

    def parts(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = found[::step]
        picked = torch.stack([row[j % len(alphas)] for j, row in enumerate(rows)])
        return found.double(), rows.double(), picked.double()

    def truth() -> tuple[Tensor, Tensor, Tensor]:
        z, t, own = image.double(), text.double(), keys.double()
        distance = 1 - z @ own.T  # keys are sorted by class, as many of each
        values = (torch.exp(-beta * distance).view(b, k, SHOTS).sum(dim=-1) for beta in betas)
        return parts(counts(GAMMA * z @ t.T, labels, values))

    return Work(
        name=f"Tip-Adapter grid 200 x 20 {shape}, {SHOTS} shots",
        calls={
            PUBLISHED: lambda: torch.tensor(
                peers_tuning.tip_grid(image, labels, text, keys, one_hot, cells, GAMMA)
            ).double(),
            ONCE: lambda: once().double(),
            "fastood": lambda: count_right(
                image, labels, text, keys, owners, betas, alphas, logit_scale=GAMMA
            ),
        },
        truth=truth,
        result=parts,
        part={PUBLISHED: 2, ONCE: 1},
        # of what cannot be avoided: affinities and zero-shot logits
        flops=2.0 * b * (m + k) * d,
        moved=4.0 * (b + m + k) * d,
        # fastood counts as float64 does, exactly; float32 loops miss an image at a tie
        tolerance={"fastood": (0.0, 0.0), "": (0.0, 1 + b / 500)},
        goals={
            "fastood": (
                Goal("speedup", 150, 400, PUBLISHED, parts=200),
                Goal("speedup", 10, 20, ONCE, parts=10),
            )
        },
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_tip_grid_100_classes(run, impl):
    run(grid, impl, SMALL)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_tip_grid_1000_classes(run, impl):
    run(grid, impl, LARGE)
