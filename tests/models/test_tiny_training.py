"""The training and export scripts, on a handful of made-up pictures."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastood.demo import ID_CLASSES, NEAR_OOD_CLASSES

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("tiny_clip_sets", "train_tiny_clip", "export_tiny_clip")
POISON = b"not a picture: reading this fails"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield SimpleNamespace(**{name: __import__(name) for name in SCRIPTS})
    torch.set_num_threads(threads)
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def image_sets(folder: Path, cifar_classes: list[str], *, poison_held_out: bool) -> Path:
    """The four files of the real image sets, tiny; what must not be trained on is unreadable."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    cifar, clothing = {}, {}
    for split in ("train", "test", "validation"):
        good = split == "train" or not poison_held_out
        for label in cifar_classes:
            for number in range(6):
                name = f"{split}/{label}/{number}.jpg"
                cifar[name] = picture(rng, (32, 32)) if good else POISON
        for label in ID_CLASSES:
            for number in range(4):
                name = f"{split}/{label}/{number}.jpg"
                clothing[name] = picture(rng, (96, 130)) if good else POISON
        clothing |= {f"{split}/{label}/0.jpg": POISON for label in NEAR_OOD_CLASSES}
    archive(folder / "cifar10_jpg.tar.gz", cifar)
    archive(folder / "clothing_cc0_96.tar", clothing)
    for name in ("mnist", "notmnist"):
        np.savez(
            folder / f"{name}_10k.npz",
            images=rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
            labels=np.arange(40, dtype=np.uint8) % 10,
        )
    return folder


def train(scripts: SimpleNamespace, data: Path, run: Path, *options: str) -> None:
    fixed = ["--data", str(data), "--run", str(run), "--batch", "16", "--threads", "1"]
    args = scripts.train_tiny_clip.parser().parse_args([*fixed, "--log-every", "1", *options])
    scripts.train_tiny_clip.train(args)


def test_trains_resumes_and_exports_without_reading_what_is_kept_out(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    classes = list(scripts.tiny_clip_sets.CIFAR_NAMES)
    poisoned = image_sets(tmp_path / "poisoned", classes, poison_held_out=True)
    run = tmp_path / "run"
    train(scripts, poisoned, run, "--steps", "2")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["seen"]) == (2, 2 * 17)  # shares of 16, each set rounded
    kept = torch.load(run / "training_pixels.pt", weights_only=True)
    assert {name: len(part[1]) for name, part in kept.items()} == {
        "cifar10": 60,
        "clothing": 20,
        "mnist": 36,
        "notmnist": 36,
    }
    train(scripts, poisoned, run, "--steps", "3", "--resume")
    assert "resumed at step 2" in capsys.readouterr().out
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 3

    whole = image_sets(tmp_path / "whole", classes, poison_held_out=False)
    out = tmp_path / "out"
    export = scripts.export_tiny_clip
    training = export.write(run, out)
    rows = export.measure(out, whole)
    assert training["steps"] == 3
    assert [(r["set"], r["images"]) for r in rows] == [
        ("cifar10", 60),
        ("clothing", 20),
        ("clothing", 20),
        ("mnist", 4),
        ("notmnist", 4),
    ]
    card = export.card(training, rows, scale=12.0)
    assert f"| {100 * rows[0]['accuracy']:.1f} % |" in card
    assert "[[" not in card
    assert json.loads((out / "fastood-tiny.json").read_text())["embed_dim"] == 192


def test_same_seed_and_steps_give_the_same_weights(scripts: SimpleNamespace, tmp_path: Path):
    classes = list(scripts.tiny_clip_sets.CIFAR_NAMES)
    data = image_sets(tmp_path / "data", classes, poison_held_out=True)
    states = []
    for name in ("one", "two"):
        train(scripts, data, tmp_path / name, "--steps", "1")
        checkpoint = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        states.append(checkpoint["master"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_augmentation_keeps_shape_and_range_and_plain_pictures_at_no_strength(
    scripts: SimpleNamespace,
):
    sets = scripts.tiny_clip_sets
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for name in ("cifar10", "mnist"):
        out = sets.augment(pixels, name, 1.0, torch.Generator().manual_seed(0))
        assert out.shape == (8, 3, 64, 64)
        assert 0 <= out.min() < out.max() <= 1
    flat = torch.full((4, 3, 80, 80), 77, dtype=torch.uint8)
    out = sets.augment(flat, "clothing", 0.0, torch.Generator().manual_seed(0))
    assert torch.allclose(out, torch.full_like(out, 77 / 255), atol=1e-3)
