"""Swin classifiers taken apart: against the plain models with their weights replaced."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastood.errors import ModelError
from fastood.models import HFClassifierEncoder, TimmEncoder
from fastood.models.matrices import KINDS, find, swin_layers
from fastood.models.swin import swin_block
from fastood.setar.lowrank import LowRankBasis
from fastood.setar.tails import Tails
from fastood.setar.towers.base import image_tower
from fastood.setar.towers.swin import SwinTower
from tests import tolerances as tol
from tests.models import swins, tiny

COUNTS = (3, 20)
DEPTH = sum(swins.DEPTHS)
BLOCK = KINDS[:-1]


def encoder(kind: str, **more):
    build = HFClassifierEncoder if "hf" in kind else TimmEncoder
    return build(swins.swin(kind, **more).double(), tiny.blank, name=kind)


@pytest.fixture(scope="module", params=swins.KINDS)
def made(request):
    enc = encoder(request.param)
    tower = SwinTower(enc)
    return request.param, enc, tower, inputs(tower)


def pixels(n: int = 2):
    return tiny.pixels(n, size=swins.IMAGE).double()


def inputs(tower):
    """x_0, ..., x_{L-1}"""
    found = [tower.start(pixels())]
    for i in range(tower.depth - 1):
        found.append(tower.block(i, found[-1]))
    return found


def close(got, expected):
    torch.testing.assert_close(
        got, expected, rtol=0, atol=tol.SWIN_F64_RTOL * float(expected.abs().max())
    )


def tails_of(matrix, model, part="minor"):
    basis = LowRankBasis(matrix.weight(model))
    return basis, Tails.of(basis, COUNTS, part=part, dtype=torch.float64, device="cpu")


def changed(enc, matrix, weight):
    """A copy of the plain model with another weight."""
    model = copy.deepcopy(enc.model)
    with torch.no_grad():
        matrix.weight(model).copy_(weight)
    return model


@torch.no_grad()
def plain(kind, model):
    """Pooled features of the model itself, and patches by the formula of the value path."""
    if "timm" in kind:
        last, norm = model.layers[-1].blocks[-1], model.norm
    else:
        body = model.swinv2 if "v2" in kind else model.swin
        last, norm = body.encoder.layers[-1].blocks[-1], body.layernorm
    seen = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    if "timm" in kind:
        image = model.forward_head(model.forward_features(pixels()), pre_logits=True)
    else:
        image = body(pixels()).pooler_output
    handle.remove()
    return image, norm(value_path(kind, last, seen[0].reshape(2, -1, seen[0].shape[-1])))


def value_path(kind, block, x):
    if "timm" in kind:
        attn, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
        weight, width = attn.qkv.weight, x.shape[-1]
        bias = attn.v_bias if "v2" in kind else attn.qkv.bias[2 * width :]
        out, fc, proj = attn.proj, mlp.fc1, mlp.fc2

        def value(z):
            return F.linear(z, weight[2 * width :], bias)

    else:
        norms, attn = (block.layernorm_before, block.layernorm_after), block.attention
        new = hasattr(block, "mlp")
        value = attn.v_proj if new else attn.self.value
        out = attn.o_proj if new else attn.output.dense
        fc = block.mlp.fc1 if new else block.intermediate.dense
        proj = block.mlp.fc2 if new else block.output.dense
    if "v2" in kind:
        v = x + norms[0](out(value(x)))
        return v + norms[1](proj(F.gelu(fc(v))))
    v = x + out(value(norms[0](x)))
    return v + proj(F.gelu(fc(norms[1](v))))


def test_whole_pass(made):
    kind, enc, tower, xs = made
    assert isinstance(image_tower(enc), SwinTower) and tower.depth == DEPTH
    found = tower.seen(xs[-1])
    image, local = plain(kind, enc.model)
    close(found.image, image)
    close(found.local, local)
    assert found.local.shape == (2, 4, 192)
    weight, bias = tower.head()
    with torch.no_grad():
        logits = enc.model(pixels())
    close(found.image @ weight.T + bias, logits if "timm" in kind else logits.logits)
    # the last block of a stage halves the map, whichever library
    assert [tuple(x.shape[1:]) for x in xs] == [
        (16 // 2**s, 16 // 2**s, 24 * 2**s) for s, _ in swin_layers(enc.model)
    ]


# the first block of all, the last of a stage (an odd one, which shifts) and the first of another
@pytest.mark.parametrize(
    ("layer", "name"),
    [*((0, name) for name in BLOCK), (1, "q"), (1, "o"), (1, "up"), (4, "v"), (7, "down")],
)
def test_candidates_of_a_block(made, layer, name):
    kind, enc, tower, xs = made
    (matrix,) = find(enc.model, towers="image", kinds=name, layers=[layer])
    basis, tails = tails_of(matrix, enc.model)
    before = xs[layer].clone()
    fingerprint = enc.fingerprint
    results = [y.clone() for y in tower.variants(matrix, tails, xs[layer])]
    assert len(results) == len(COUNTS)
    assert torch.equal(xs[layer], before) and enc.fingerprint == fingerprint
    own = tower.seen(xs[-1]).image
    for count, x in zip(COUNTS, results, strict=True):
        other = changed(enc, matrix, basis.drop(count))
        for i in range(layer + 1, tower.depth - 1):
            x = tower.block(i, x)
        found = tower.seen(x)
        image, local = plain(kind, other)
        close(found.image, image)
        close(found.local, local)
        assert not torch.allclose(found.image, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "part"), [*((name, "minor") for name in BLOCK), ("up", "principal"), ("up", "random")]
)
def test_candidates_of_the_last_block(made, name, part):
    kind, enc, tower, xs = made
    (matrix,) = find(enc.model, towers="image", kinds=name, layers=[-1])
    basis, tails = tails_of(matrix, enc.model, part)
    own = tower.seen(xs[-1])
    seen = 0
    for count, found in zip(COUNTS, tower.seen_variants(matrix, tails, xs[-1]), strict=True):
        image, local = plain(kind, changed(enc, matrix, basis.drop(count, part=part)))
        close(found.image, image)
        close(found.local, local)
        # two calls may round otherwise; what a weight does is far larger
        gap = float((found.local - own.local).abs().max())
        assert (gap < 1e-9) == (name in ("q", "k"))
        seen += 1
    assert seen == len(COUNTS)


def test_changed_weights_are_seen_at_once(made):
    kind, enc, _, xs = made
    tower = SwinTower(enc)
    (matrix,) = find(enc.model, towers="image", kinds="up", layers=[-1])
    weight = matrix.weight(enc.model)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(LowRankBasis(kept).drop(9))
    image, local = plain(kind, enc.model)
    found = tower.seen(xs[-1])
    with torch.no_grad():
        weight.copy_(kept)
    close(found.image, image)
    close(found.local, local)


def test_an_abandoned_search_leaves_the_weights(made):
    _, enc, tower, xs = made
    fingerprint = enc.fingerprint
    (matrix,) = find(enc.model, towers="image", kinds="v", layers=[0])
    _, tails = tails_of(matrix, enc.model)
    running = tower.variants(matrix, tails, xs[0])
    next(running)
    assert enc.fingerprint == fingerprint  # also while it waits
    running.close()
    with pytest.raises(RuntimeError):
        next(tower.variants(matrix, tails, xs[0][..., :5]))
    assert enc.fingerprint == fingerprint


def test_chunks_do_not_matter(made):
    _, enc, tower, xs = made
    (matrix,) = find(enc.model, towers="image", kinds="up", layers=[1])
    _, tails = tails_of(matrix, enc.model)
    whole = [y.clone() for y in tower.variants(matrix, tails, xs[1])]
    first = [y.clone() for y in tower.variants(matrix, tails, xs[1][:1])]
    for a, b in zip(whole, first, strict=True):
        close(b, a[:1])


@pytest.mark.parametrize("kind", ["timm v1", "hf v1", "timm v2", "hf v2"])
def test_windows_that_do_not_fill_the_map(kind):
    """10 x 10, 5 x 5 and 3 x 3 patches in windows of 4 or 2: maps are padded and cut again."""
    enc = encoder(kind, image=40, depths=(2, 2, 2))
    tower = SwinTower(enc)
    given = tiny.pixels(2, size=40).double()
    x = tower.start(given)
    for i in range(tower.depth - 1):
        x = tower.block(i, x)
    close(tower.seen(x).image, enc.encode_image(given).image)
    (matrix,) = find(enc.model, towers="image", kinds="o", layers=[1])
    basis, tails = tails_of(matrix, enc.model)
    x = tower.block(0, tower.start(given))
    for count, y in zip(COUNTS, tower.variants(matrix, tails, x), strict=True):
        for i in range(2, tower.depth - 1):
            y = tower.block(i, y)
        other = changed(enc, matrix, basis.drop(count))
        close(tower.seen(y).image, type(enc)(other, tiny.blank).encode_image(given).image)


def test_value_path_of_a_block_that_is_not_what_it_seems_is_refused():
    enc = encoder("timm v2")

    class Turned(nn.Module):
        """Attention that turns what every token gets: only the value path differs."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x, mask=None):
            return self.inner(x, mask=mask).roll(1, dims=-1)

    SwinTower(enc)
    last = enc.model.layers[-1].blocks[-1]
    last.attn = Turned(last.attn)
    with pytest.raises(ModelError, match="patch features differ from the model's own"):
        SwinTower(enc)


