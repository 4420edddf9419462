"""Class-name files, templates, and names that cannot be told apart."""

from __future__ import annotations

import json

import pytest
import torch

from fastood.data.prompts import (
    TEMPLATES,
    check_class_names,
    clean_name,
    fill,
    read_class_names,
    resolve_templates,
)
from fastood.errors import DataError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_files_ignore_blanks_and_byte_order_marks(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffcat \n\n  dog\r\n\tété\n")
    assert read_class_names(path) == ["cat", "dog", "été"]


def test_wordnet_lines_map_folders_to_names(tmp_path):
    text = "n01440764 tench\nn01443537 goldfish bowl\n"
    found = read_class_names(write(tmp_path / "classnames.txt", text))
    assert found == {"n01440764": "tench", "n01443537": "goldfish bowl"}
    mixed = read_class_names(write(tmp_path / "b.txt", text + "plain\n"))
    assert mixed == ["n01440764 tench", "n01443537 goldfish bowl", "plain"]
    with pytest.raises(DataError, match="more than once: n01440764"):
        read_class_names(write(tmp_path / "c.txt", text + "n01440764 again\n"))


def test_json_lists_and_mappings(tmp_path):
    path = tmp_path / "names.json"
    assert read_class_names(write(path, json.dumps([" cat ", "dog"]))) == ["cat", "dog"]
    assert read_class_names(write(path, '{"d1": "cat", "d0": "dog"}')) == {"d1": "cat", "d0": "dog"}
    for text, words in [
        ("{", "not valid JSON"),
        ("[]", "got nothing in it"),
        ("{}", "got nothing in it"),
        ("3", "got 3"),
        ('["a", ["b", "c"]]', "expected a name"),
        ('["a", ""]', "expected a name"),
        ('{"a": {"b": "c"}}', "expected a name"),
        ('{"a": "x", "a": "y"}', "more than once: a"),
    ]:
        with pytest.raises(DataError, match=words):
            read_class_names(write(path, text))


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")
    with pytest.raises(DataError, match="empty file"):
        read_class_names(write(tmp_path / "e.txt", " \n\n"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(tmp_path / "b.txt")


def test_clean_name():
    assert clean_name("german__shorthaired  pointer_") == "german shorthaired pointer"


def test_duplicates_are_refused_or_reported():
    names = ["crane", "missile", "crane", "missile", "cat"]
    with pytest.raises(ValueError, match=r"'crane' \(2 times\), 'missile' \(2 times\)"):
        check_class_names(names)
    (note,) = check_class_names(names, allow_duplicates=True)
    assert "tie exactly" in note
    assert check_class_names(["cat", "dog"]) == []


def test_names_the_text_tower_cannot_tell_apart():
    (note,) = check_class_names(["Cardigan", "cat", "cardigan"])
    assert "'Cardigan' = 'cardigan'" in note
    underscores, alike = check_class_names(["a b", "a_b"])
    assert "1 name(s) contain underscores (a_b)" in underscores and "'a b' = 'a_b'" in alike

    def cased(names):  # a tokenizer that keeps case but cuts after three letters
        return torch.tensor([[ord(c) for c in n[:3]] for n in names])

    assert check_class_names(["Cardigan", "cardigan"], tokenize=cased) == []
    (note,) = check_class_names(["cardigan", "carpet"], tokenize=cased)
    assert "'cardigan' = 'carpet'" in note


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ([], ValueError, "at least one"),
        (["cat", "  "], ValueError, r"class_names\[1\]"),
        ("cat", TypeError, "one string"),
        (["cat", 3], TypeError, r"class_names\[1\]: expected text, got int"),
    ],
)
def test_unusable_names(names, error, words):
    with pytest.raises(error, match=words):
        check_class_names(names)


def test_templates_by_name_single_and_several():
    assert resolve_templates("mcm") == ("a photo of a {}",)
    assert resolve_templates("coop") == ("a photo of a {}.",)
    assert resolve_templates("a {} here") == ("a {} here",)
    assert resolve_templates(["a {}", "the {}"]) == ("a {}", "the {}")
    assert len(TEMPLATES["openai-imagenet-80"]) == 80
    assert set(TEMPLATES["openai-imagenet-7"]) < set(TEMPLATES["openai-imagenet-80"])
    for name in TEMPLATES:
        assert all(t.count("{}") == 1 for t in resolve_templates(name))


@pytest.mark.parametrize("bad", ["a photo", [], ["a photo"], ["{} and {}"], [3], ["{0}"]])
def test_bad_templates(bad):
    with pytest.raises(ValueError, match="templates"):
        resolve_templates(bad)


def test_braces_elsewhere_are_left_alone():
    assert fill("{x} a {} photo", "{} cat") == "{x} a {} cat photo"


@pytest.mark.data
def test_openai_templates_are_the_published_ones(data_root):
    path = data_root / "text" / "openai_clip" / "imagenet_classes_templates.json"
    published = json.loads(path.read_text())["imagenet_templates"]
    assert list(TEMPLATES["openai-imagenet-80"]) == published
