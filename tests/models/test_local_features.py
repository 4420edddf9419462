"""Patch features against a slow float64 computation, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastood.errors import ModelError
from fastood.models import OpenClipEncoder
from tests.models import slow, tiny
from tests.tolerances import FEATURE_ATOL


def encoder(model, **options) -> OpenClipEncoder:
    return OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER, **options)


VARIANTS = {
    "plain": ({}, {}),
    "quick_gelu": ({}, {"quick_gelu": True}),
    "layer_scale": ({"ls_init_value": 0.5}, {}),
    "no_ln_pre": ({"no_ln_pre": True}, {}),
    "norm_after_pool": ({"final_ln_after_pool": True}, {}),
    "patch_dropout": ({"patch_dropout": 0.5}, {}),
    "custom_block": ({"block_type": "custom"}, {}),
    "output_tokens": ({"output_tokens": True}, {"custom": True}),
    "one_layer": ({"layers": 1}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_vit_value_path_equals_identity_attention(variant):
    changes, options = VARIANTS[variant]
    model = tiny.clip(tiny.vision(**changes), **options)
    pixels = tiny.pixels(2)
    got = encoder(model).encode_image(pixels, local=True)
    w = slow.weights(model.visual)
    settings = {
        "heads": tiny.HEADS,
        "patch": tiny.PATCH,
        "layers": changes.get("layers", 2),
        "act": slow.quick_gelu if options.get("quick_gelu") else slow.gelu,
        "ln_pre": not changes.get("no_ln_pre"),
    }
    for row in range(2):
        image = pixels[row].double().numpy()
        whole = slow.vit(image, w, identity=False, **settings)
        value = slow.vit(image, w, identity=True, **settings)
        np.testing.assert_allclose(got.image[row].numpy(), whole[0], atol=FEATURE_ATOL)
        np.testing.assert_allclose(got.local[row].numpy(), value[1:], atol=FEATURE_ATOL)
        assert np.abs(value[1:] - whole[1:]).max() > 0.01  # the test can tell the two apart


def test_resnet_value_path_pixel_by_pixel():
    model = tiny.clip(dict(tiny.RESNET))
    pixels = tiny.pixels(2, size=64)
    got = encoder(model).encode_image(pixels, local=True)
    v = model.visual
    with torch.no_grad():
        x = v.layer4(v.layer3(v.layer2(v.layer1(v.stem(pixels))))).double().numpy()
    w = slow.weights(v.attnpool)
    for b in range(2):
        for p, (i, j) in enumerate(np.ndindex(x.shape[2:])):
            inner = w["v_proj.weight"] @ x[b, :, i, j] + w["v_proj.bias"]
            expected = w["c_proj.weight"] @ inner + w["c_proj.bias"]
            np.testing.assert_allclose(got.local[b, p].numpy(), expected, atol=FEATURE_ATOL)
    assert got.local.shape[1] == encoder(model).num_patches == 4


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn": True}, {"scale_heads": True},
                                     {"scale_attn_inner": True}, {"scale_fc": True}])  # fmt: skip
def test_custom_attention_blocks_with_one_token(options):
    """With a single token the attention matrix *is* the identity, whatever the block adds."""
    from fastood.models.local import open_clip_block

    model = tiny.clip(tiny.vision(**options))
    block = model.visual.transformer.resblocks[-1]
    x = torch.randn(3, 1, tiny.WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(open_clip_block(block, x), block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image", [tiny.vision(), tiny.RESNET], ids=["vit", "resnet"])
def test_global_feature_is_the_models_own_with_and_without_local(image):
    model = tiny.clip(dict(image))
    pixels = tiny.pixels(3, size=image["image_size"])
    with torch.no_grad():
        expected = model.encode_image(pixels)
    enc = encoder(model)
    for local in (False, True):
        torch.testing.assert_close(
            enc.encode_image(pixels, local=local).image, expected, atol=1e-6, rtol=1e-6
        )


def test_local_ignores_query_and_key_of_the_last_block_only():
    pixels = tiny.pixels(2)
    model = tiny.clip()
    before = encoder(model).encode_image(pixels, local=True)
    last = model.visual.transformer.resblocks[-1].attn
    with torch.no_grad():
        last.in_proj_weight[: 2 * tiny.WIDTH].normal_()
        last.in_proj_bias[: 2 * tiny.WIDTH].normal_()
    after = encoder(model).encode_image(pixels, local=True)
    assert torch.equal(before.local, after.local)
    assert not torch.allclose(before.image, after.image, atol=1e-3)
    with torch.no_grad():
        last.in_proj_weight[2 * tiny.WIDTH :].mul_(1.5)
    assert not torch.allclose(encoder(model).encode_image(pixels, local=True).local, after.local)


def test_resnet_local_ignores_positions_query_and_key():
    pixels = tiny.pixels(2, size=64)
    model = tiny.clip(dict(tiny.RESNET))
    before = encoder(model).encode_image(pixels, local=True)
    pool = model.visual.attnpool
    with torch.no_grad():
        for p in (pool.positional_embedding, pool.q_proj.weight, pool.k_proj.bias):
            p.normal_()
    after = encoder(model).encode_image(pixels, local=True)
    assert torch.equal(before.local, after.local)
    assert not torch.allclose(before.image, after.image, atol=1e-3)


def test_sequence_first_layout_gives_the_same():
    """Older checkpoints' towers run (tokens, batch, width)."""
    model = tiny.clip()
    pixels = tiny.pixels(3)
    expected = encoder(model).encode_image(pixels, local=True)
    model.visual.transformer.batch_first = False
    for block in model.visual.transformer.resblocks:
        block.attn.batch_first = False
    got = encoder(model).encode_image(pixels, local=True)
    torch.testing.assert_close(got.image, expected.image, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.local, expected.local, atol=1e-6, rtol=1e-5)


def test_hooks_leave_no_trace_even_after_an_error():
    model = tiny.clip()
    enc = encoder(model)
    block = model.visual.transformer.resblocks[-1]
    enc.encode_image(tiny.pixels(1), local=True)
    with pytest.raises(RuntimeError):
        enc.encode_image(torch.zeros(1, 3, tiny.SIZE + 1, tiny.SIZE * 2), local=True)
    assert not block._forward_pre_hooks


UNDEFINED = {
    "avg": (tiny.vision(pool_type="avg"), "pool_type='avg'"),
    "attentional": (
        tiny.vision(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=4),
        "attentional pooling",
    ),
    "timm": (
        {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear",
         "image_size": 32},
        "TimmModel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDEFINED)
def test_undefined_local_features_say_why_by_name(case):
    image, words = UNDEFINED[case]
    if case == "timm":
        image = {**image, "timm_pool": "avg"}
    enc = encoder(tiny.clip(image))
    assert words in enc.no_local
    assert enc.num_patches is None
    assert enc.embed_dim == tiny.DIM
    size = image["image_size"]
    assert enc.encode_image(tiny.pixels(2, size=size)).image.shape == (2, tiny.DIM)
    with pytest.raises(ModelError, match="no local features"):
        enc.encode_image(tiny.pixels(2, size=size), local=True)
