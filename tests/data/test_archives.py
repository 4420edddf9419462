"""Tar shards, Hugging Face data sets and files of features."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastood.data import decode, load_features, load_images
from fastood.data.shards import expand_braces
from fastood.errors import DataError


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def shard(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def shades(images) -> list[int]:
    return [decode(item.read()).getpixel((0, 0))[0] for item in images]


def test_webdataset_labels(tmp_path: Path) -> None:
    shard(tmp_path / "a-000.tar", {"1.png": picture(1), "1.cls": b"4", "1.txt": b"caption"})
    shard(tmp_path / "a-001.tar", {"0.json": b'{"label": 2}', "0.jpg.png": picture(2),
                                   "9.png": picture(3), "readme.md": b"hello"})  # fmt: skip
    for pattern in ("a-{000..001}.tar", "a-*.tar", "a-{000,001}.tar"):
        images = load_images(tmp_path / pattern)
        assert [(i.path, i.label) for i in images] == [
            ("a-000.tar!1.png", 4), ("a-001.tar!0.jpg.png", 2), ("a-001.tar!9.png", None),
        ]  # fmt: skip
        assert shades(images) == [1, 2, 3]
    assert "tar shards (2)" in images.layout
    assert "1 other file ignored (1 .md)" in images.layout
    with pytest.raises(DataError, match="labels up to 4"):
        load_images(tmp_path / "a-*.tar", class_names=["x"])


def test_class_names_in_json(tmp_path: Path) -> None:
    members = {}
    for i, name in enumerate(["cat", "dog", "cat"]):
        members[f"{i}.png"] = picture(i)
        content = {"label": ["cat", "dog"].index(name), "class": name}
        members[f"{i}.json"] = json.dumps(content).encode()
    images = load_images(shard(tmp_path / "s.tar", members))
    assert images.class_names == ("cat", "dog")
    assert [i.label for i in images] == [0, 1, 0]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2"])
def test_class_folders_in_a_tar(tmp_path: Path, suffix: str) -> None:
    mode = {".tar": "w", ".tar.bz2": "w:bz2"}.get(suffix, "w:gz")
    members = {"./test/dog/1.png": picture(1), "./test/cat/2.png": picture(2),
               "./train/cat/3.png": picture(3), "._x.png": b"", "LICENSE": b"free"}  # fmt: skip
    file = shard(tmp_path / f"pets{suffix}", members, mode)
    images = load_images(file, split="test")
    assert images.name == "pets"
    assert images.class_names == ("cat", "dog")
    assert [i.label for i in images] == [0, 1]
    assert shades(images) == [2, 1]
    assert [i.part for i in images] == ["test/cat/2.png", "test/dog/1.png"]
    with pytest.raises(DataError, match="splits test, train"):
        load_images(file)


@pytest.mark.parametrize("damage", ["cut in a header", "header overwritten"])
def test_shard_whose_end_is_lost_is_not_a_smaller_set(tmp_path: Path, damage: str) -> None:
    file = shard(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(9)})
    data = file.read_bytes()
    with tarfile.open(file) as archive:
        header = archive.getmembers()[5].offset
    if damage == "cut in a header":
        file.write_bytes(data[: header + 300])
    else:
        file.write_bytes(data[:header] + b"\xff" * 512 + data[header + 512 :])
    with pytest.raises(DataError, match=f"not a complete tar archive: no header at byte {header}"):
        load_images(file)
    file.write_bytes(data[:header])  # without the closing zeros, which some writers leave out
    assert len(load_images(file)) == 5


def test_damaged_shards(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", {f"{i}.png": picture(i) * 40 for i in range(9)})
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.tar: not a complete tar"):
        load_images(file)
    file.write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="not a complete tar"):
        load_images(file)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(b"\x1f\x8b" + b"x" * 50)
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_images(packed)
    with pytest.raises(DataError, match=r"missing: .*c-001\.tar"):
        shard(tmp_path / "c-000.tar", {"1.png": picture(1)})
        load_images(tmp_path / "c-{000..001}.tar")
    with pytest.raises(DataError, match="none found"):
        load_images(tmp_path / "d-*.tar")
    with pytest.raises(DataError, match="expected images"):
        load_images(shard(tmp_path / "e.tar", {"a.txt": b"x"}))


def test_braces() -> None:
    assert expand_braces("a{08..11}{x,y}") == [
        "a08x", "a08y", "a09x", "a09y", "a10x", "a10y", "a11x", "a11y",
    ]  # fmt: skip
    with pytest.raises(DataError, match="empty or too long"):
        expand_braces("{9..1}")


def test_known_digest_of_a_member_spares_reading_it(tmp_path: Path) -> None:
    """Members of one shard are told apart although size and times are the shard's."""
    from fastood.data.digests import DigestTable, digest_bytes

    images = load_images(shard(tmp_path / "a.tar", {"1.png": picture(1), "2.png": picture(2)}))
    stamps = [DigestTable.stamp(item) for item in images]
    assert stamps[0] is not None
    assert stamps[0] != stamps[1]
    assert stamps[0][2:] == stamps[1][2:]
    assert digest_bytes(images.items[0].read()) != digest_bytes(images.items[1].read())


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"label": [1, 0, 1], "picture": [{"bytes": picture(i), "path": None} for i in range(3)]}
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["cat", "dog"]), "picture": datasets.Image()}
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    images = load_images(dataset, name="pets")
    assert images.class_names == ("cat", "dog")
    assert [(i.path, i.label) for i in images] == [("0", 1), ("1", 0), ("2", 1)]
    assert shades(images) == [0, 1, 2]
    assert "picture" in images.layout
    assert shades(load_images(dataset.with_format("torch"))) == [0, 1, 2]
    turned = load_images(dataset, class_names=["Dog", "Cat"])
    assert [i.label for i in turned] == [0, 1, 0]
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    assert shades(load_images(both, split="test")) == [1]
    with pytest.raises(DataError, match="splits test, train"):
        load_images(both)
    with pytest.raises(DataError, match="no splits"):
        load_images(dataset, split="test")
    with pytest.raises(DataError, match="type Image"):
        load_images(dataset.remove_columns("picture"))
    with pytest.raises(DataError, match="streaming=False"):
        load_images(dataset.to_iterable_dataset())
    (tmp_path / "x.png").write_bytes(picture(9))
    files = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "x.png")]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    assert shades(load_images(files)) == [9]


