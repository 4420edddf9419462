"""open_clip encoders: cropped text, scales, precisions, fingerprints."""

from __future__ import annotations

import math
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastood.models import OpenClipEncoder
from fastood.models.fingerprint import weights_digest
from fastood.prompts import text_tower
from tests.models import tiny

PROMPTS = ["a", "a photo of a cat", "a photo of a very long-haired dachshund, a type of pet."]


def encoder(model, **options) -> OpenClipEncoder:
    return OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER, **options)


def tokens_seen(model) -> list[int]:
    """How many tokens each call of the first block's MLP gets from now on."""
    seen: list[int] = []
    owner = model if hasattr(model, "token_embedding") else model.text
    act = owner.transformer.resblocks[0].mlp.gelu
    act.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ({}, {}),
        ({}, {"custom": True}),
        ({"pool_type": "eos", "eos_id": 49407}, {"custom": True}),
        ({"proj_bias": True}, {"custom": True}),
        ({"proj_type": "none", "width": tiny.DIM}, {"custom": True}),
        ({"output_tokens": True}, {"custom": True}),
    ],
)
def test_cropped_text_equals_the_full_context(text, options):
    model = tiny.clip(text=text, **options)
    enc = encoder(model)
    assert enc.text.croppable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enc.encode_text(PROMPTS)
        seen = tokens_seen(model)
        got = enc.encode_text(PROMPTS)
    lengths = tiny.TOKENIZER(PROMPTS).argmax(-1) + 1
    # start and "a" are common to all and run once
    assert seen == [int(lengths.sum()) - 2 * 2]
    with torch.no_grad():
        full = model.encode_text(tiny.TOKENIZER(PROMPTS))
    full = full[0] if isinstance(full, tuple) else full
    torch.testing.assert_close(F.normalize(got, dim=-1), F.normalize(full, dim=-1), atol=1e-6,
                               rtol=0)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}, {"embed_cls": True}],
)
def test_towers_that_may_look_further_take_the_full_context(text):
    model = tiny.clip(text=text, custom=True)
    enc = encoder(model)
    assert not enc.text.croppable and isinstance(text_tower(model), str)
    with torch.no_grad():
        full = model.encode_text(tiny.TOKENIZER(PROMPTS))
    assert torch.equal(enc.encode_text(PROMPTS), full)


def test_a_mask_that_is_not_causal_takes_the_full_context():
    model = tiny.clip()
    model.attn_mask.zero_()
    enc = encoder(model)
    assert not enc.text.croppable
    with torch.no_grad():
        assert torch.equal(enc.encode_text(PROMPTS), model.encode_text(tiny.TOKENIZER(PROMPTS)))


def test_crop_that_disagrees_falls_back_with_one_warning():
    """A tower that looks causal but mixes later positions in by other means."""
    model = tiny.clip()
    model.transformer.resblocks[0].register_forward_hook(
        lambda m, a, out: out + out.mean(dim=1, keepdim=True)
    )
    enc = encoder(model)
    with pytest.warns(UserWarning, match="full context instead") as caught:
        got = enc.encode_text(PROMPTS)
        enc.encode_text(PROMPTS)
    assert len(caught) == 1 and not enc.text.croppable
    with torch.no_grad():
        assert torch.equal(got, model.encode_text(tiny.TOKENIZER(PROMPTS)))


