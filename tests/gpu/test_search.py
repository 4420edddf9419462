"""SeTAR on a GPU: the picks and losses of the CPU, recipes, and what training would start from."""

from __future__ import annotations

import pytest
import torch

from fastood.models.copies import network_of
from fastood.models.matrices import list_matrices
from fastood.setar import LowRankBasis, search, truncated_svd
from fastood.setar.recipe import Recipe
from tests.setar import searches as clip
from tests.setar import test_swin_search as swin
from tests.tolerances import SEARCH_F64_RTOL
from tests.tuning.towers import ENCODERS

OPTIONS = {"ratios": [0, 0.2, 0.4], "top_k": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return clip.noise_images(tmp_path_factory.mktemp("id"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return swin.noise_images(tmp_path_factory.mktemp("swin"))


def on(device, encoder):
    """The encoder there, with its own preprocessing."""
    more = {"preprocess_id": encoder.preprocess_id, "name": encoder.name}
    if encoder.head() is not None:
        more["class_names"] = encoder.class_names
        return type(encoder)(encoder.model.to(device), encoder.preprocess, **more)
    return type(encoder)(encoder.model.to(device), encoder.preprocess, encoder.tokenizer, **more)


def same(found, want):
    assert [p.count for p in found.recipe.picks] == [p.count for p in want.recipe.picks]
    assert any(p.count for p in want.recipe.picks)
    for a, b in zip(found.rows, want.rows, strict=True):
        assert a.key == b.key
        assert a.value.objective == pytest.approx(b.value.objective, rel=SEARCH_F64_RTOL)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "text_image", "projections": True, "chunk": 3, "memory": 0},
        {"order": "exhaustive", "kinds": ["v", "o"], "layers": [-1]},
        {"order": "single", "kinds": ["q", "k", "down"], "part": "random"},
        {"metric": "auroc", "score": "gl_mcm"},
        {"metric": "auroc", "score": "energy", "pred_label": True, "partition": "global"},
    ],
    ids=str,
)
def test_searches_find_what_the_cpu_finds(options, gpu, images):
    want = search(clip.encoder_of(), images, **OPTIONS, **options)
    with gpu as device, torch.no_grad():
        encoder = on(device, clip.encoder_of())
        found = search(encoder, images, **OPTIONS, **options)
        assert encoder.device == device
    same(found, want)


@pytest.mark.parametrize("kind", ["timm v2", "hf v1"])
def test_a_swin(kind, gpu, labelled):
    options = {"order": "image", "ratios": swin.RATIOS, "top_k": swin.TOP_K, "weight": 0.5}
    want = search(swin.encoder(kind), labelled, **options)
    with gpu as device, torch.no_grad():
        found = search(on(device, swin.encoder(kind)), labelled, **options)
    same(found, want)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_recipes_are_applied_where_the_model_is(name, factored, gpu):
    recipe = Recipe((("image", "up", 1, 0.5), ("text", "v", 0, 3)), "principal")
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = recipe.apply(ENCODERS[name]()).encode_image(x).image
    with gpu as device, torch.no_grad():
        made = recipe.apply(on(device, ENCODERS[name]()), factored=factored)
        assert {p.device for p in network_of(made).parameters()} == {device}
        torch.testing.assert_close(made.encode_image(x.to(device)).image.cpu(), want)


def test_low_rank_weights(gpu):
    w = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    ours = LowRankBasis(w)
    want = [*ours.drop([0.25, 5]), *ours.factors(4), ours.values, ours.energy(0.5)]
    want += list(truncated_svd(w, rank=3))
    with gpu as device, torch.no_grad():
        basis = LowRankBasis(w.to(device))
        found = [*basis.drop([0.25, 5]), *basis.factors(4), basis.values, basis.energy(0.5)]
        found += list(truncated_svd(w.to(device), rank=3))
        assert {x.device for x in found} == {device}
        found = [x.cpu() for x in found]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.abs(), b.abs())  # vectors have no sign


def test_a_candidate_waits_for_the_gpu_a_few_times(images):
    """Not once an operator: the tower of a chunk is queued before its value is asked for."""
    from tests.gpu.pretence import PretendedGPU, why_no_pretence

    if torch.cuda.is_available() or why_no_pretence() is not None:
        pytest.skip("waits are counted on a pretended GPU")
    pretended = PretendedGPU()
    with pretended.present() as device, torch.no_grad():
        encoder = on(device, clip.encoder_of())
        pretended.waits.clear()
        found = search(encoder, images, **OPTIONS)
    matrices = len(list_matrices(encoder.model))
    places = {k: n for k, n in pretended.waits.items() if n >= len(found.rows)}
    assert 0 < len(places) <= 5, places  # for each candidate and chunk
    rest = sum(pretended.waits.values()) - sum(places.values())
    assert rest <= 60 + 8 * matrices, pretended.waits
