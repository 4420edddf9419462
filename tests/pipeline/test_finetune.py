"""``fastood.fine_tune``: what it refuses, what it says, and what it leaves behind."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastood
from fastood.data.imageset import ImageSet
from fastood.errors import DataError
from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.tuning.state import read_header

CLASSES = ("dress", "hat", "shoes")


@pytest.fixture(scope="module")
def model():
    return fastood.load_model("fastood-tiny")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of three pictures of noise."""
    draw = np.random.default_rng(0)
    for name in CLASSES:
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def images(photos: Path) -> ImageSet:
    return fastood.load_images(photos)


def fit(model, method, given, **options):
    options = {"shots": 2, "views": 1, "cache": None, **options}
    if method == "coop":
        options.setdefault("settings", {"n_ctx": 2})
        options.setdefault("recipe", {"epochs": 1})
    return fastood.fine_tune(model, method, given, **options)


@pytest.mark.parametrize("views", [1, 2])
def test_a_class_without_readable_images_is_refused(model, photos, views):
    for file in (photos / "hat").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="no image of hat can be read"):
        fit(model, "coop", images(photos), views=views)


def test_images_left_out_are_named(model, photos):
    (photos / "hat" / "0.png").write_bytes(b"no picture")
    with pytest.warns(RuntimeWarning, match=r"1 of 9 .* left out \(first hat/0.png"):
        done = fit(model, "coop", images(photos), shots=3)
    assert any("hat/0.png" in line for line in done.history.notes)


def test_validation_that_chooses_alpha_is_compared_with_training(model, photos):
    given = images(photos)
    with pytest.warns(RuntimeWarning, match="6 of 9 validation images are training images"):
        done = fit(model, "tip", given, validation=given)
    assert any("training images too" in line for line in done.history.notes)


def test_the_result_of_something_else_is_not_replaced(model, photos, tmp_path):
    given, out = images(photos), tmp_path / "out"
    kept = read_header(fit(model, "coop", given, out=out).file).digest
    with pytest.raises(DataError, match="method: saved 'coop', now 'tip'"):
        fit(model, "tip", given, out=out)
    assert read_header(out / "adaptation.safetensors").digest == kept
    tip = tmp_path / "tip"
    first = read_header(fit(model, "tip", given, out=tip, validation=given).file)
    assert first.settings["chosen"]
    again = read_header(fit(model, "tip", given, out=tip, validation=given).file)
    assert again.digest == first.digest and again.settings == first.settings
    with pytest.raises(DataError, match="data: saved"):
        fit(model, "tip", given, out=tip, seed=2)
    with pytest.raises(DataError, match="method: saved 'tip', now 'coop'"):
        fit(model, "coop", given, out=tip)


def test_a_folder_that_cannot_be_written_is_refused_first(model, photos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="expected a folder"):
        fit(model, "coop", images(photos), out=tmp_path / "file" / "out")


def test_no_threads_are_left(model, photos):
    def live():
        return [t for t in threading.enumerate() if t.name.startswith("fastood-live")]

    before = live()
    done = fit(model, "coop", images(photos), views=0)
    for thread in set(live()) - set(before):
        thread.join(10)
    assert done.history.finished and set(live()) <= set(before)


def test_labels_of_features_index_the_names_given(model):
    rows = np.random.default_rng(0).normal(size=(6, model.embed_dim)).astype(np.float32)
    given = FeatureSet(
        name="rows",
        paths=tuple(f"{i}" for i in range(6)),
        labels=np.array([0, 0, 1, 1, 2, 2]),
        class_names=None,
        chunks=(FeatureChunk(0, torch.from_numpy(rows)),),
    )
    done = fit(model, "tip", given, class_names=CLASSES)
    assert done.method.class_names == CLASSES


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range(model, photos, seed):
    with pytest.raises(ValueError, match="seed: expected 0 <= seed"):
        fit(model, "coop", images(photos), seed=seed)


def test_class_specific_is_yes_or_no(model, photos):
    with pytest.raises(ValueError, match="class_specific: expected True or False, got 'maybe'"):
        fit(model, "coop", images(photos), settings={"n_ctx": 2, "class_specific": "maybe"})


def test_prompts_that_are_cut_are_said(model, photos):
    long = "a very long name " * 12
    with pytest.warns(RuntimeWarning, match="cut off"):
        fit(model, "zoclip", images(photos), class_names=None, settings={"templates": long + "{}"})


def test_a_recipe_names_the_model_that_can_be_loaded(model, photos, tmp_path):
    done = fit(
        model, "lora", images(photos), out=tmp_path / "out", views=0,
        settings={"rank": 1}, recipe={"epochs": 1},
    )  # fmt: skip
    pipeline = fastood.Pipeline(model, CLASSES, methods=["mcm"], adapt=[done.file])
    assert pipeline.encoder.name != model.name
    assert pipeline.recipe()["model"] == model.name


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"validation": "folder"}, TypeError, "validation: expected an ImageSet .* got str"),
        ({"class_names": "abc"}, TypeError, "class_names: expected a list of names"),
        ({"views": -1}, ValueError, "views: expected 0 <= views, got -1"),
        ({"views": 1.5}, ValueError, "views: expected an integer"),
    ],
)
def test_arguments_of_another_kind(model, photos, changed, error, says):
    with pytest.raises(error, match=says):
        fit(model, "coop", images(photos), **changed)


@pytest.mark.parametrize("views", [0, 2])
def test_tip_adapter_f_starts_as_tip_adapter(model, photos, views):
    tip = fit(model, "tip", images(photos), views=views)
    trained = fit(model, "tip-f", images(photos), views=views, recipe={"epochs": 0})
    assert torch.equal(trained.method.keys.detach(), tip.method.keys)