def test_coca_takes_the_full_pass_and_has_no_local():
    model = open_clip.CoCa(
        tiny.DIM,
        {**tiny.TEXT, "attn_pooler_heads": 2, "heads": 2},
        {**tiny.TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        tiny.vision(attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
    ).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=76)
    enc = OpenClipEncoder(model, tiny.blank, tokenizer)
    assert "attentional" in enc.no_local and not enc.text.croppable
    pixels = tiny.pixels(2)
    with torch.no_grad():
        assert torch.equal(
            enc.encode_image(pixels).image, model.encode_image(pixels, normalize=False)
        )
        assert torch.equal(
            enc.encode_text(PROMPTS), model.encode_text(tokenizer(PROMPTS), normalize=False)
        )


def test_scale_and_bias_are_the_models():
    model = tiny.clip(init_logit_scale=math.log(37.5), init_logit_bias=-9.5)
    enc = encoder(model)
    assert enc.logit_scale == pytest.approx(37.5) and enc.logit_bias == -9.5
    assert encoder(tiny.clip()).logit_bias == 0.0
    assert encoder(tiny.clip(nonscalar_logit_scale=True)).logit_scale == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image", [tiny.vision(ls_init_value=0.5), tiny.RESNET])
def test_half_precision_stays_close(dtype, image):
    pixels = tiny.pixels(2, size=image["image_size"])
    full = encoder(tiny.clip(dict(image)))
    half = encoder(tiny.clip(dict(image)), dtype=dtype)
    assert half.dtype == dtype
    a, b = full.encode_image(pixels, local=True), half.encode_image(pixels, local=True)
    for x, y in (*zip(a, b, strict=True), (full.encode_text(PROMPTS), half.encode_text(PROMPTS))):
        assert y.dtype == dtype
        assert F.cosine_similarity(x, y.float(), dim=-1).min() > 0.99


def test_no_gradient_no_inference_tensors_and_empty_batches():
    enc = encoder(tiny.clip())
    out = enc.encode_image(tiny.pixels(2), local=True)
    assert not out.image.requires_grad and not out.local.requires_grad
    assert not out.image.is_inference()  # may take part in a caller's autograd graph
    with torch.inference_mode():
        enc.encode_image(tiny.pixels(1), local=True)
        enc.encode_text(["a"])
    none = enc.encode_image(tiny.pixels(0), local=True)
    assert none.image.shape == (0, tiny.DIM) and none.local.shape == (0, 9, tiny.DIM)
    assert enc.encode_text([]).shape == (0, tiny.DIM)


def test_bad_pixels_are_named():
    enc = encoder(tiny.clip())
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), got \(3, 24, 24\)"):
        enc.encode_image(tiny.pixels(1)[0])
    with pytest.raises(ValueError, match="normalised floats"):
        enc.encode_image(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(TypeError, match="CallableEncoder"):
        encoder(torch.nn.Linear(2, 2))


def test_fingerprint_follows_weights_architecture_precision_and_tokenizer():
    base = encoder(tiny.clip())
    assert base.fingerprint == encoder(tiny.clip()).fingerprint
    others = {
        "activation": encoder(tiny.clip(quick_gelu=True)),
        "heads": encoder(tiny.clip(tiny.vision(head_width=tiny.WIDTH // 2))),
        "text pooling": encoder(tiny.clip(text={"pool_type": "last"})),
        "dtype": encoder(tiny.clip(), dtype=torch.bfloat16),
        "tokenizer": OpenClipEncoder(
            tiny.clip(), tiny.blank, open_clip.SimpleTokenizer(clean="whitespace")
        ),
    }
    for what, other in others.items():
        assert other.fingerprint != base.fingerprint, what
    before = base.fingerprint
    with torch.no_grad():
        base.model.visual.proj[0, 0] += 1e-6
    assert base.fingerprint != before


def test_digest_depends_on_every_part_of_the_state():
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    states = [
        ({"a": zeros}, {}),
        ({"b": zeros}, {}),
        ({"a": zeros.bfloat16()}, {}),
        ({"a": zeros.T}, {}),
        ({"a": zeros, "b": zeros}, {}),
        ({"a": zeros + 1}, {}),
        ({"a": zeros}, {"heads": 2}),
    ]
    assert len({weights_digest(*s) for s in states}) == len(states)
    strided = torch.arange(12.0).reshape(3, 4)[:, ::2]
    assert weights_digest({"a": strided}, {}) == weights_digest({"a": strided.contiguous()}, {})


def test_fingerprint_is_remembered(monkeypatch):
    from fastood.models import fingerprint

    calls = []
    real = fingerprint.weights_digest
    monkeypatch.setattr(fingerprint, "weights_digest", lambda *a: calls.append(1) or real(*a))
    enc = encoder(tiny.clip())
    assert not calls  # lazy
    assert enc.fingerprint == enc.fingerprint
    assert len(calls) == 1


def test_prompts_that_fill_the_context_are_reported():
    enc = encoder(tiny.clip())
    assert enc.warn_prompts(PROMPTS) == []
    (note,) = enc.warn_prompts(["a photo of a " + "very " * 80 + "big dog", "a cat"])
    assert "77 tokens" in note and note.startswith("1 prompt")


def test_two_threads_do_not_mix_their_patches():
    from concurrent.futures import ThreadPoolExecutor

    enc = encoder(tiny.clip())
    batches = [tiny.pixels(2, seed=s) for s in range(8)]
    alone = [enc.encode_image(b, local=True).local for b in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda b: enc.encode_image(b, local=True).local, batches * 4))
    for i, got in enumerate(together):
        torch.testing.assert_close(got, alone[i % 8], atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_cpus_features_and_fingerprint():
    cpu, gpu = encoder(tiny.clip()), encoder(tiny.clip(), device="cuda")
    a = cpu.encode_image(tiny.pixels(3), local=True)
    b = gpu.encode_image(tiny.pixels(3), local=True)
    pairs = [*zip(a, b, strict=True), (cpu.encode_text(PROMPTS), gpu.encode_text(PROMPTS))]
    for x, y in pairs:
        assert y.device.type == "cuda"
        torch.testing.assert_close(y.cpu(), x, atol=1e-3, rtol=1e-3)
    assert gpu.fingerprint == cpu.fingerprint


def test_a_layer_replaced_after_loading_is_seen():
    """Adapter libraries put a module of their own in the place of a linear layer."""
    model = tiny.clip()
    enc = encoder(model)
    before = enc.encode_text(PROMPTS)
    mlp = model.transformer.resblocks[0].mlp
    mlp.c_proj = torch.nn.Sequential(mlp.c_proj, torch.nn.Linear(32, 32))
    with torch.no_grad():
        assert torch.equal(enc.encode_text(PROMPTS), model.encode_text(tiny.TOKENIZER(PROMPTS)))
    assert not torch.allclose(enc.encode_text(PROMPTS), before)
    assert not enc.text.croppable
