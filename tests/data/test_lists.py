"""List files, CSV, CoOp splits, and the layouts of the field's projects."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from fastood.data import load_images, recognise
from fastood.errors import DataError


def put(root: Path, *names: str) -> None:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)


def found(images) -> list[tuple[str, int | None]]:
    return [(item.path, item.label) for item in images]


def test_openood_list(tmp_path: Path) -> None:
    data = tmp_path / "data"
    put(data / "images_classic", "cifar10/test/a b.png", "cifar10/test/c.png", "tin/d.png")
    lists = data / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    (lists / "test_cifar10.txt").write_text("cifar10/test/c.png 1\ncifar10/test/a b.png 0\n\n")
    (lists / "test_tin.txt").write_text("tin/d.png -1\n")
    images = load_images(lists / "test_cifar10.txt")
    assert found(images) == [("cifar10/test/a b.png", 0), ("cifar10/test/c.png", 1)]
    assert images.root.endswith("images_classic")
    assert images.name == "test_cifar10"
    assert found(load_images(lists / "test_tin.txt")) == [("tin/d.png", None)]
    named = load_images(lists / "test_cifar10.txt", class_names=["cat", "dog"])
    assert named.class_names == ("cat", "dog")
    with pytest.raises(DataError, match="labels up to 1, which needs 2 names, got 1"):
        load_images(lists / "test_cifar10.txt", class_names=["cat"])
    layout = recognise(data)
    assert layout is not None
    assert [(s.name, s.role) for s in layout.sets] == [
        ("cifar10/test_cifar10", "id"), ("cifar10/test_tin", "ood"),
    ]  # fmt: skip
    assert layout.missing == ("images_largescale",)
    with pytest.raises(DataError, match="collection"):
        load_images(data)
    assert found(load_images(layout.sets[1].source)) == [("tin/d.png", None)]


def test_missing_repeated_and_contradictory_entries(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    file = tmp_path / "list.txt"
    file.write_text("a.png 0\nb.png 1\na.png 0\nlost.png 1\n")
    images = load_images(file)
    assert len(images) == 3
    assert "1 missing file: lost.png" in images.layout
    assert "1 repeated line left out" in images.layout
    file.write_text("a.png 0\na.png 1\n")
    with pytest.raises(DataError, match="labels 0 and 1"):
        load_images(file)
    file.write_text("x/a.png 0\n")
    with pytest.raises(DataError, match=r"none of its 1 images.*root="):
        load_images(file)
    assert len(load_images(file.with_name("list.txt"), root=_moved(tmp_path))) == 1
    with pytest.raises(DataError, match="root: expected a folder"):
        load_images(file, root=tmp_path / "nowhere")
    file.write_text("\n \n")
    with pytest.raises(DataError, match="the file has none"):
        load_images(file)
    with pytest.raises(DataError, match="no splits"):
        load_images(file, split="test")


def _moved(tmp_path: Path) -> Path:
    put(tmp_path / "elsewhere" / "deep", "x/a.png")
    return tmp_path / "elsewhere" / "deep"


def test_list_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    data = (tmp_path / "a.png").read_bytes()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).write_bytes(data)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png 0\n\xe9.png\t1\r\n")
    images = load_images(tmp_path / "list.txt")
    assert found(images) == [("a.png", 0), ("\\xe9.png", 1)]
    assert images.items[1].read() == data


def test_csv(tmp_path: Path) -> None:
    put(tmp_path, "a, b.png", "c.png")
    file = tmp_path / "list.csv"
    file.write_text('path,label\n"a, b.png",dog\nc.png,cat\n')
    images = load_images(file)
    assert images.class_names == ("cat", "dog")
    assert found(images) == [("a, b.png", 1), ("c.png", 0)]
    turned = load_images(file, class_names=["Dog", "Cat"])
    assert found(turned) == [("a, b.png", 0), ("c.png", 1)]
    file.write_text("c.png,3\n")
    assert found(load_images(file)) == [("c.png", 3)]
    file.write_text('c.png,3\n"a, b.png",dog\n')
    with pytest.raises(DataError, match="got both"):
        load_images(file)


def test_list_separated_by_tabs_with_blanks_in_the_names(tmp_path: Path) -> None:
    put(tmp_path, "a b.png", "c d/e.png", "f\u2028g.png")
    file = tmp_path / "list.txt"
    file.write_text("a b.png\t0\nc d/e.png \t 1\nf\u2028g.png 2\n", encoding="utf-8")
    images = load_images(file)
    assert found(images) == [("a b.png", 0), ("c d/e.png", 1), ("f\u2028g.png", 2)]
    assert "missing" not in images.layout


@pytest.mark.parametrize("root", [False, True])
def test_list_made_on_windows(tmp_path: Path, root: bool) -> None:
    put(tmp_path / "pics", "cat/a b.png", "dog/c.png")
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfcat\\a b.png 0\r\ndog\\c.png 1\r\n")
    images = load_images(file, root=tmp_path / "pics" if root else None)
    assert found(images) == [("cat/a b.png", 0), ("dog/c.png", 1)]
    images.items[0].read()


def test_list_line_longer_than_a_name_can_be(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text(f"a.png 0\n{'x' * 300}.png 1\n")
    assert "1 missing file" in load_images(tmp_path / "list.txt").layout


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,label\na.png,20,dog\nb.png,30,cat\n",
        "label,width,image_path\ndog,20,a.png\ncat,30,b.png\n",
        "class,path\ndog,a.png\ncat,b.png\n",
        "where,what\na.png,dog\nb.png,cat\n",
        ",path,label\n0,a.png,dog\n1,b.png,cat\n",
    ],
)
def test_csv_columns_are_found_by_name(tmp_path: Path, text: str) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(text)
    images = load_images(tmp_path / "list.csv")
    assert images.class_names == ("cat", "dog")
    assert found(images) == [("a.png", 1), ("b.png", 0)]


def test_csv_columns_are_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    file = tmp_path / "list.csv"
    file.write_text("path,width,species\na.png,20,3\n")
    with pytest.raises(DataError, match="called 'path' and 'label', got path, width, species"):
        load_images(file)
    file.write_text('"' + "a" * 200_000 + '",1\n')
    with pytest.raises(DataError, match=r"expected CSV 'path,label'; field larger"):
        load_images(file)


def coop(folder: Path, images: str = "images") -> Path:
    put(folder / images, "x/1.png", "y/2.png", "y/3.png")
    file = folder / "split_zhou_DescribableTextures.json"
    rows = {"train": [["x/1.png", 0, "ex"]], "val": [], "test": [["y/3.png", 1, "why"],
            ["y/2.png", 1, "why"], ["x/1.png", 0, "ex"]]}  # fmt: skip
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize("images", ["images", "jpg", "101_ObjectCategories"])
def test_coop_split(tmp_path: Path, images: str) -> None:
    file = coop(tmp_path / "dtd", images)
    for source in (file, tmp_path / "dtd"):
        got = load_images(source, split="test")
        assert found(got) == [("x/1.png", 0), ("y/2.png", 1), ("y/3.png", 1)]
        assert got.class_names == ("ex", "why")
        assert got.name == "dtd"
        assert "split test" in got.layout
        got.items[0].read()
    assert load_images(file, split="test", class_names=["Why", "Ex"]).items[0].label == 1
    with pytest.raises(DataError, match="has the splits test, train, val; say which"):
        load_images(tmp_path / "dtd")
    with pytest.raises(DataError, match="'val' is empty"):
        load_images(file, split="val")
    with pytest.raises(DataError, match="got 'best'"):
        load_images(file, split="best")


def test_broken_coop_split(tmp_path: Path) -> None:
    file = tmp_path / "split_zhou_X.json"
    for text in ("{", "[1, 2]", '{"test": [[1]]}', '{"test": [["a", "b", "c"]]}'):
        file.write_text(text)
        with pytest.raises(DataError, match="split_zhou_X"):
            load_images(file, split="test")


def test_mcm_and_locoop_layouts(tmp_path: Path) -> None:
    ood = tmp_path / "ImageNet_OOD_dataset"
    put(ood, "iNaturalist/images/1.png", "SUN/images/1.png", "dtd/images/banded/1.png",
        "dtd/images/dotted/1.png")  # fmt: skip
    put(tmp_path, "ImageNet10/val/n01440764/1.png")
    whole = recognise(tmp_path)
    assert whole is not None
    assert whole.name == "MCM data sets"
    assert [(s.name, s.role) for s in whole.sets] == [
        ("ImageNet10", "id"), ("iNaturalist", "ood"), ("SUN", "ood"), ("Texture", "ood"),
    ]  # fmt: skip
    assert "Places" in whole.missing
    assert "missing" in whole.description
    for s in whole.sets:
        assert len(load_images(s.source, name=s.name, split=s.split)) > 0
    part = recognise(ood)
    assert part is not None
    assert part.missing == ("Places",)
    with pytest.raises(DataError, match="iNaturalist, SUN, Texture"):
        load_images(ood)
    put(tmp_path / "flat", "SUN/1.png", "Texture/1.png")
    flat = recognise(tmp_path / "flat")
    assert flat is not None
    assert flat.name == "LoCoOp OOD sets"
    assert flat.missing == ("iNaturalist", "Places")
    put(tmp_path / "flat", "imagenet/images/val/n01440764/1.png")
    (tmp_path / "flat/imagenet/classnames.txt").write_text("n01440764 tench\n")
    both = recognise(tmp_path / "flat")
    assert both is not None
    assert [(s.name, s.split, s.role) for s in both.sets] == [
        ("imagenet", "val", "id"), ("SUN", None, "ood"), ("Texture", None, "ood"),
    ]  # fmt: skip
    assert both.missing == ("imagenet/images/train", "iNaturalist", "Places")


def test_coop_layout(tmp_path: Path) -> None:
    coop(tmp_path / "dtd")
    put(tmp_path, "imagenet/images/val/n01440764/1.png")
    (tmp_path / "oxford_pets" / "images").mkdir(parents=True)
    layout = recognise(tmp_path)
    assert layout is not None
    assert [(s.name, s.split) for s in layout.sets] == [
        ("imagenet", "val"), ("dtd", "train"), ("dtd", "val"), ("dtd", "test"),
    ]  # fmt: skip
    assert set(layout.missing) == {
        "imagenet/images/train", "imagenet/classnames.txt",
        "oxford_pets/split_zhou_OxfordPets.json",
    }  # fmt: skip
    one = recognise(tmp_path / "dtd")
    assert one is not None
    assert one.name == "CoOp dtd"


def test_setar_layout(tmp_path: Path) -> None:
    put(tmp_path, "ID_VOC/test/cat/1.png", "ID_VOC/val/cat/1.png", "OOD_COCO/test/1.png")
    (tmp_path / "OOD_SUN").mkdir()
    layout = recognise(tmp_path)
    assert layout is not None
    assert [(s.name, s.split, s.role) for s in layout.sets] == [
        ("ID_VOC", "val", "id"), ("ID_VOC", "test", "id"), ("OOD_COCO", "test", "ood"),
    ]  # fmt: skip
    assert layout.missing == ("OOD_SUN/test",)
    for s in layout.sets:
        assert len(load_images(s.source, split=s.split)) == 1


def test_ordinary_folders_are_not_recognised(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "SUN/2.png")
    assert recognise(tmp_path) is None
    assert recognise(tmp_path / "nothing") is None


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["dtd", "oxford_flowers", "oxford_pets", "caltech101"])
def test_real_coop_splits(data_root: Path, tmp_path: Path, dataset: str) -> None:
    """The published split files, with empty files standing in for the pictures."""
    files = {"dtd": "DescribableTextures", "oxford_flowers": "OxfordFlowers",
             "oxford_pets": "OxfordPets", "caltech101": "Caltech101"}  # fmt: skip
    import numpy as np

    split_file = f"split_zhou_{files[dataset]}.json"
    content = (data_root / "text" / "coop_splits" / split_file).read_bytes()
    (tmp_path / split_file).write_bytes(content)
    for path, _, _ in json.loads(content)["val"]:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path).touch()
    images = load_images(tmp_path, split="val")
    features = np.load(data_root / "features" / "vitb32" / f"{dataset}.npz")
    rows = features["split"] == "val"
    assert len(images) == rows.sum()
    assert images.class_names is not None
    assert len(images.class_names) == len(features["class_names"])
    wanted = np.bincount(features["labels"][rows])
    assert np.bincount([i.label for i in images]).tolist() == wanted.tolist()
