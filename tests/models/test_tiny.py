"""The shipped model: complete, small, reproducible, and as good as its card says."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from fastood.demo import ID, ID_CLASSES, photo_folder
from fastood.errors import ModelError, WeightsUnavailable
from fastood.models import tiny_clip

PROMPT = "a photo of a {}"
FIRST_BITS = (
    5_166_489_603_836_389_754,
    8_506_655_336_168_082_078,
    2_245_332_017_688_228_465,
)  # numpy.random.PCG64(20)
METRICS = json.loads((tiny_clip.FOLDER / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return tiny_clip.load_tiny()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder like the shipped one, to be damaged."""
    return Path(shutil.copytree(tiny_clip.FOLDER, tmp_path / "tiny"))


def figure(name: str, part: str) -> dict:
    (row,) = (r for r in METRICS["held_out"] if r["set"] == name and r["part"].startswith(part))
    return row


@torch.no_grad()
def right(tiny, images: list[Image.Image], labels: list[int], classes: list[str]) -> float:
    model, preprocess, tokenizer = tiny
    text = model.encode_text(tokenizer([PROMPT.format(c) for c in classes]), normalize=True)
    pixels = torch.stack([preprocess(image) for image in images])
    image = torch.cat([model.encode_image(part) for part in pixels.split(100)])
    best = (F.normalize(image, dim=-1) @ text.T).argmax(1)
    return (best == torch.tensor(labels)).float().mean().item()


def near(measured: float, claimed: float, count: int) -> bool:
    """Within four standard errors of a sample of ``count``."""
    return abs(measured - claimed) <= 4 * math.sqrt(claimed * (1 - claimed) / count)


def test_file_stays_small_and_keeps_trained_rows_only():
    path = tiny_clip.FOLDER / "model.safetensors"
    assert path.stat().st_size == METRICS["bytes"] <= 8_000_000
    state = load_file(path)
    assert tiny_clip.TABLE not in state
    ids = state[tiny_clip.IDS]
    assert len(ids) == len(state[tiny_clip.ROWS]) == METRICS["token_rows"]
    assert bool((ids[1:] > ids[:-1]).all())
    assert all(bool(v.isfinite().all()) for k, v in state.items() if k != tiny_clip.IDS)


def test_loads_every_weight_into_the_registered_architecture(tiny):
    model, _, tokenizer = tiny
    stored = load_file(tiny_clip.FOLDER / "model.safetensors")
    loaded = model.state_dict()
    assert set(loaded) == set(stored) - {tiny_clip.ROWS, tiny_clip.IDS} | {tiny_clip.TABLE}
    for name in set(loaded) & set(stored):
        assert torch.equal(loaded[name], stored[name].float()), name
    assert all(v.dtype == torch.float32 for v in loaded.values())
    assert not model.training
    assert "fastood-tiny" in open_clip.list_models()
    config = open_clip.get_model_config("fastood-tiny")
    assert tokenizer(["dress"]).shape == (1, config["text_cfg"]["context_length"])
    assert type(model) is open_clip.CLIP


def test_rows_are_put_back_where_they_belong(tiny):
    table = tiny[0].state_dict()[tiny_clip.TABLE]
    stored = load_file(tiny_clip.FOLDER / "model.safetensors")
    ids = stored[tiny_clip.IDS].long()
    assert table.shape[0] == 49408
    assert torch.equal(table[ids], stored[tiny_clip.ROWS].float())
    other = torch.ones(len(table), dtype=torch.bool)
    other[ids] = False
    fill = tiny_clip.untrained_rows(*table.shape, seed=20, std=0.02)
    assert torch.equal(table[other], fill[other])
    assert len(table[other][:2000].unique(dim=0)) == 2000  # unknown words stay distinct


