"""Patch features of Swin classifiers: the value path of their last block."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fastood
from fastood.errors import ModelError
from fastood.models import HFClassifierEncoder, TimmEncoder
from fastood.models.swin import swin
from tests import tolerances as tol
from tests.models import swins, tiny

KINDS = pytest.mark.parametrize("kind", swins.KINDS)


def encoder(kind: str, **more):
    build = HFClassifierEncoder if "hf" in kind else TimmEncoder
    return build(swins.swin(kind, **more).double(), tiny.blank, name=kind)


def pixels(n: int = 2, size: int = swins.IMAGE):
    return tiny.pixels(n, size=size).double()


def last_block(model):
    if hasattr(model, "layers"):
        return model.layers[-1].blocks[-1]
    return (model.swinv2 if hasattr(model, "swinv2") else model.swin).encoder.layers[-1].blocks[-1]


class Alone(nn.Module):
    """An attention in which every token of a window attends to itself alone, written for each
    library's module by what it is made of."""

    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, x, *args, **kwargs):
        inner = self.inner
        if hasattr(inner, "qkv"):  # timm
            bias = getattr(inner, "v_bias", None)
            bias = inner.qkv.bias.chunk(3)[2] if bias is None else bias
            return inner.proj(x @ inner.qkv.weight.chunk(3)[2].T + bias)
        value = inner.v_proj if hasattr(inner, "v_proj") else inner.self.value
        out = inner.o_proj if hasattr(inner, "o_proj") else inner.output.dense
        return out(value(x)), None


@KINDS
@pytest.mark.parametrize("image", [swins.IMAGE, 40])
def test_equals_the_model_without_attention_in_its_last_block(kind, image):
    """Also where windows of the last block have to be padded (40: 3 x 3 tokens, windows of 2)."""
    depths = swins.DEPTHS if image == swins.IMAGE else (2, 2, 2)
    enc = encoder(kind, image=image, depths=depths)
    given = pixels(size=image)
    image_features, local = enc.encode_image(given, local=True)
    assert torch.equal(image_features, enc.encode_image(given).image)
    assert local.shape == (2, enc.num_patches, enc.embed_dim)

    block = last_block(enc.model)
    name = "attn" if "timm" in kind else "attention"
    attention = getattr(block, name)
    setattr(block, name, Alone(attention))
    # pooling is a mean of the patches, so it shows their order as little as the classifier does
    alone = enc.encode_image(given).image
    with torch.no_grad():
        if "timm" in kind:
            tokens = enc.model.forward_features(given).flatten(1, 2)
        else:
            body = enc.model.swinv2 if "v2" in kind else enc.model.swin
            tokens = body(given).last_hidden_state
    setattr(block, name, attention)
    torch.testing.assert_close(local, tokens, rtol=0, atol=tol.SWIN_F64_RTOL)
    torch.testing.assert_close(local.mean(1), alone, rtol=0, atol=tol.SWIN_F64_RTOL)


@KINDS
def test_scores(kind):
    build = HFClassifierEncoder if "hf" in kind else TimmEncoder
    enc = build(swins.swin(kind), tiny.blank)
    assert enc.no_local is None and enc.num_patches == 4
    found = enc.encode_image(tiny.pixels(3, size=swins.IMAGE), local=True)
    got = enc.head().similarities(*found)
    expected = enc.classifier()(found.local)
    torch.testing.assert_close(got.local, expected, rtol=0, atol=tol.CLASSIFIER_LOGITS_ATOL)
    score = fastood.gl_mcm(similarity=got.image, local_similarity=got.local, tau=1.0)
    plain = got.image.softmax(-1).amax(-1) + expected.softmax(-1).amax((1, 2))
    torch.testing.assert_close(score, plain, rtol=0, atol=tol.CLASSIFIER_LOGITS_ATOL)
    empty = enc.encode_image(tiny.pixels(0, size=swins.IMAGE), local=True)
    assert empty.local.shape == (0, 4, enc.embed_dim)


@KINDS
def test_queries_and_keys_have_no_part(kind):
    from fastood.models.matrices import find

    enc = encoder(kind)
    before = enc.encode_image(pixels(), local=True)
    for name in ("q", "k", "v"):
        (matrix,) = find(enc.model, towers="image", kinds=name, layers=[-1])
        with torch.no_grad():
            matrix.weight(enc.model).mul_(0.5)
        after = enc.encode_image(pixels(), local=True)
        assert torch.equal(after.local, before.local) == (name != "v")


@KINDS
def test_differentiable_and_with_parametrised_weights(kind):
    """What fine-tuning asks for: the function without its no_grad, weights that are computed."""
    enc = encoder(kind)
    before = enc.encode_image(pixels(), local=True).local

    class Same(nn.Module):
        def forward(self, weight):
            return weight * 1

    fc = swin(enc.model).blocks[-1].fc
    torch.nn.utils.parametrize.register_parametrization(fc, "weight", Same())
    assert torch.equal(enc.encode_image(pixels(), local=True).local, before)
    encode = inspect.unwrap(type(enc).encode_image)
    encode(enc, pixels(), local=True).local.sum().backward()
    assert float(fc.parametrizations.weight.original.grad.abs().max()) > 0


def test_classifiers_that_are_changed_later():
    enc = encoder("timm v2")
    block = last_block(enc.model)
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1)
    with pytest.raises(ModelError, match=r"no local features any more: a linear layer is a Seq"):
        enc.encode_image(pixels(), local=True)
    again = TimmEncoder(enc.model, tiny.blank)
    assert again.no_local is not None and again.num_patches is None
