"""Addresses of weight matrices in the models of every library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastood.errors import ModelError
from fastood.models.matrices import KINDS, find, list_matrices, swin_layers
from tests.models import swins, tiny

BLOCK = ["q", "k", "v", "o", "up", "down"]


def everything(layers: int) -> list[str]:
    return [
        *(f"{tower}.{i}.{kind}" for tower in ("image",) for i in range(layers) for kind in BLOCK),
        "image.proj",
        *(f"text.{i}.{kind}" for i in range(layers) for kind in BLOCK),
        "text.proj",
    ]


@pytest.mark.parametrize("custom", [False, True])
def test_open_clip(custom):
    model = tiny.clip(custom=custom)
    found = {m.address: m for m in list_matrices(model)}
    assert list(found) == everything(2)
    state = model.state_dict()
    prefix = "text." if custom else ""
    attention = f"{prefix}transformer.resblocks.1.attn.in_proj_weight"
    thirds = dict(zip("qkv", state[attention].chunk(3), strict=True))
    for kind, rows in thirds.items():
        matrix = found[f"text.1.{kind}"]
        assert matrix.key == attention and matrix.shape == (32, 32)
        assert torch.equal(matrix.weight(model), rows)
    up = found["image.0.up"]
    assert torch.equal(up.weight(model), model.visual.transformer.resblocks[0].mlp.c_fc.weight)
    assert (up.key, up.rows) == ("visual.transformer.resblocks.0.mlp.c_fc.weight", None)
    # projections are multiplied from the right: y = x P, so W = Pᵀ
    projection = found["image.proj"]
    assert torch.equal(projection.weight(model), model.visual.proj.T)
    assert projection.shape == (tiny.DIM, tiny.WIDTH)
    for matrix in found.values():
        assert matrix.key in state
        assert matrix.weight(model).shape == matrix.shape


@pytest.mark.parametrize("address", ["image.0.up", "text.1.k", "image.proj"])
def test_write_puts_a_weight_in_its_place(address):
    model = tiny.clip()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    matrix = next(m for m in list_matrices(model) if m.address == address)
    new = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    matrix.write(model, new)
    assert torch.equal(matrix.weight(model), new)
    matrix.write(model, matrix.of(before[matrix.key]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_weight_computed_from_others_is_not_written_to():
    """It would be made anew at the next call, as if nothing had been written."""
    model = tiny.clip()
    torch.nn.utils.parametrizations.weight_norm(model.visual.transformer.resblocks[0].mlp.c_fc)
    matrix = next(m for m in list_matrices(model) if m.address == "image.0.up")
    with pytest.raises(ModelError, match=r"image\.0\.up: .*c_fc\.weight of CLIP is computed from"):
        matrix.write(model, torch.zeros(matrix.shape))


def test_hugging_face_has_the_same_addresses_for_the_same_weights():
    pytest.importorskip("transformers")
    from tests.models import test_hf

    source = tiny.clip(quick_gelu=True)
    model = test_hf.transformers.CLIPModel(test_hf.clip_config())
    names = test_hf.hugging_face_names(source)
    model.load_state_dict({k: v.contiguous() for k, v in names.items()}, strict=True)
    theirs, ours = list_matrices(model), list_matrices(source)
    assert [m.address for m in theirs] == [m.address for m in ours] == everything(2)
    for there, here in zip(theirs, ours, strict=True):
        assert torch.equal(there.weight(model), here.weight(source)), there.address
        assert there.key in model.state_dict()


def test_text_projection_as_a_linear_layer():
    model = tiny.clip(text={"proj_bias": True}, custom=True)
    if not isinstance(model.text.text_projection, nn.Linear):
        pytest.skip("the installed open_clip has no such projection")
    (matrix,) = find(model, towers="text", kinds="proj")
    assert matrix.key == "text.text_projection.weight" and not matrix.transposed
    assert matrix.weight(model) is model.text.text_projection.weight


def test_find_selects():
    model = tiny.clip()
    assert [m.address for m in find(model, towers="text", kinds=("v", "q"), layers=[-1])] == [
        "text.1.q",
        "text.1.v",
    ]
    assert [m.address for m in find(model, kinds="up")] == [
        "image.0.up",
        "image.1.up",
        "text.0.up",
        "text.1.up",
    ]
    assert [m.address for m in find(model, kinds=("down", "proj"), layers=[0])] == [
        "image.0.down",
        "image.proj",
        "text.0.down",
        "text.proj",
    ]
    assert [m.address for m in find(model, towers="text", kinds="o", layers=[-2])] == ["text.0.o"]
    assert len(find(model)) == len(list_matrices(model))


def test_towers_without_known_blocks_say_what_they_have():
    model = tiny.clip(image=tiny.RESNET)
    assert not [m for m in list_matrices(model) if m.tower == "image"]
    with pytest.raises(ModelError, match=r"image tower of CLIP has no up; only transformers'"):
        find(model, kinds="up")
    assert find(model, towers="text", kinds="up")

    class Bare(nn.Module):
        visual_projection = nn.Linear(4, 3)

    with pytest.raises(ModelError, match=r"has no q, up; it has proj"):
        find(Bare(), towers="image", kinds=("q", "up", "proj"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": "fc1"}, "kinds: expected some of q, k, v, o, up, down, proj, got 'fc1'"),
        ({"kinds": ()}, "kinds: expected some of .*, got none"),
        ({"towers": ("vision",)}, "towers: expected some of image, text, got 'vision'"),
        ({"layers": [2]}, "layers: expected numbers in -2..1 for the 2 layers of the image"),
        ({"layers": [True]}, "layers: expected numbers"),
        ({"layers": [], "kinds": "up"}, "layers: expected at least one"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        find(tiny.clip(), **options)


def test_all_kinds_are_named():
    assert {m.kind for m in list_matrices(tiny.clip())} == set(KINDS)


@pytest.mark.parametrize("kind", swins.KINDS)
def test_swin_layers_count_through_the_stages(kind):
    model = swins.swin(kind)
    found = {m.address: m for m in list_matrices(model)}
    assert list(found) == [f"image.{i}.{k}" for i in range(sum(swins.DEPTHS)) for k in BLOCK]
    places = swin_layers(model)
    assert places == tuple((s, b) for s, depth in enumerate(swins.DEPTHS) for b in range(depth))
    for layer, (stage, block) in enumerate(places):
        width = 24 * 2**stage
        for name in BLOCK:
            matrix = found[f"image.{layer}.{name}"]
            assert f"layers.{stage}.blocks.{block}." in matrix.key
            assert matrix.key in model.state_dict()
            out, inner = {"up": (4 * width, width), "down": (width, 4 * width)}.get(
                name, (width, width)
            )
            assert matrix.shape == matrix.weight(model).shape == (out, inner)
    rows = {name: found[f"image.8.{name}"].rows for name in "qkv"}
    thirds = {"q": (0, 192), "k": (192, 384), "v": (384, 576)}
    assert rows == (thirds if "timm" in kind else dict.fromkeys("qkv"))
    assert len(find(model, towers="image", kinds="up")) == 9
    with pytest.raises(ModelError, match=r"image tower of .* has no proj"):
        find(model, towers="image", kinds="proj")
    with pytest.raises(ModelError, match="leave towers='text' out"):
        find(model, kinds="up")


def test_models_without_stages_have_no_stages():
    assert swin_layers(tiny.clip()) == ()
