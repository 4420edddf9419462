"""Published recipes: the numbers of the papers, defaults of top-k and epochs, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastood.tuning.recipes import RECIPES, Recipe, default_top_k, epochs_of_coop

PUBLISHED = {  # epochs, batch, optimiser, learning rate
    "coop": (200, 32, "sgd", 0.002),
    "cocoop": (10, 1, "sgd", 0.002),
    "locoop": (50, 32, "sgd", 0.002),
    "ebm": (30, 32, "sgd", 0.002),
    "clip-adapter": (30, 32, "sgd", 0.002),
    "tip-f": (20, 256, "adamw", 0.001),
    "lora": (5, 100, "sgd", 0.01),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    recipe = RECIPES[name]
    got = (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.lr)
    assert got == PUBLISHED[name]
    assert recipe.source
    assert recipe.schedule == "cosine"
    if name not in ("tip-f", "lora"):
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
        assert (recipe.per, recipe.warmup_epochs, recipe.warmup_lr) == ("epoch", 1, 1e-5)
    json.dumps(recipe.as_dict())


def test_tip_f_schedules_per_step_with_a_large_eps():
    assert (RECIPES["tip-f"].per, RECIPES["tip-f"].eps) == ("step", 1e-4)


@pytest.mark.parametrize("name", ["zoclip", "tip"])
def test_methods_without_training_have_no_epochs(name):
    assert RECIPES[name].epochs == 0


@pytest.mark.parametrize(
    ("shots", "dataset", "epochs"),
    [
        (16, None, 200), (8, None, 200), (4, None, 100), (2, None, 100), (1, None, 50),
        (16, "ImageNet", 50), (1, "imagenet-1k", 50), (None, None, 200), (None, "imagenet", 50),
        (5, None, 100), (16, "imagenet-100", 200),
    ],
)  # fmt: skip
def test_epochs_of_coop(shots, dataset, epochs):
    assert epochs_of_coop(shots, dataset) == epochs


@pytest.mark.parametrize("shots", [0, -1, 1.5, True])
def test_epochs_of_coop_refuses_other_shots(shots):
    with pytest.raises(ValueError, match="shots: expected"):
        epochs_of_coop(shots)


@pytest.mark.parametrize("classes", [2, 3, 5, 14, 37, 100, 999, 1000, 21841])
def test_default_top_k_is_a_fifth_of_the_classes(classes):
    got = default_top_k(classes)
    assert 1 <= got < classes
    assert abs(got - 0.2 * classes) <= (0.5 if classes > 3 else 1)


def test_default_top_k_of_the_published_set():
    assert default_top_k(1000, "ImageNet") == default_top_k(1000) == 200
    assert default_top_k(14, "VOC", published={"voc": 4}) == 4
    assert default_top_k(14, "other", published={"voc": 4}) == 3


def test_default_top_k_where_no_patch_could_be_ood():
    with pytest.raises(ValueError, match="classes: expected 2 <= classes"):
        default_top_k(1)
    with pytest.raises(ValueError, match=r"published 200 of imagenet .* got 100"):
        default_top_k(100, "imagenet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "epochs: expected 0 <="),
        ({"batch_size": 0}, "batch_size: expected 1 <="),
        ({"optimizer": "adam"}, "optimizer: expected one of 'sgd', 'adamw', got 'adam'"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"per": "day"}, "per: expected one of"),
        ({"lr": 0.0}, "lr: expected a finite number > 0.0, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
        ({"lr": True}, "lr: expected a finite number"),
        ({"momentum": 1.0}, "momentum: expected a finite number >= 0.0 and < 1.0"),
        ({"weight_decay": -1e-3}, "weight_decay: expected"),
        ({"eps": 0.0}, "eps: expected"),
        ({"warmup_lr": -1.0}, "warmup_lr: expected"),
    ],
)
def test_recipes_refuse_numbers_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES["coop"], **change)


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe(1, 1, "sgd", 0.1).lr = 1.0  # type: ignore[misc]