def test_features_npz(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    file = tmp_path / "set.npz"
    np.savez(file, features=values, labels=np.array([0, 1, -1, 1, 0], np.int16),
             class_names=np.array(["cat", "dog"]), local=np.ones((5, 2, 3), np.float32),
             split=np.array(["test", "val", "test", "val", "test"]))  # fmt: skip
    whole = load_features(file)
    assert whole.name == "set"
    assert len(whole) == 5
    assert whole.has_local
    assert whole.image().dtype == torch.float16
    np.testing.assert_array_equal(whole.image().numpy(), values)
    test = load_features(file, split="test", name="x")
    assert test.name == "x"
    assert test.paths == ("0", "2", "4")
    assert test.labels is not None
    assert test.labels.tolist() == [0, -1, 0]
    np.testing.assert_array_equal(test.image().numpy(), values[[0, 2, 4]])
    with pytest.raises(DataError, match="test, val, got 'train'"):
        load_features(file, split="train")


def test_features_safetensors_and_npy(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    values = torch.randn(4, 3, dtype=torch.bfloat16)
    save_file(
        {"image_features": values, "labels": torch.tensor([0, 0, 1, 1])},
        tmp_path / "f.safetensors",
        {"class_names": json.dumps(["a", "b"]), "split": json.dumps(["x", "x", "y", "y"])},
    )
    found = load_features(tmp_path / "f.safetensors", split="y")
    assert torch.equal(found.image(), values[2:])
    assert found.class_names == ("a", "b")
    np.save(tmp_path / "g.npy", values.float().numpy())
    assert torch.equal(load_features(tmp_path / "g.npy").image(), values.float())


def broken(**changes) -> dict[str, np.ndarray]:
    good = {"features": np.ones((4, 3), np.float32), "labels": np.zeros(4, np.int64)}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (broken(features=None), "expected an array 'features'"),
        (broken(features=np.ones((4, 3), np.int32)), "floating point"),
        (broken(features=np.ones(4, np.float32)), r"\(n, D\)"),
        (broken(features=np.ones((0, 3), np.float32)), "not empty"),
        (broken(features=np.diag([1, 1, 0, 1]).astype(np.float32)), "row 2"),
        (broken(features=np.full((4, 3), np.nan, np.float32)), "4 of 4 rows"),
        (broken(labels=np.zeros(3, np.int64)), r"labels: expected \(4,\)"),
        (broken(labels=np.zeros(4)), "integers"),
        (broken(labels=np.full(4, 2), class_names=np.array(["a"])), "go up to 2"),
        (broken(local=np.ones((4, 2, 5), np.float32)), "local: expected"),
        (broken(file_names=np.array(["a"])), "file_names"),
        (broken(class_names=np.array([{"a": 1}], dtype=object)), "pickled objects"),
    ],
)
def test_features_that_cannot_be_used(tmp_path: Path, arrays: dict, words: str) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_features(tmp_path / "f.npz")


def test_feature_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_features(tmp_path / "f.npz")
    for name in ("f.npz", "f.safetensors", "f.npy"):
        (tmp_path / name).write_bytes(b"junk" * 10)
        with pytest.raises(DataError, match=name) as caught:
            load_features(tmp_path / name)
        assert "pickle" not in str(caught.value)
    (tmp_path / "f.pt").write_bytes(b"PK")
    with pytest.raises(DataError, match="unpickling"):
        load_features(tmp_path / "f.pt")
    (tmp_path / "f.h5").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"expected .npz"):
        load_features(tmp_path / "f.h5")


@pytest.mark.data
def test_real_features(data_root: Path) -> None:
    cifar = load_features(data_root / "features" / "vitb32" / "cifar10_500.npz")
    assert len(cifar) == 500
    assert cifar.class_names is not None
    assert len(cifar.class_names) == 10
    assert cifar.paths[0].endswith(".jpg") or "/" in cifar.paths[0]
    flowers = load_features(data_root / "features" / "vitb32" / "oxford_flowers.npz", split="test")
    assert len(flowers) == 2463


@pytest.mark.data
def test_real_archives(data_root: Path) -> None:
    clothing = load_images(data_root / "images" / "clothing_cc0_96.tar", split="validation")
    assert len(clothing) == 341
    assert clothing.class_counts()["t-shirt"] == 81
    assert min(decode(clothing.items[0].read()).size) == 96
    samples = load_images(data_root / "images" / "skimage_samples.tar")
    assert len(samples) == 11
    assert samples.class_names is None
    omniglot = load_images(data_root / "images" / "omniglot_small.tar.gz")
    assert len(omniglot) == 4840
    assert decode(omniglot.items[-1].read()).size == (105, 105)
