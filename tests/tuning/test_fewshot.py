"""Few-shot draws: against the published procedure, and from sets that cannot give them."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fastood.data import load_images
from fastood.data.imageset import ImageItem, ImageSet
from fastood.errors import DataError
from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.tuning.fewshot import coop_split, few_shot, take_features, write_split


def _images(counts: list[int], names: tuple[str, ...] | None = None) -> ImageSet:
    items = tuple(
        ImageItem(f"{k}/{i:03d}.png", lambda: b"", label=k)
        for k, count in enumerate(counts)
        for i in range(count)
    )
    return ImageSet("toy", ".", items, names or tuple(f"c{k}" for k in range(len(counts))))


def _features(n: int, k: int, *, local: bool = False) -> FeatureSet:
    image = torch.arange(n * 3.0).reshape(n, 3)
    patches = image[:, None, :].expand(n, 2, 3).half() if local else None
    cut = n // 3
    chunks = (
        FeatureChunk(0, image[:cut], None if patches is None else patches[:cut]),
        FeatureChunk(cut, image[cut:], None if patches is None else patches[cut:]),
    )
    labels = np.arange(n) % k
    return FeatureSet("toy", tuple(map(str, range(n))), labels, tuple("abcdefg"[:k]), chunks)


def test_shots_of_every_class_and_only_the_seed_decides():
    images = _images([7, 5, 9])
    chosen = few_shot(images, 4, seed=2)
    assert Counter(i.label for i in chosen) == {0: 4, 1: 4, 2: 4}
    assert [i.path for i in chosen] == sorted(i.path for i in chosen)
    assert few_shot(images, 4, seed=2) == chosen
    assert few_shot(images, 4, seed=3) != chosen
    assert "4 shots per class, seed 2" in chosen.layout
    assert few_shot(images, None) is images


def test_the_draw_is_the_one_of_python_random_sample():
    # pinned: a change of these lists changes everybody's training sets
    chosen = few_shot(_images([20, 20]), 3, seed=1)
    generator = random.Random(1)
    want = sorted(f"{k}/{i:03d}.png" for k in (0, 1) for i in generator.sample(range(20), 3))
    assert [i.path for i in chosen] == want
    assert want == PINNED


PINNED = ["0/002.png", "0/004.png", "0/018.png", "1/003.png", "1/008.png", "1/015.png"]


def test_features_are_drawn_like_images_with_their_patches():
    features = _features(20, 2, local=True)
    chosen = few_shot(features, 3, seed=5)
    rows = [int(p) for p in chosen.paths]
    assert torch.equal(chosen.image(), features.image()[rows])
    assert torch.equal(chosen.chunks[0].local[:, 0].float(), chosen.image())
    assert chosen.labels.tolist() == [r % 2 for r in rows]
    items = tuple(ImageItem(str(i), lambda: b"", label=i % 2) for i in range(20))
    assert [i.path for i in few_shot(ImageSet("t", ".", items), 3, seed=5)] == list(chosen.paths)


def test_classes_with_too_few_images_are_named_with_their_counts():
    with pytest.raises(ValueError, match=r"2 of 3 classes have fewer than 4 .*c0 \(3\), c2 \(1\)"):
        few_shot(_images([3, 4, 1]), 4)


@pytest.mark.parametrize("shots", [None, 1])
def test_classes_without_images_are_named(shots):
    with pytest.raises(ValueError, match="1 of 3 classes have no image: c1"):
        few_shot(_images([3, 0, 1]), shots)


@pytest.mark.parametrize("shots", [0, -1, 2.5, True])
def test_bad_shots_are_refused(shots):
    with pytest.raises(ValueError, match="shots"):
        few_shot(_images([3]), shots)


def test_images_without_labels_and_labels_without_names_are_refused():
    items = (ImageItem("a.png", lambda: b"", label=0), ImageItem("b.png", lambda: b""))
    with pytest.raises(ValueError, match=r"1 of 2 images have no label \(first b.png\)"):
        few_shot(ImageSet("x", ".", items), 1)
    with pytest.raises(ValueError, match="label 1 has no name"):
        few_shot(_images([2, 2], ("only",)), 1)


def _published(rows: dict[str, list], shots: int, seed: int) -> dict[str, list[str]]:
    """The procedure of CoOp's code, on the global generator, written down from reading it."""
    random.seed(seed)
    drawn = {}
    for split, count in (("train", shots), ("val", min(shots, 4))):
        groups = defaultdict(list)
        for path, label, _ in rows[split]:
            groups[label].append(path)
        drawn[split] = [path for items in groups.values() for path in random.sample(items, count)]
    return drawn