def test_what_cannot_be_taken_apart():
    timm = pytest.importorskip("timm")
    resnet = TimmEncoder(timm.create_model("resnet10t", num_classes=3), tiny.blank, name="small")
    with pytest.raises(
        ModelError, match=r"small: the image tower .* ResNet is not a Swin classifier"
    ):
        image_tower(resnet)
    half = TimmEncoder(swins.swin("timm v2"), tiny.blank, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="needs float32 or float64"):
        image_tower(half)
    enc = encoder("timm v1")
    enc.model.layers[0].blocks[0].mlp.fc1 = nn.Sequential(enc.model.layers[0].blocks[0].mlp.fc1)
    with pytest.raises(ModelError, match=r"cannot be taken apart: a linear layer is a Sequential"):
        SwinTower(enc)
    assert "not on the list" in str(swin_block(nn.Linear(2, 2)))


def test_matrices_of_other_layers_are_refused(made):
    _, enc, tower, xs = made
    matrices = find(enc.model, towers="image", kinds="up")
    _, tails = tails_of(matrices[0], enc.model)
    with pytest.raises(ValueError, match=r"layers 0..7, got image.8.up"):
        tower.variants(matrices[-1], tails, xs[0])
    with pytest.raises(ValueError, match=r"layers 8..8, got image.0.up"):
        tower.seen_variants(matrices[0], tails, xs[0])