def test_untrained_rows_have_fixed_values():
    rows = tiny_clip.untrained_rows(2000, 64, seed=20, std=0.02)
    assert rows.dtype == torch.float32
    assert abs(rows.std().item() - 0.02) < 1e-4
    assert abs(rows.mean().item()) < 3e-4
    # values of PCG64(20), so that another numpy or machine cannot change the model unnoticed
    expected = [((x >> 40) / 2**24 - 0.5) * 0.02 * 12**0.5 for x in FIRST_BITS]
    np.testing.assert_allclose(rows[0, :3].numpy(), expected, rtol=1e-5)


def test_loading_is_deterministic_and_leaves_the_random_state_alone(tiny):
    before = torch.get_rng_state()
    again = tiny_clip.load_tiny()[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    first = tiny[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_missing_or_foreign_weights_are_refused(copied: Path):
    state = load_file(copied / "model.safetensors")
    del state["visual.proj"]
    save_file(state, copied / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \(visual\.proj"):
        tiny_clip.load_tiny(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match="no such file"):
        tiny_clip.load_tiny(copied)
    (copied / "config.json").unlink()
    with pytest.raises(WeightsUnavailable, match="reinstall"):
        tiny_clip.load_tiny(copied)


def test_known_words_are_silent():
    prompts = [PROMPT.format(c) for c in (*ID_CLASSES, "cat", "automobile", "digit 7", "letter A")]
    assert tiny_clip.untrained_tokens(prompts) == []
    assert tiny_clip.untrained_tokens([]) == []


def test_unknown_words_warn_once_and_are_named():
    (warning,) = tiny_clip.untrained_tokens(["a photo of a dress", "a photo of a zebra"])
    assert "'zebra'" in warning
    assert "'photo'" not in warning
    assert "1 of 2 prompts" in warning
    assert "'a photo of a zebra'" in warning


def test_every_openai_template_is_known():
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    prompts = [template("dress") for template in OPENAI_IMAGENET_TEMPLATES]
    assert tiny_clip.untrained_tokens(prompts) == []


def test_demo_photographs_are_classified_as_the_card_says(tiny):
    files = [p for c in ID_CLASSES for p in sorted((photo_folder(ID) / c).iterdir())]
    labels = [ID_CLASSES.index(p.parent.name) for p in files]
    images = [Image.open(p).convert("RGB") for p in files]
    rates = figure("clothing", "test")["per_class"].values()
    claimed = sum(rates) / len(rates)  # as many photographs of each class here
    measured = right(tiny, images, labels, list(ID_CLASSES))
    assert near(measured, claimed, len(files))
    assert measured > 0.4  # twice chance: the text and image towers belong together


def from_tar(path: Path, split: str, classes: list[str], most: int):
    """Up to ``most`` pictures of each class."""
    taken = dict.fromkeys(classes, 0)
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.split("/")
            if len(parts) != 3 or parts[0] != split or taken.get(parts[1], most) >= most:
                continue
            taken[parts[1]] += 1
            images.append(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
            labels.append(classes.index(parts[1]))
    return images, labels


@pytest.mark.data
def test_cifar10_accuracy_is_that_of_the_card(tiny, data_root: Path):
    row = figure("cifar10", "test")
    classes = list(row["per_class"])
    images, labels = from_tar(data_root / "images/cifar10_jpg.tar.gz", "test", classes, 50)
    assert len(images) == 500
    assert near(right(tiny, images, labels, classes), row["accuracy"], 500)


@pytest.mark.data
def test_clothing_accuracy_is_that_of_the_card(tiny, data_root: Path):
    row = figure("clothing", "test")
    archive = data_root / "images/clothing_cc0_96.tar"
    images, labels = from_tar(archive, "test", list(ID_CLASSES), 1000)
    assert len(images) == row["images"]
    # the same pictures: one may flip between machines
    assert abs(right(tiny, images, labels, list(ID_CLASSES)) - row["accuracy"]) < 1.5 / len(images)


def test_card_states_the_measured_figures():
    card = (tiny_clip.FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for row in METRICS["held_out"]:
        assert f"| {100 * row['accuracy']:.1f} % |" in card
    assert "demos and tests only" in card
    for kept_out in ("hat, outwear, shirt, shorts, skirt", "Omniglot", "no picture is shipped"):
        assert kept_out in card
