"""Two thin layers instead of one: where, and that the model computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastood.errors import ModelError
from fastood.models.copies import copy_encoder
from fastood.models.matrices import list_matrices
from fastood.setar.factored import FactoredLinear, cheaper
from fastood.setar.recipe import Recipe
from fastood.tuning.lora import LoRA
from tests.tolerances import FACTORED_RTOL
from tests.tuning.towers import ENCODERS, NAMES, WORDS, hf_encoder, open_clip_encoder, pixels

RATIO = 0.6
"""Of 32 directions 13 stay: 13 (32 + 32) < 32 * 32."""


def everything(encoder, ratio=RATIO, towers=("image", "text")):
    return [
        [m.tower, m.kind, m.layer, ratio] for m in list_matrices(encoder.model) if m.tower in towers
    ]


def thin(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, FactoredLinear)}


@pytest.mark.parametrize("part", ["minor", "principal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("library", list(ENCODERS))
def test_the_same_features(library, dtype, part):
    encoder = ENCODERS[library](dtype=dtype)
    recipe = Recipe.of(encoder, everything(encoder), part=part)
    dense, factored = recipe.apply(encoder), recipe.apply(encoder, factored=True)
    assert thin(factored.model) and not thin(dense.model)
    images = pixels(encoder)
    ours, theirs = (e.encode_image(images, local=True) for e in (factored, dense))
    rtol = FACTORED_RTOL if dtype == torch.float32 else 1e-10
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm())
    # texts as before: the text tower is dense
    assert torch.equal(factored.encode_text(WORDS), dense.encode_text(WORDS))
    assert factored.fingerprint != dense.fingerprint
    assert {p.requires_grad for p in factored.model.parameters()} == {
        p.requires_grad for p in encoder.model.parameters()
    }
    # the copy of a copy is one too
    again = copy_encoder(factored).encode_image(images, local=True)
    assert torch.equal(again.local, ours.local)


def test_only_layers_that_are_called_as_layers():
    ours, theirs = open_clip_encoder(), hf_encoder()
    mlp = {f"visual.transformer.resblocks.{i}.mlp.{n}" for i in (0, 1) for n in ("c_fc", "c_proj")}
    changed = Recipe.of(ours, everything(ours)).apply(ours, factored=True)
    assert thin(changed.model) == mlp
    changed = Recipe.of(theirs, everything(theirs)).apply(theirs, factored=True)
    found = {m.address for m in list_matrices(theirs.model)} - {
        m.address for m in list_matrices(changed.model)
    }
    kinds = ("q", "k", "v", "o", "up", "down")
    assert found >= {f"image.{i}.{kind}" for i in (0, 1) for kind in kinds}
    assert not any(address.startswith("text") for address in found)


def test_only_where_it_is_cheaper():
    assert not cheaper((3072, 768), 614) and cheaper((3072, 768), 576)
    assert not cheaper((8, 8), 0)
    encoder = open_clip_encoder()  # up is (128, 32): below 24.3 of 32 directions
    for count, want in ((7, False), (8, True)):
        recipe = Recipe.of(encoder, [["image", "up", 0, count]])
        changed = recipe.apply(encoder, factored=True)
        assert bool(thin(changed.model)) == want
    layer = changed.model.visual.transformer.resblocks[0].mlp.c_fc
    assert (layer.rank, layer.in_features, layer.out_features) == (24, 32, 128)
    numbers = sum(p.numel() for p in layer.parameters())
    assert numbers == 24 * (32 + 128) + 128 < 32 * 128 + 128
    random = Recipe.of(encoder, [["image", "up", 0, 20]], part="random")
    assert not thin(random.apply(encoder, factored=True).model)
    assert random.apply(encoder, factored=True).fingerprint == random.apply(encoder).fingerprint


def test_it_is_off_by_default_and_leaves_the_model_alone():
    encoder = open_clip_encoder()
    before = copy.deepcopy(encoder.model.state_dict())
    recipe = Recipe.of(encoder, everything(encoder))
    assert not thin(recipe.apply(encoder).model)
    recipe.apply(encoder, factored=True)
    assert not thin(encoder.model)
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    encoder = open_clip_encoder(dtype=dtype)
    changed = Recipe.of(encoder, everything(encoder)).apply(encoder, factored=True)
    assert {p.dtype for p in changed.model.visual.parameters()} == {dtype}
    assert bool(changed.encode_image(pixels(encoder)).image.isfinite().all())


def test_nothing_further_can_be_changed_there():
    encoder = open_clip_encoder()
    recipe = Recipe.of(encoder, everything(encoder, towers=("image",)))
    changed = recipe.apply(encoder, factored=True)
    with pytest.raises(ModelError, match="has no image"):
        recipe.apply(changed)
    with pytest.raises(ModelError, match="has no up"):
        LoRA(changed, NAMES, rank=2)
