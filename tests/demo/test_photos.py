"""The demo's pictures: complete, unchanged, openly licensed, and never seen in training."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from fastood import demo

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = demo.manifest()["files"]


def example(name: str) -> ModuleType:
    """A script of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_counts_are_the_planned_ones():
    folders = Counter(row["path"].rpartition("/")[0] for row in FILES)
    assert demo.manifest()["count"] == len(FILES) == 191
    planned = {f"{part}/{c}": 12 for part in ("id", "calibration") for c in demo.ID_CLASSES}
    planned |= {f"near/{c}": 8 for c in demo.NEAR_OOD_CLASSES}
    assert folders == {**planned, "far-scikit-image": 11, "far-omniglot": 20}


def test_disk_and_manifest_hold_the_same_unchanged_files():
    root = demo.photo_folder()
    on_disk = {
        p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in (".jpg", ".png")
    }
    assert on_disk == {row["path"] for row in FILES}
    for row in FILES:
        assert sha256(root / row["path"]) == row["sha256"], row["path"]
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) < 2_000_000


def test_pictures_decode_and_differ():
    for row in FILES:
        with Image.open(demo.photo_folder() / row["path"]) as image:
            image.load()
            assert min(image.size) >= 96 or "omniglot" in row["path"], row["path"]
    assert len({row["sha256"] for row in FILES}) == len(FILES)


def test_parts_come_from_separate_splits():
    split = {"id": "test", "near": "test", "calibration": "validation"}
    for row in FILES:
        part = row["path"].split("/")[0]
        if part in split:
            source_split, label, _ = row["source"].split("/")
            assert source_split == split[part]
            assert label == row["path"].split("/")[1]


def test_every_picture_has_an_open_licence_whose_text_ships():
    assert {row["licence"] for row in FILES} == {"CC0-1.0", "MIT", "public domain"}
    root = demo.photo_folder()
    assert "CC0 1.0" in (root / "LICENCE-clothing.txt").read_text(encoding="utf-8")
    assert "Permission is hereby granted" in (root / "LICENCE-omniglot.txt").read_text()
    terms = (root / "LICENCE-scikit-image.txt").read_text(encoding="utf-8")
    for row in FILES:
        if row["path"].startswith("far-scikit-image"):
            assert f"{row['source']}: " in terms
    assert "LICENCE-omniglot.txt" in (root / "LICENCES.md").read_text(encoding="utf-8")


def test_classes_do_not_overlap_and_near_ood_ones_are_not_trained():
    assert not set(demo.ID_CLASSES) & set(demo.NEAR_OOD_CLASSES)
    sets = example("tiny_clip_sets")
    assert tuple(sets.NAMES["clothing"]) == demo.ID_CLASSES
    assert set(sets.NAMES) == {"cifar10", "clothing", "mnist", "notmnist"}
    words = {name for aliases in sets.class_table()[0] for name in aliases}
    assert not words & set(demo.NEAR_OOD_CLASSES)
    prompts = " ".join(sets.every_prompt()).replace("t-shirt", "").lower().split()
    assert not {word.strip(".,") for word in prompts} & set(demo.NEAR_OOD_CLASSES)


def test_photo_folder_names_its_parts():
    for part in (demo.ID, demo.CALIBRATION, *demo.OOD):
        assert demo.photo_folder(part).is_dir()
    with pytest.raises(ValueError, match=r"part: expected one of id, .* got 'far'"):
        demo.photo_folder("far")


@pytest.mark.data
def test_no_shipped_photograph_is_in_the_train_split(data_root: Path):
    shipped = {row["sha256"] for row in FILES}
    trained = set()
    with tarfile.open(data_root / "images/clothing_cc0_96.tar") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("train/"):
                trained.add(hashlib.sha256(tar.extractfile(member).read()).hexdigest())
    assert len(trained) > 3000
    assert not shipped & trained


@pytest.mark.data
def test_selection_script_writes_the_shipped_pictures_again(data_root: Path, tmp_path: Path):
    rows = example("make_demo_photos").write(data_root / "images", tmp_path)
    again = {row["path"]: row for row in rows}
    assert set(again) == {row["path"] for row in FILES}
    for row in FILES:
        assert again[row["path"]]["source"] == row["source"]
        if "scikit" not in row["path"]:  # re-encoded ones depend on the JPEG library
            assert again[row["path"]]["sha256"] == row["sha256"]
