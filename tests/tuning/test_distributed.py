"""Every method trained by two processes against one, on the tiny CLIP."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.models import load_model
from fastood.tuning.loop import train
from fastood.tuning.method import Batch
from fastood.tuning.registry import build_method
from fastood.tuning.views import FeatureData
from tests.tolerances import TWO_PROCESSES_ATOL, TWO_PROCESSES_RTOL
from tests.tuning.launch import launch

NAMES = ("cat", "a much longer name of a dog", "red car")  # shares of 2 and 1 classes
METHODS = {
    "coop": {"n_ctx": 4},
    "locoop": {"n_ctx": 4},
    "ebm": {"n_ctx": 4},
    "cocoop": {},
    "clip-adapter": {},
    "tip-f": {},
    "lora": {"rank": 2},
    "setar-ft": {"picks": [["image", "up", 5, 0.1], ["text", "up", 2, 8]]},
}


class Pixels(SimpleNamespace):
    """Random pictures, for methods that train the image tower."""

    def batch(self, index, epoch):
        del epoch
        return Batch(self.image[index], self.labels[index])

    def prefetch(self, index, epoch):
        del index, epoch

    def describe(self):
        return {}


def run(world, names) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """An epoch of 4, 4 and 1 images: in the last step one of two processes has none."""
    encoder, found = load_model("fastood-tiny"), {}
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(9) % 3
    image, local = torch.randn(9, 192, generator=g), torch.randn(9, 4, 192, generator=g)
    given = FeatureSet(
        "random", tuple(map(str, range(9))), np.asarray(labels), NAMES,
        (FeatureChunk(0, image, local),),
    )  # fmt: skip
    pixels = torch.randn(9, 3, 64, 64, generator=g)
    for name in names:
        method = build_method(name, encoder, NAMES, **METHODS[name])
        method.world = world
        data = FeatureData(given, local=method.needs == "local")
        if method.needs == "pixels":
            data = Pixels(
                name="pixels", class_names=NAMES, labels=labels, image=pixels, digest="", views=1
            )
        recipe = dataclasses.replace(method.recipe, epochs=1, batch_size=4, warmup_epochs=0)
        history = train(method, data, recipe=recipe)
        losses = [row["loss"] for row in history.epochs]
        found[name] = losses, {k: v.detach().clone() for k, v in method.state_dict().items()}
    return found


SCRIPT = """
import sys, torch, warnings
from fastood.tuning.parallel import World
from tests.tuning.test_distributed import run

warnings.simplefilter("ignore")
world = World.from_environment()
torch.save(run(world, {names}), f"{{sys.argv[1]}}/{{world.rank}}.pt")
"""


@pytest.mark.parametrize(
    "names",
    [("coop", "locoop"), pytest.param(tuple(METHODS)[2:], marks=pytest.mark.slow)],
    ids=["prompts", "others"],
)
def test_every_method_is_trained_by_two_processes_as_by_one(tmp_path, names):
    from fastood.tuning.parallel import World

    launch(SCRIPT.format(names=names), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = run(World.alone(), names)
    for name, (losses, state) in alone.items():
        assert first[name][0] == pytest.approx(losses, rel=TWO_PROCESSES_RTOL), name
        for key, value in state.items():
            assert torch.equal(first[name][1][key], second[name][1][key]), (name, key)
            torch.testing.assert_close(
                first[name][1][key], value, rtol=TWO_PROCESSES_RTOL, atol=TWO_PROCESSES_ATOL,
                msg=lambda text, name=name, key=key: f"{name} {key}: {text}",
            )  # fmt: skip
