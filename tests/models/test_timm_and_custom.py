"""Classifiers and networks of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastood
from fastood.errors import ModelError
from fastood.models import CallableEncoder, TimmEncoder, load_model
from tests.models import tiny

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_head_on_features_gives_the_classifiers_logits(name):
    options = {"img_size": 32} if name.startswith("vit") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    tiny.shake(model)
    enc = TimmEncoder(model, tiny.blank)
    pixels = tiny.pixels(3, size=32)
    features = enc.encode_image(pixels).image
    with torch.no_grad():
        logits = model(pixels)
    got = enc.head().similarities(features)
    torch.testing.assert_close(got.image, logits, atol=1e-5, rtol=1e-4)
    assert got.local is None and enc.head().logit_scale == enc.logit_scale == 1.0
    torch.testing.assert_close(
        fastood.msp(similarity=got.image, tau=1.0), logits.softmax(-1).max(-1).values
    )
    assert features.shape == (3, enc.embed_dim)
    assert enc.encode_image(tiny.pixels(0, size=32)).image.shape == (0, enc.embed_dim)
    assert enc.text is None


def test_half_precision_classifier_gives_float32_logits():
    model = timm.create_model("resnet10t", pretrained=False, num_classes=7)
    tiny.shake(model)
    full = TimmEncoder(model, tiny.blank)
    expected = full.head().similarities(full.encode_image(tiny.pixels(2, size=32)).image).image
    half = TimmEncoder(model, tiny.blank, dtype=torch.bfloat16)
    features = half.encode_image(tiny.pixels(2, size=32)).image
    got = half.head().similarities(features).image
    assert features.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99


def test_timm_says_what_it_has_not():
    model = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    enc = TimmEncoder(model)
    with pytest.raises(ModelError, match="no joint space"):
        enc.encode_image(tiny.pixels(1, size=64), local=True)
    with pytest.raises(ModelError, match="no text tower"):
        enc.encode_text(["a"])
    with pytest.raises(ValueError, match="no local features"):
        enc.head().similarities(torch.zeros(1, enc.embed_dim), torch.zeros(1, 4, enc.embed_dim))
    with pytest.raises(ModelError, match="no classifier"):
        TimmEncoder(timm.create_model("resnet10t", pretrained=False, num_classes=0))
    assert "Resize" in enc.preprocess_id and enc.fingerprint


def test_distilled_classifiers_are_refused_by_name():
    """Their logits are the mean of two heads, so no single layer maps features to logits."""
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, num_classes=5
    )
    tiny.shake(model)
    with pytest.raises(ModelError, match=r"no classifier|does not map the pre-logits"):
        TimmEncoder(model)


def test_timm_checkpoint_sets_the_number_of_classes(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("resnet10t", pretrained=False, num_classes=4)
    tiny.shake(model)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    enc = load_model("timm:resnet10t", checkpoint=tmp_path / "mine.safetensors", device="cpu")
    assert isinstance(enc, TimmEncoder)
    got = enc.head().similarities(enc.encode_image(tiny.pixels(1, size=64)).image).image
    with torch.no_grad():
        torch.testing.assert_close(got, model.eval()(tiny.pixels(1, size=64)), atol=1e-5, rtol=1e-4)
    assert enc.class_names is None


def test_published_weights_are_loaded_whole(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from fastood.models import files

    model = timm.create_model("resnet10t", pretrained=False).eval()
    tiny.shake(model)
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    asked = []
    for file in ("model.safetensors", "pytorch_model.bin"):
        monkeypatch.setattr(
            files, "hub_file", lambda *a, f=file, **k: asked.append(a) or str(tmp_path / f)
        )
        enc = load_model("timm:resnet10t.c3_in1k", device="cpu", allow_pickle=True)
        got = enc.head().similarities(enc.encode_image(tiny.pixels(2, size=64)).image).image
        with torch.no_grad():
            expected = model(tiny.pixels(2, size=64))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert asked[0] == ("timm/resnet10t.c3_in1k", ["model.safetensors", "pytorch_model.bin"])
    with pytest.raises(ModelError, match="allow_pickle=True"):
        load_model("timm:resnet10t", device="cpu")


def test_timm_knows_imagenet_names_of_its_own_weights():
    with pytest.warns(UserWarning, match="untrained"):
        enc = load_model("timm:resnet10t", pretrained="random", device="cpu")
    assert enc.class_names is not None and len(enc.class_names) == 1000
    assert "tench" in enc.class_names[0]


def tower() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 24 * 24, 5))


def make(**options) -> CallableEncoder:
    options = {"embed_dim": 5, "preprocess_id": "blank", **options}
    return CallableEncoder(options.pop("image", None) or tower(), tiny.blank, **options)


def test_module_tower_is_frozen_and_hashed():
    enc = make()
    pixels = tiny.pixels(2)
    assert torch.equal(enc.encode_image(pixels).image, enc.encode_image(pixels).image)
    assert not enc.encode_image(pixels).image.requires_grad
    assert enc.fingerprint == make().fingerprint
    other = tower()
    tiny.shake(other)
    assert make(image=other).fingerprint != enc.fingerprint
    vectors = {"a cat": torch.ones(5), "a dog": torch.arange(5.0)}
    with_text = make(text=vectors)
    assert with_text.fingerprint == make(text=dict(vectors)).fingerprint != enc.fingerprint
    assert torch.equal(with_text.encode_text(["a dog"]), torch.arange(5.0)[None])
    with pytest.raises(ModelError, match=r"no text features for 1 prompt\(s\), first 'a cow'"):
        with_text.encode_text(["a cow"])


def test_plain_functions_need_a_name_for_what_they_compute():
    def mean(pixels):
        return pixels.mean(dim=(2, 3))

    with pytest.raises(ValueError, match="fingerprint: a plain function cannot be hashed"):
        make(image=mean, embed_dim=3)
    with pytest.raises(ValueError, match="fingerprint"):
        make(text=lambda prompts: torch.ones(len(prompts), 5))
    with pytest.raises(ValueError, match="preprocess_id"):
        make(preprocess_id=None)
    enc = make(image=mean, embed_dim=3, fingerprint="mean v1", text=lambda p: torch.ones(len(p), 3))
    assert enc.fingerprint == "mean v1"
    torch.testing.assert_close(
        enc.encode_image(tiny.pixels(2)).image, tiny.pixels(2).mean(dim=(2, 3))
    )
    assert enc.encode_text(["a", "b"]).shape == (2, 3)


def test_local_features_of_a_custom_tower():
    def both(pixels):
        patches = pixels.flatten(2).transpose(1, 2)
        return patches.mean(dim=1), patches

    enc = make(image=both, embed_dim=3, patches=576, fingerprint="both")
    out = enc.encode_image(tiny.pixels(2), local=True)
    torch.testing.assert_close(out.local.mean(dim=1), out.image)
    wrong = make(image=both, embed_dim=3, patches=9, fingerprint="both")
    with pytest.raises(ModelError, match=r"local features \(2, 9, 3\), got \(2, 576, 3\)"):
        wrong.encode_image(tiny.pixels(2), local=True)
    with pytest.raises(ModelError, match="no local features"):
        make().encode_image(tiny.pixels(2), local=True)


def test_wrong_width_and_missing_text_are_named():
    with pytest.raises(ModelError, match=r"expected features \(2, 6\), got \(2, 5\)"):
        make(embed_dim=6).encode_image(tiny.pixels(2))
    with pytest.raises(ModelError, match="no text tower"):
        make().encode_text(["a"])
    with pytest.raises(ValueError, match="logit_scale"):
        make(logit_scale=0.0)
