"""Whole searches against the plain search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastood.data.imageset import ImageSet
from fastood.models import load_model
from fastood.setar import Objective, authors, make_plan, published, search
from fastood.setar.evaluate import Evaluator
from tests.setar.plain_search import Plain, plain_search, top_down
from tests.setar.searches import NAMES, OPTIONS, encoder_of, preprocess
from tests.tolerances import SEARCH_F64_RTOL
from tests.tuning.towers import open_clip_encoder


def stacked(images: ImageSet) -> tuple[Tensor, Tensor]:
    from fastood.data.decode import decode

    pixels = torch.stack([preprocess(decode(item.read())) for item in images])
    return pixels.double(), torch.tensor([item.label for item in images])


def plainly(encoder, images, visits, **options) -> Plain:
    pixels, labels = stacked(images)
    prompts = [[f"a photo of a {name}" for name in NAMES]]
    return plain_search(encoder, pixels, labels, prompts, visits, **options)


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


def test_progress_ends_at_the_whole_and_never_goes_back(images):
    for order in ("image_text", "exhaustive"):
        seen = []
        search(encoder_of(), images, order=order, progress=seen.append, **OPTIONS)
        shares = [at.done for at in seen]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0, abs=0.02)
        assert seen[-1].visit == seen[-1].visits


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
