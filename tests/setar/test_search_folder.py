"""Searches and their folder: stopped, resumed, damaged, taken by another."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastood.data import load_images
from fastood.errors import DataError
from fastood.setar import search
from fastood.setar.evaluate import Evaluator
from fastood.setar.run import RECIPE
from fastood.setar.table import CANDIDATES, SETTINGS
from tests.setar.searches import NAMES, OPTIONS, encoder_of


class Stopped(Exception):
    pass


def test_a_stopped_search_goes_on_with_the_same_result(images, tmp_path, monkeypatch):
    encoder = encoder_of()
    expected = search(encoder, images, out=tmp_path / "whole", **OPTIONS)
    computed: list[str] = []
    run = Evaluator.candidates

    def failing(self, candidates, done=None):
        if len(computed) % 3 == 2:
            computed.append("stopped")
            raise Stopped
        computed.append(candidates[0].matrix.address)
        return run(self, candidates, done)

    monkeypatch.setattr(Evaluator, "candidates", failing)
    found = None
    while found is None:
        try:
            found = search(encoder, images, out=tmp_path / "parts", **OPTIONS)
        except Stopped:
            assert not (tmp_path / "parts" / RECIPE).exists()
    assert computed.count("stopped") >= 2
    assert len([c for c in computed if c != "stopped"]) == 7  # nothing twice
    assert found.recipe.picks == expected.recipe.picks
    assert [r.key for r in found.rows] == [r.key for r in expected.rows]
    assert [r.value for r in found.rows] == [r.value for r in expected.rows]
    # a finished one computes nothing, not even the features of an image
    monkeypatch.setattr(Evaluator, "__init__", None)
    assert search(encoder, images, out=tmp_path / "parts", **OPTIONS).recipe == found.recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["text", "exhaustive"])
def test_a_table_cut_anywhere_gives_the_same_bits(images, tmp_path, order, dtype):
    """Also between candidates of one matrix, which share products."""
    encoder, options = encoder_of(dtype=dtype), {"order": order, "layers": [-1], **OPTIONS}
    expected = search(encoder, images, out=tmp_path, **options)
    recipe, table = (tmp_path / RECIPE).read_bytes(), tmp_path / CANDIDATES
    content = table.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in (0, 30, len(content) - 7, len(content) // 2, *ends[1:6]):
        table.write_bytes(content[:cut])
        found = search(encoder, images, out=tmp_path, **options)
        assert (tmp_path / RECIPE).read_bytes() == recipe
        assert [r.key for r in found.rows] == [r.key for r in expected.rows]
        assert [r.value for r in found.rows] == [r.value for r in expected.rows]
        assert len(table.read_text().splitlines()) == len(content.splitlines())


def test_a_damaged_table_is_refused(images, tmp_path):
    encoder = encoder_of()
    search(encoder, images, out=tmp_path, order="text", **OPTIONS)
    table = tmp_path / CANDIDATES
    lines = table.read_text().splitlines()
    cells = lines[2].split(",")
    for at, wrong in ((5, "nan"), (5, "x"), (3, "1.5")):
        damaged = ",".join([*cells[:at], wrong, *cells[at + 1 :]])
        table.write_text("\n".join([*lines[:2], damaged, *lines[3:], ""]))
        with pytest.raises(DataError, match=r"candidates\.csv: is damaged .*remove it"):
            search(encoder, images, out=tmp_path, order="text", **OPTIONS)


def test_the_table_can_be_read_by_anyone(images, tmp_path):
    found = search(encoder_of(), images, out=tmp_path, order="text", **OPTIONS)
    rows = list(csv.DictReader((tmp_path / CANDIDATES).open()))
    assert [float(r["loss"]) for r in rows] == [r.value.loss for r in found.rows]
    assert [r["matrix"] for r in rows][:2] == ["", "text.2.up"]
    saved = json.loads((tmp_path / RECIPE).read_text())
    assert saved["search"]["baseline"]["loss"] == found.baseline.loss
    assert saved["search"]["partition"] == {"kind": "reference", "batches": [4, 4, 2]}
    assert saved["search"]["images"]["number"] == 10


def test_another_search_is_not_overwritten(images, tmp_path):
    encoder = encoder_of()
    search(encoder, images, out=tmp_path, order="text", **OPTIONS)
    before = (tmp_path / CANDIDATES).read_bytes()
    for changes in ({"weight": 0.4}, {"order": "image"}, {"ratios": (0, 0.1)}, {"batch_size": 5}):
        with pytest.raises(DataError, match="holds another search"):
            search(encoder, images, out=tmp_path, **{"order": "text", **OPTIONS, **changes})
    with pytest.raises(DataError, match=r"another search.*fingerprint"):
        search(encoder_of(9), images, out=tmp_path, order="text", **OPTIONS)
    assert (tmp_path / CANDIDATES).read_bytes() == before
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(DataError, match=r"without search\.json"):
        search(encoder, images, out=tmp_path, order="text", **OPTIONS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / SETTINGS).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        search(encoder, images, out=tmp_path / "notes", order="text", **OPTIONS)


def test_a_search_takes_the_place_of_another_with_its_first_value(images, tmp_path, monkeypatch):
    encoder = encoder_of()
    search(encoder, images, out=tmp_path, order="text", **OPTIONS)
    (tmp_path / "report.html").touch()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = {"order": "text", **OPTIONS, "weight": 0.4}

    def kept() -> bool:
        return before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    for wrong in ({"metric": "none"}, {"top_k": 5}, {"order": "none"}):
        with pytest.raises(ValueError):
            search(encoder, images, out=tmp_path, overwrite=True, **{**other, **wrong})
        assert kept()
    baseline = Evaluator.baseline
    monkeypatch.setattr(Evaluator, "baseline", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        search(encoder, images, out=tmp_path, overwrite=True, **other)
    assert kept()
    monkeypatch.setattr(Evaluator, "baseline", baseline)
    monkeypatch.setattr(Evaluator, "candidates", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        search(encoder, images, out=tmp_path, overwrite=True, **other)
    # they would be of the other search
    assert not (tmp_path / RECIPE).exists() and not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    found = search(encoder, images, out=tmp_path, **other)
    assert len(found.rows) == 1 + 3 * 3
    assert json.loads((tmp_path / SETTINGS).read_text())["settings"]["objective"]["weight"] == 0.4


def test_a_folder_without_a_value_is_free_for_other_images(images, tmp_path):
    """An image cannot be read, is replaced, and the same command works."""
    folder = tmp_path / "id"
    for item in images:
        (folder / NAMES[item.label]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[item.label] / Path(item.path).name).write_bytes(item.read())
    broken = folder / "cat" / "0.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    options = {**OPTIONS, "order": "text", "out": tmp_path / "out"}
    with pytest.raises(DataError, match=r"cat/0\.png"):
        search(encoder_of(), load_images(folder), **options)
    broken.write_bytes(content)
    found = search(encoder_of(), load_images(folder), **options)
    assert (tmp_path / "out" / RECIPE).exists()
    assert found.baseline == search(encoder_of(), images, **{**OPTIONS, "order": "text"}).baseline


def test_a_recipe_from_elsewhere_is_not_overwritten(images, tmp_path):
    (tmp_path / RECIPE).write_text("mine")
    with pytest.raises(DataError, match=r"recipe\.json without search\.json"):
        search(encoder_of(), images, out=tmp_path, **OPTIONS)
    assert (tmp_path / RECIPE).read_text() == "mine"


def test_images_are_known_by_content(images, tmp_path):
    """A moved folder goes on, a replaced picture does not."""
    for item in images:
        target = tmp_path / "moved" / item.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(item.read())
    encoder, out = encoder_of(), tmp_path / "out"
    found = search(encoder, images, out=out, order="text", **OPTIONS)
    again = search(encoder, load_images(tmp_path / "moved"), out=out, order="text", **OPTIONS)
    assert again.recipe.picks == found.recipe.picks
    first, other = sorted((tmp_path / "moved" / "apple").iterdir())
    first.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"another search.*images\.digest"):
        search(encoder, load_images(tmp_path / "moved"), out=out, order="text", **OPTIONS)


def test_images_are_known_by_their_labels_too(images, tmp_path):
    a, b = images.items[0], images.items[-1]
    swapped = (replace(a, label=b.label), *images.items[1:-1], replace(b, label=a.label))
    encoder, options = encoder_of(), {"out": tmp_path, "order": "text", **OPTIONS}
    search(encoder, images, **options)
    with pytest.raises(DataError, match=r"another search.*images\.digest"):
        search(encoder, replace(images, items=swapped), **options)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_searches_do_not_share_a_folder(images, tmp_path):
    """Rows of both would stand in one table."""
    encoder = encoder_of()
    options = {"order": "text", "out": tmp_path / "out", **OPTIONS}
    seen = []

    def meanwhile(_) -> None:
        if not seen:
            with pytest.raises(DataError, match="another search is running there"):
                search(encoder, images, **options)
            seen.append(True)

    found = search(encoder, images, progress=meanwhile, **options)
    assert seen
    assert search(encoder, images, **options).recipe == found.recipe  # it is free again


def test_the_seed_is_part_of_a_search_only_where_something_is_drawn(images, tmp_path):
    encoder = encoder_of()
    options = {"order": "text", "out": tmp_path, **OPTIONS}
    search(encoder, images, seed=1, **options)
    search(encoder, images, seed=2, **options)
    search(encoder, images, seed=1, part="random", **{**options, "out": tmp_path / "r"})
    with pytest.raises(DataError, match=r"another search.*seed"):
        search(encoder, images, seed=2, part="random", **{**options, "out": tmp_path / "r"})
