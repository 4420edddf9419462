"""Whole searches: against the plain search, resumed, refused."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastood.data import load_images
from fastood.data.imageset import ImageSet
from fastood.errors import DataError, ModelError
from fastood.models import OpenClipEncoder, load_model
from fastood.setar import Objective, authors, make_plan, published, search
from fastood.setar.evaluate import Evaluator
from fastood.setar.run import RECIPE
from fastood.setar.table import CANDIDATES, SETTINGS
from tests.models import tiny
from tests.setar.plain_search import Plain, plain_search, top_down
from tests.tolerances import SEARCH_F64_RTOL
from tests.tuning.towers import open_clip_encoder

NAMES = ["apple", "boat", "cat", "door", "egg"]
SIZE = 24


def preprocess(image: Image.Image) -> Tensor:
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return (x.permute(2, 0, 1) - 0.45) * 4


def encoder_of(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> OpenClipEncoder:
    """Random towers of four and three blocks whose weights have weak directions."""
    found = open_clip_encoder(
        dtype, image=tiny.vision(layers=4), text={"layers": 3}, custom=False, **options
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in found.model.named_parameters():
            if p.ndim == 2 and "embedding" not in name:
                u, s, v = torch.linalg.svd(
                    torch.randn(p.shape, generator=g, dtype=torch.float64), full_matrices=False
                )
                s = s * torch.linspace(1, 0, len(s), dtype=torch.float64) ** 2
                p.copy_((u * s) @ v * 0.7)
        found.model.logit_scale.fill_(2.0)
    return OpenClipEncoder(found.model, preprocess, tiny.TOKENIZER, preprocess_id="plain")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    folder = tmp_path_factory.mktemp("id")
    g = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(2):
            noise = g.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((SIZE, SIZE)).save(folder / name / f"{i}.png")
    return load_images(folder)


def stacked(images: ImageSet) -> tuple[Tensor, Tensor]:
    from fastood.data.decode import decode

    pixels = torch.stack([preprocess(decode(item.read())) for item in images])
    return pixels.double(), torch.tensor([item.label for item in images])


def plainly(encoder, images, visits, **options) -> Plain:
    pixels, labels = stacked(images)
    prompts = [[f"a photo of a {name}" for name in NAMES]]
    return plain_search(encoder, pixels, labels, prompts, visits, **options)


OPTIONS = {"top_k": 2, "weight": 0.5, "batch_size": 4, "ratios": (0, 0.1, 0.25, 0.4)}
PLAIN = {"top_k": 2, "weight": 0.5, "batches": (4, 4, 2), "ratios": (0, 0.1, 0.25, 0.4)}


def visits_of(encoder, order: str, kind: str, projections: bool):
    image = top_down(encoder.model, "image", kind, projection=projections)
    text = top_down(encoder.model, "text", kind, projection=projections)
    return {
        "image_text": [*image, *text],
        "text_image": [*text, *image],
        "image": image,
        "text": text,
        "exhaustive": [*image, *text],
    }[order]


def check(found, expected: Plain) -> None:
    ours = [(p.tower, p.kind, p.layer, p.ratio) for p in found.recipe.picks]
    assert ours == expected.picks
    for step, pick in enumerate(found.recipe.picks):  # the best so far
        best = min(e.loss for e in expected.evaluated if e.step <= step)
        assert pick.objective == pytest.approx(best, rel=SEARCH_F64_RTOL)
    assert found.final.loss == pytest.approx(expected.best.loss, rel=SEARCH_F64_RTOL)
    theirs = {
        (e.step + 1, e.tower, e.kind, e.layer, e.ratio): e for e in expected.evaluated if e.ratio
    }
    rows = [row for row in found.rows if row.matrix]
    assert len(rows) == len(theirs)
    for row in rows:
        parts = row.matrix.split(".")
        layer = int(parts[1]) if len(parts) == 3 else None
        e = theirs[row.visit, parts[0], parts[-1], layer, row.ratio]
        assert row.value.loss == pytest.approx(e.loss, rel=SEARCH_F64_RTOL)
        assert row.value.patches == pytest.approx(e.patches, rel=SEARCH_F64_RTOL)
        assert row.value.ood_patches == e.ood_patches


@pytest.mark.parametrize(
    ("order", "kind", "projections", "seed"),
    [
        ("image_text", "up", False, 0),
        ("image_text", "up", True, 1),
        ("image_text", "down", False, 2),
        ("image_text", "q", False, 3),
        ("image_text", "v", True, 4),
        ("text_image", "up", True, 5),
        ("image", "o", False, 6),
        ("text", "k", False, 7),
        ("exhaustive", "up", False, 8),
    ],
)
def test_picks_and_losses_are_those_of_the_plain_search(images, order, kind, projections, seed):
    encoder = encoder_of(seed)
    found = search(encoder, images, order=order, kinds=kind, projections=projections, **OPTIONS)
    visits = visits_of(encoder, order, kind, projections)
    expected = plainly(encoder, images, visits, exhaustive=order == "exhaustive", **PLAIN)
    check(found, expected)
    if order == "image_text" and kind == "up":
        assert len({p.ratio for p in found.recipe.picks}) > 1  # the comparison means something


def test_the_partition_decides_and_global_is_one_batch(images):
    encoder = encoder_of()
    visits = visits_of(encoder, "image_text", "up", False)
    found = search(encoder, images, partition="global", **{**OPTIONS, "batch_size": None})
    check(found, plainly(encoder, images, visits, **{**PLAIN, "batches": (10,)}))
    assert found.baseline.loss != search(encoder, images, **OPTIONS).baseline.loss


def test_batches_are_the_authors_by_default(images, monkeypatch):
    monkeypatch.setitem(authors._BATCH, "base", 4)  # of 512
    options = {**OPTIONS, "batch_size": None, "order": "image", "layers": [-1]}
    found = search(encoder_of(), images, **options)
    assert found.recipe.search["partition"] == {"kind": "reference", "batches": [4, 4, 2]}


def test_interleaved_goes_block_by_block():
    plan = make_plan(open_clip_encoder().model, order="interleaved", projections=True)
    assert [m.address for m in plan.matrices] == [
        "image.proj", "text.proj", "image.1.up", "text.1.up", "image.0.up", "text.0.up",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="equal depth, got 4 image and 3 text"):
        make_plan(encoder_of().model, order="interleaved")


def test_projections_come_with_any_choice_of_layers():
    model = encoder_of().model
    plan = make_plan(model, projections=True, layers=[-1, 0])
    assert [m.address for m in plan.matrices] == [
        "image.proj", "image.3.up", "image.0.up", "text.proj", "text.2.up", "text.0.up",
    ]  # fmt: skip
    plan = make_plan(model, order="text", kinds=["proj", "down", "q"], layers=[1])
    assert [m.address for m in plan.matrices] == ["text.proj", "text.1.down", "text.1.q"]


def test_single_changes_the_best_matrix_alone(images):
    encoder = encoder_of()
    found = search(encoder, images, order="single", kinds=["up", "down"], **OPTIONS)
    best = min(found.rows, key=lambda row: row.value.loss)
    assert [(p.address, p.count) for p in found.recipe.changes] == [(best.matrix, best.count)]
    assert found.final == best.value
    assert len(found.recipe.picks) == 2 * 7


@pytest.mark.parametrize("equal", [False, True])
def test_the_recipe_makes_the_model_of_the_final_value(images, equal):
    """Picks applied to the model give the loss the search ended with."""
    encoder = encoder_of(1)
    for block in encoder.model.visual.transformer.resblocks if equal else ():
        with torch.no_grad():  # singular values that tie at every cut
            block.mlp.c_fc.weight.copy_(torch.eye(*block.mlp.c_fc.weight.shape).flip(0))
    found = search(encoder, images, **OPTIONS)
    changed = found.recipe.apply(encoder)
    again = search(changed, images, order="single", **{**OPTIONS, "ratios": (0.05,)})
    assert again.baseline.loss == pytest.approx(found.final.loss, rel=SEARCH_F64_RTOL)
    assert found.final.loss < found.baseline.loss


@pytest.mark.parametrize("options", [{"metric": "patches"}, {"metric": "auroc", "score": "l_mcm"}])
def test_what_reaches_the_class_token_alone_gains_nothing_by_rounding(images, options):
    """Attention weights of the last block, for an objective of patches."""
    found = search(
        encoder_of(1), images, order="image", kinds=["q", "k"], layers=[-1], **OPTIONS, **options
    )
    assert {p.ratio for p in found.recipe.picks} == {0}
    assert {row.value.objective for row in found.rows} == {found.baseline.objective}
    # what else is said of them is theirs
    plain = plainly(encoder_of(1), images, [("image", "q", 3), ("image", "k", 3)], **PLAIN)
    theirs = {(e.kind, e.ratio): e.cross_entropy for e in plain.evaluated if e.step == 0}
    ours = {r.ratio: r.value.cross_entropy for r in found.rows if r.matrix == "image.3.q"}
    assert len(set(ours.values())) == 3
    for ratio, value in ours.items():
        assert value == pytest.approx(theirs["q", ratio], rel=SEARCH_F64_RTOL)


def test_what_cannot_matter_has_the_value_of_the_model_it_was_tried_on(images):
    """Not of the best candidate of the same visit."""
    options = {**OPTIONS, "metric": "patches", "order": "single", "layers": [-1]}
    found = search(encoder_of(1), images, kinds=["v", "q"], **options)
    values = {row.value.objective for row in found.rows if row.matrix == "image.3.q"}
    assert values == {found.baseline.objective}
    assert any(r.matrix == "image.3.v" and found.baseline.objective > r.value.objective
               for r in found.rows)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["minor", "principal"])
def test_directions_that_are_gone_are_not_dropped_again(images, dtype, part):
    """A second search over the same matrices: only rounding is left to gain from."""
    encoder = encoder_of(2, dtype)
    with torch.no_grad():
        for name, p in encoder.model.named_parameters():
            if "c_fc.weight" in name:  # flat spectra, so that rounding is large beside them
                u, _, v = torch.linalg.svd(p, full_matrices=False)
                p.copy_(u @ v)
    options = {**OPTIONS, "part": part, "ratios": (0.4,)}
    first = search(encoder, images, **options)
    assert first.recipe.changes
    changed = first.recipe.apply(encoder)
    second = search(changed, images, **{**options, "ratios": (0.1, 0.25, 0.4), "part": "minor"})
    again = {p.address for p in first.recipe.changes}
    for row in second.rows[1:]:
        if row.matrix in again:
            before = [second.baseline, *(p for p in second.recipe.picks[: row.visit - 1])]
            assert row.value.objective == before[-1].objective
    assert not again & {p.address for p in second.recipe.changes}


def test_an_exhaustive_search_computes_nothing_on_a_model_it_has_tried(images, monkeypatch):
    computed = []
    run = Evaluator.candidates

    def counting(self, candidates, done=None):
        computed.append(candidates[0].matrix.address)
        return run(self, candidates, done)

    monkeypatch.setattr(Evaluator, "candidates", counting)
    found = search(encoder_of(5), images, order="exhaustive", layers=[-1, -2], **OPTIONS)
    accepted = sum(pick.count > 0 for pick in found.recipe.picks)
    assert 0 < accepted < 3  # of four: the last visits find nothing
    assert len(computed) == sum(4 - i for i in range(accepted + 1))
    assert len(found.rows) == 1 + 3 * (4 + 3 + 2 + 1)
    values = {row.key: row.value for row in found.rows}
    for (visit, matrix, count), value in values.items():
        if visit > accepted + 1:
            assert value == values[visit - 1, matrix, count]


def test_equal_ratios_and_those_that_round_to_nothing_are_tried_once(images):
    encoder = encoder_of()
    found = search(encoder, images, order="image", **{**OPTIONS, "ratios": (0, 0.001, 0.1, 0.101)})
    assert len(found.rows) == 1 + 4  # 32 directions: 0, 0, 3, 3


@pytest.mark.parametrize("metric", ["auroc", "aupr", "fpr"])
def test_metrics_are_objectives(images, metric):
    encoder = encoder_of()
    found = search(encoder, images, metric=metric, score="mcm", order="image", **OPTIONS)
    values = [row.value.objective for row in found.rows]
    assert found.final.objective == (min if metric == "fpr" else max)(values)
    assert all(row.value.scores["mcm"][metric] == row.value.objective for row in found.rows)


# ------------------------------------------------------------------------------------ resuming


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


def test_progress_ends_at_the_whole_and_never_goes_back(images):
    for order in ("image_text", "exhaustive"):
        seen = []
        search(encoder_of(), images, order=order, progress=seen.append, **OPTIONS)
        shares = [at.done for at in seen]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0, abs=0.02)
        assert seen[-1].visit == seen[-1].visits


# ------------------------------------------------------------------------------------ refused


def refused(images, match: str, error=ValueError, encoder=None, **options) -> None:
    with pytest.raises(error, match=match):
        search(encoder or encoder_of(), images, **{**OPTIONS, **options})


def test_what_is_refused_before_any_image_is_read(images, monkeypatch):
    monkeypatch.setattr(Evaluator, "__init__", None)  # nothing gets that far
    refused(images, r"chunk: expected 1 <= chunk, got 0", chunk=0)
    refused(images, r"chunk: expected an integer .* got 1.5", chunk=1.5)
    refused(images, r"memory: expected 0 <= memory, got -1", memory=-1)
    refused(images, r"encoder: .* got CLIP; wrap", TypeError, encoder_of().model)
    refused(["a.png"], r"images: expected an ImageSet .* got list", TypeError)
    refused(images, r"class_names: expected a list of names, got the text", TypeError,
            class_names="abcde")  # fmt: skip
    refused(images, r"ratios: .*share in \[0, 1\), got 1.5", ratios=(0, 1.5))
    refused(images, r"ratios: .*share in \[0, 1\), got -0.1", ratios=(-0.1,))
    refused(images, r"ratios: .*nan", ratios=(float("nan"),))
    refused(images, "ratios: expected shares or numbers.*both", ratios=(0.1, 5))
    refused(images, r"directions <= min\(m, n\) = 32, got 33", ratios=(33,))
    refused(images, "ratios: expected at least one that drops", ratios=(0,))
    refused(images, "ratios: expected a list", ratios=0.1)
    refused(images, r"image.proj .*: 0.99 drops all 16 directions", ratios=(0.99,), kinds="proj")
    refused(images, "kinds: .*got 'mlp'", kinds="mlp")
    refused(images, "kinds: .*did you mean 'W_up'", kinds="W_upp")
    refused(images, "layers: expected numbers in -4..3", layers=[7])
    refused(images, "order: .*did you mean 'exhaustive'", order="exhaustiv")
    refused(images, "top_k", top_k=5)
    refused(images, "top_k", top_k=0)
    refused(images, "partition: expected one of reference, global", partition="batches")
    refused(images, "batch_size", batch_size=0)
    refused(images, "id_set: voc has 14 classes, got 5", id_set="voc")
    refused(images, "id_set: expected one of imagenet, voc", id_set="cifar")
    refused(images, "score", metric="auroc")
    refused(images, "metric", metric="f1")
    refused(images, "label 4 has no name", class_names=NAMES[:4])


def test_unlabelled_images_are_refused(images, tmp_path):
    for item in list(images)[:3]:
        (tmp_path / Path(item.path).name).write_bytes(item.read())
    refused(load_images(tmp_path), "have no label", class_names=NAMES)


def test_weights_that_are_not_finite_are_refused(images):
    encoder = encoder_of()
    with torch.no_grad():
        encoder.model.transformer.resblocks[1].mlp.c_fc.weight[3, 4] = float("nan")
    refused(images, r"text.1.up has NaN or Inf", ModelError, encoder)


def test_weights_that_are_computed_from_others_are_refused(images):
    encoder = encoder_of()
    block = encoder.model.visual.transformer.resblocks[0]
    torch.nn.utils.parametrizations.weight_norm(block.mlp.c_fc)
    with pytest.raises(ModelError, match=r"image\.0\.up: .* computed from other parameters"):
        search(encoder, images, **OPTIONS)


def test_resnets_are_excluded_with_the_reason(images):
    model = tiny.clip(tiny.RESNET)
    encoder = OpenClipEncoder(model, preprocess, tiny.TOKENIZER)
    refused(images, "ResNets are excluded", ModelError, encoder)


def test_an_image_that_cannot_be_read_is_named(images, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no picture" if name == "cat" else b"")
    for item in list(images)[::2]:
        if "cat" not in item.path:
            (tmp_path / item.path).write_bytes(item.read())
    refused(load_images(tmp_path), "cat/0.png", DataError)


def test_batches_without_pseudo_ood_patches_are_reported(images):
    found = search(encoder_of(), images, order="text", **{**OPTIONS, "top_k": 4, "batch_size": 1})
    if not found.baseline.empty_batches:
        pytest.skip("every image has an OOD patch")
    assert "have no pseudo-OOD patch; their patch term is 0" in found.notes[0]
    assert found.recipe.search["notes"] == list(found.notes)


@pytest.mark.parametrize(("metric", "noted"), [("auroc", True), ("loss", False)])
def test_a_metric_at_its_best_is_reported(images, monkeypatch, metric, noted):
    """Nothing is strictly better, so a search can only end with the model as it is."""
    score = "mcm" if metric == "auroc" else None
    monkeypatch.setattr(
        "fastood.setar.tally._metrics", lambda *_: {"auroc": 1.0, "aupr": 1.0, "fpr": 0.0}
    )
    found = search(encoder_of(), images, metric=metric, score=score, order="text", layers=[-1])
    assert any("nothing can be better" in note for note in found.notes) is noted


def test_equal_prompts_tie_and_are_counted(images):
    names = ["apple", "boat", "cat", "cat", "egg"]
    with pytest.warns(RuntimeWarning, match="cat"):
        found = search(encoder_of(), images, order="text", class_names=names, **OPTIONS)
    assert found.baseline.ties > 0
    assert any("ties at the k-th logit" in note for note in found.notes)


def test_published_settings():
    assert published("base", 1000) == published("base", 1000, "imagenet")
    assert (published("base", 14, "voc").weight, published("base", 14, "voc").top_k) == (0.05, 4)
    assert (published("large", 1000).weight, published("large", 1000).top_k) == (0.5, 300)
    assert (published("large", 14, "voc").weight, published("large", 14, "voc").top_k) == (0.3, 6)
    swin = published("swin", 1000)
    assert (swin.weight, swin.top_k, swin.batch) == (0.01, 700, 384)
    other = published("base", 100)
    assert (other.weight, other.top_k, other.batch) == (0.1, 30, 512)
    assert "0.3 K" in other.source
    with pytest.raises(ValueError, match="nothing is published"):
        published("swin", 14, "voc")


def test_the_shipped_model_is_searched(images):
    """Real weights, float32: some picks lower the loss, and the objective is what was asked."""
    found = search(load_model("fastood-tiny"), images, order="text", ratios=(0, 0.2))
    assert found.final.objective <= found.baseline.objective
    assert found.recipe.search["objective"] == Objective(top_k=2, weight=0.1).describe()
