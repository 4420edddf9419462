"""Learning rates against torch's schedulers, composed as the published code composes them."""

from __future__ import annotations

import pytest
import torch

from fastood.tuning.recipes import RECIPES, Recipe
from fastood.tuning.schedule import learning_rate


def _of_torch(recipe: Recipe, moves: int, warm: int) -> list[float]:
    """Constant rate for ``warm`` moves, then a full-length cosine that counts from there."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(moves))
    rates = []
    for move in range(moves):
        if move < warm:
            rates.append(recipe.warmup_lr)
            continue
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    return rates


@pytest.mark.parametrize("warm", [0, 1, 3])
def test_cosine_per_epoch_is_the_published_composition(warm):
    recipe = Recipe(20, 32, "sgd", 0.002, warmup_epochs=warm)
    got = [learning_rate(recipe, e, 3, 5) for e in range(20)]
    assert got == pytest.approx(_of_torch(recipe, 20, warm), rel=1e-12)


@pytest.mark.parametrize("warm", [0, 1])
def test_cosine_per_step(warm):
    recipe = Recipe(4, 32, "adamw", 0.001, per="step", warmup_epochs=warm)
    got = [learning_rate(recipe, e, s, 7) for e in range(4) for s in range(7)]
    assert got == pytest.approx(_of_torch(recipe, 28, warm * 7), rel=1e-12)


def test_the_rates_of_coop_and_tip_adapter_f():
    coop = RECIPES["coop"]
    assert learning_rate(coop, 0) == 1e-5
    assert learning_rate(coop, 1) == 0.002
    assert learning_rate(coop, 101) == pytest.approx(0.001)
    assert 0 < learning_rate(coop, 199) < 2e-6
    tip = RECIPES["tip-f"]
    assert learning_rate(tip, 0, 0, 63) == 0.001
    assert learning_rate(tip, 10, 0, 63) == pytest.approx(0.0005)


def test_constant_keeps_the_rate_behind_the_warm_up():
    recipe = Recipe(3, 1, "sgd", 0.1, schedule="constant", warmup_lr=0.0)
    assert [learning_rate(recipe, e) for e in range(3)] == [0.0, 0.1, 0.1]
