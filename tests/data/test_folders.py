"""Folders of images: order, classes, splits, names, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fastood.data import load_images
from fastood.data import paths as paths_module
from fastood.errors import DataError


def put(root: Path, *names: str) -> None:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name) * 7 % 256, 0, 0)).save(file)


def paths(images) -> list[str]:
    return [item.path for item in images]


def test_order_is_the_bytes_of_the_path(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "B.png", "a/z.png", "a.png", "a-b.png", "ä.png", "10.png", "9.png")
    images = load_images(tmp_path)
    assert paths(images) == sorted(paths(images), key=lambda p: p.encode())
    assert paths(images)[0] == "10.png"
    assert images.class_names is None  # images beside subfolders
    assert "beside subfolders" in images.layout


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "cat/2.JPG", "dog/deep/3.webp")
    (tmp_path / "bird").mkdir()
    (tmp_path / "dog" / "list.json").write_text("{}")
    images = load_images(tmp_path)
    assert images.class_names == ("cat", "dog")
    assert [(i.path, i.label) for i in images] == [
        ("cat/1.png", 0), ("cat/2.JPG", 0), ("dog/deep/3.webp", 1),
    ]  # fmt: skip
    assert images.class_counts() == {"cat": 2, "dog": 1}
    assert images.name == tmp_path.name
    for words in ("2 class subfolders", "3 images (1 to 2 per class)", "without images: bird",
                  "1 other file ignored (1 .json)"):  # fmt: skip
        assert words in images.layout
    assert images.items[0].read() == (tmp_path / "cat" / "1.png").read_bytes()


def test_junk_is_ignored(tmp_path: Path) -> None:
    put(tmp_path, "a.png", ".hidden.png", "__MACOSX/a.png", ".git/a.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "._a.png").write_bytes(b"x")
    assert paths(load_images(tmp_path)) == ["a.png"]
    assert load_images(tmp_path).layout == "folder, 1 image"


def test_links(tmp_path: Path) -> None:
    put(tmp_path / "real", "a.png")
    put(tmp_path / "set", "b.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert paths(load_images(tmp_path / "set")) == ["b.png", "gone.png", "linked/a.png"]


def test_link_to_itself_does_not_stop_the_rest(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    assert [item.path for item in load_images(tmp_path)] == ["a/1.png", "a/self.png"]


def test_empty_source_is_not_the_working_folder() -> None:
    with pytest.raises(DataError, match="expected a path, got an empty text"):
        load_images("")


def test_pipe_named_like_an_image_is_not_opened(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert paths(load_images(tmp_path)) == ["a.png"]


def test_splits(tmp_path: Path) -> None:
    put(tmp_path, "images/train/x/1.png", "images/validation/x/2.png", "images/validation/y/3.png")
    with pytest.raises(DataError, match=r"splits train, validation; say which"):
        load_images(tmp_path)
    images = load_images(tmp_path, split="val")
    assert images.class_names == ("x", "y")
    assert paths(images) == ["images/validation/x/2.png", "images/validation/y/3.png"]
    assert "split validation" in images.layout
    with pytest.raises(DataError, match=r"train, validation, got 'test'"):
        load_images(tmp_path, split="test")
    put(tmp_path, "images/preview.png")  # does not hide the splits
    assert len(load_images(tmp_path, split="train")) == 1
    with pytest.raises(DataError, match="say which"):
        load_images(tmp_path)
    put(tmp_path / "flat", "a.png")
    with pytest.raises(DataError, match="no split folders"):
        load_images(tmp_path / "flat", split="test")
    put(tmp_path / "one", "test/a.png", "test/b.png")  # SeTAR's OOD_*/test
    assert load_images(tmp_path / "one").class_names is None


def test_name_skips_folders_that_only_hold_the_set(tmp_path: Path) -> None:
    put(tmp_path / "dtd" / "images", "banded/1.png", "dotted/2.png")
    assert load_images(tmp_path / "dtd" / "images").name == "dtd"
    assert load_images(tmp_path / "dtd").class_names == ("banded", "dotted")
    assert load_images(tmp_path / "dtd", name="textures").name == "textures"


def test_given_names_set_the_label_order(tmp_path: Path) -> None:
    put(tmp_path, "Great_White-Shark/1.png", "cat/2.png", "tree frog/3.png")
    (tmp_path / "dog").mkdir()
    names = ["tree_frog", "great white shark", "Dog", "Cat"]
    images = load_images(tmp_path, class_names=names)
    assert [i.label for i in images] == [1, 3, 0]
    assert images.class_names == tuple(names)
    mapped = load_images(
        tmp_path,
        class_names={"cat": "a cat", "tree frog": "frog", "Great_White-Shark": "shark", "x": "y"},
    )
    assert [i.label for i in mapped] == [2, 0, 1]
    ordered = load_images(tmp_path, class_names=["A", "B", "C"], match="order")
    assert [i.label for i in ordered] == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "match", "words"),
    [
        (["cat", "dog", "cow"], "name", r"names without a class: cow"),
        (["cat"], "name", r"classes without a name: dog"),
        (["cat", "bird"], "name", r"without a name: dog; names without a class: bird"),
        (["cat", "Dog", "DOG"], "name", r"fit several names or share one: dog"),
        (["one", "two", "three"], "order", r"expected 2 names.*got 3"),
        ({"cat": "x"}, "name", r"also has dog"),
    ],
)
def test_names_that_do_not_match(tmp_path: Path, names, match: str, words: str) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png")
    with pytest.raises(DataError, match=words):
        load_images(tmp_path, class_names=names, match=match)


def test_names_need_classes(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    with pytest.raises(DataError, match="no class subfolders"):
        load_images(tmp_path, class_names=["cat"])
    with pytest.raises(TypeError, match="list of names"):
        load_images(tmp_path, class_names="cat")
    with pytest.raises(ValueError, match="match"):
        put(tmp_path / "s", "c/1.png")
        load_images(tmp_path / "s", class_names=["c"], match="best")


def test_wordnet_folders_take_names_from_classnames_txt(tmp_path: Path) -> None:
    put(tmp_path, "images/val/n01440764/1.png", "images/val/n01443537/2.png")
    (tmp_path / "classnames.txt").write_text(
        "n01443537 goldfish\nn01440764 tench\nn01484850 great white shark\n"
    )
    images = load_images(tmp_path / "images", split="val")
    assert images.class_names == ("goldfish", "tench")
    assert [i.label for i in images] == [1, 0]


def test_limit_is_spread_evenly(tmp_path: Path) -> None:
    put(tmp_path, *(f"{c}/{i}.png" for c in "abcde" for i in range(4)))
    images = load_images(tmp_path, limit=5)
    assert [i.label for i in images] == [0, 1, 2, 3, 4]
    assert "limited to 5 of 20 images" in images.layout
    assert len(load_images(tmp_path, limit=99)) == 20
    with pytest.raises(ValueError, match="limit"):
        load_images(tmp_path, limit=0)


def test_missing_and_empty(tmp_path: Path) -> None:
    put(tmp_path, "pictures/a.png")
    with pytest.raises(DataError, match=r"no such file or folder.*did you mean pictures"):
        load_images(tmp_path / "picture" / "x")
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"at least one image.*1 other file ignored \(1 .txt\)"):
        load_images(tmp_path / "void")
    with pytest.raises(DataError, match="expected a folder, a list"):
        (tmp_path / "a.zip").write_bytes(b"PK")
        load_images(tmp_path / "a.zip")
    with pytest.raises(DataError, match="load_features"):
        (tmp_path / "a.npz").write_bytes(b"PK")
        load_images(tmp_path / "a.npz")
    with pytest.raises(TypeError, match="source"):
        load_images(3)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    plain = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(paths_module.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list the folder .*/b: Permission denied"):
        load_images(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    raw = os.fsencode(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    for name in (b"\xff.png", b"\\xff.png", '<b>&"猫\n.png'.encode()):
        Path(os.fsdecode(raw + b"/" + name)).write_bytes(data)
    images = load_images(tmp_path)
    assert len(set(paths(images))) == 4
    assert "\\xff.png" in paths(images)
    for item in images:
        item.path.encode("utf-8")
        assert item.path.isprintable()
        assert item.read() == data


def test_lists_of_paths_and_single_images(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "y/2.png")
    images = load_images([tmp_path / "y" / "2.png", str(tmp_path / "x" / "1.png")])
    assert paths(images) == ["x/1.png", "y/2.png"]
    assert len(load_images(tmp_path / "x" / "1.png")) == 1
    assert load_images(images) is images
    with pytest.raises(DataError, match="the folder"):
        load_images([tmp_path / "x"])
    with pytest.raises(DataError, match="empty list"):
        load_images([])
    with pytest.raises(DataError, match="none of its 1 images exists"):
        load_images([tmp_path / "nothing.png"])