def _split_folder(folder: Path, rows: dict[str, list]) -> Path:
    for part in rows.values():
        for path, *_ in part:
            file = folder / "images" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    (folder / "split_zhou_Toy.json").write_text(json.dumps(rows))
    return folder / "split_zhou_Toy.json"


def test_a_coop_split_gives_the_images_of_the_published_procedure(tmp_path):
    generator = random.Random(7)
    rows = {
        split: [[f"{split}/{k}_{i}.jpg", k, f"name {k}"] for k in (2, 0, 1) for i in range(n)]
        for split, n in (("train", 30), ("val", 9), ("test", 2))
    }
    for part in rows.values():
        generator.shuffle(part)  # neither sorted by path nor grouped by class
    file = _split_folder(tmp_path, rows)
    for shots, seed in ((16, 1), (2, 3)):
        train, val = coop_split(file, shots, seed)
        want = _published(rows, shots, seed)
        assert [i.path for i in train] == sorted(want["train"])
        assert [i.path for i in val] == sorted(want["val"])
        assert train.class_names == ("name 0", "name 1", "name 2")
        assert all(i.label == int(i.path.split("/")[1].split("_")[0]) for i in (*train, *val))
    everything, _ = coop_split(tmp_path, None)
    assert len(everything) == 90


@pytest.mark.data
def test_published_splits_have_the_shots_they_are_used_with(data_root):
    for file in sorted((data_root / "text/coop_splits").glob("split_zhou_*.json")):
        rows = json.loads(file.read_bytes())
        train = ImageSet(
            file.stem, ".",
            tuple(ImageItem(p, lambda: b"", label=k) for p, k, _ in rows["train"]),
        )  # fmt: skip
        chosen = {i.path for i in few_shot(train, 16, seed=1)}
        assert chosen == set(_published(rows, 16, 1)["train"])


def test_a_written_split_is_read_back(tmp_path):
    rows = {"train": [[f"{k}/ü{i}.jpg", k, f"n{k}"] for k in (0, 1) for i in range(6)],
            "val": [[f"v{k}/{i}.jpg", k, f"n{k}"] for k in (0, 1) for i in range(5)]}  # fmt: skip
    train, val = coop_split(_split_folder(tmp_path, rows), 3)
    file = write_split(tmp_path / "split_fewshot" / "shot_3-seed_1.json", train=train, val=val)
    for split, images in (("train", train), ("val", val)):
        again = load_images(file, split=split, root=tmp_path / "images")
        assert [(i.path, i.label) for i in again] == [(i.path, i.label) for i in images]
        assert again.class_names == images.class_names
    with pytest.raises(ValueError, match="no class names"):
        write_split(tmp_path / "x.json", train=ImageSet("x", ".", train.items))


def test_splits_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no such split file"):
        coop_split(tmp_path / "none.json", 1)
    with pytest.raises(DataError, match="found 0"):
        coop_split(tmp_path, 1)
    file = _split_folder(tmp_path, {"train": [["a.jpg", 0, "a"]], "test": [["b.jpg", 0, "a"]]})
    with pytest.raises(DataError, match="val"):
        coop_split(file, 1)


def test_take_keeps_the_order_asked_for():
    assert take_features(_features(9, 3), [7, 0]).paths == ("7", "0")
