"""Hugging Face image classifiers, and copies of classifiers of every library."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fastood
from fastood.errors import ModelError
from fastood.models import HFClassifierEncoder, TimmEncoder, load_model
from fastood.models.copies import copy_encoder
from fastood.models.matrices import list_matrices
from tests import tolerances as tol
from tests.models import swins, tiny

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 5}


def vit():
    config = transformers.ViTConfig(**SMALL, intermediate_size=32, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def processor(size: int = swins.IMAGE):
    # the one that needs torch and pillow only, where there is a choice
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    return kind(size={"height": size, "width": size})


MAKERS = {
    "swin": lambda: swins.swin("hf v1"),
    "swinv2": lambda: swins.swin("hf v2"),
    "vit": vit,
    "resnet": resnet,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_head_on_features_gives_the_models_logits(kind):
    model = MAKERS[kind]().train()
    tiny.shake(model, seed=3)
    enc = HFClassifierEncoder(model, tiny.blank)
    assert not model.training
    size = 32 if kind == "vit" else swins.IMAGE
    pixels = tiny.pixels(3, size=size)
    features = enc.encode_image(pixels).image
    assert features.shape == (3, enc.embed_dim) and not features.requires_grad
    got = enc.head().similarities(features).image
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=tol.CLASSIFIER_LOGITS_ATOL)
    torch.testing.assert_close(
        fastood.energy(similarity=got, tau=1.0),
        expected.logsumexp(-1),
        rtol=0,
        atol=tol.CLASSIFIER_LOGITS_ATOL,
    )
    assert enc.encode_image(tiny.pixels(0, size=size)).image.shape == (0, enc.embed_dim)
    assert enc.logit_scale == enc.head().logit_scale == 1.0 and enc.text is None


def test_swin_features_are_the_pooled_output():
    model = swins.swin("hf v2")
    enc = HFClassifierEncoder(model, tiny.blank)
    pixels = tiny.pixels(2, size=swins.IMAGE)
    with torch.no_grad():
        expected = model.swinv2(pixels).pooler_output
    assert torch.equal(enc.encode_image(pixels).image, expected)


def test_fingerprint_sees_weights_and_settings():
    model = swins.swin("hf v2")
    enc = HFClassifierEncoder(model, tiny.blank)
    first = enc.fingerprint
    assert HFClassifierEncoder(swins.swin("hf v2"), tiny.blank).fingerprint == first
    other = swins.swin("hf v2")
    other.config.window_size = 8
    assert HFClassifierEncoder(other, tiny.blank).fingerprint != first
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    assert enc.fingerprint != first


def test_what_it_has_not():
    enc = HFClassifierEncoder(vit(), tiny.blank, name="mine")
    with pytest.raises(ModelError, match=r"mine has no local features: classifiers have no joint"):
        enc.encode_image(tiny.pixels(1, size=32), local=True)
    with pytest.raises(ValueError, match="no local features"):
        enc.head().similarities(torch.zeros(1, 24), torch.zeros(1, 2, 24))
    with pytest.raises(ModelError, match="no text tower"):
        enc.encode_text(["a"])
    with pytest.raises(ModelError, match=r"expected a Hugging Face ...ForImageClassification"):
        HFClassifierEncoder(swins.swin("hf v2").swinv2, tiny.blank)
    config = transformers.ViTConfig(**{**SMALL, "num_labels": 0}, image_size=32, patch_size=8)
    with pytest.raises(ModelError, match=r"linear layer called classifier, got Identity"):
        HFClassifierEncoder(transformers.ViTForImageClassification(config), tiny.blank)


class HalvesForImageClassification(nn.Module):
    """A classifier whose logits are not those of its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(image_size=8)
        self.body, self.classifier = nn.Linear(192, 4), nn.Linear(4, 3)

    def forward(self, pixel_values):
        logits = self.classifier(self.body(pixel_values.flatten(1))) / 2
        return transformers.modeling_outputs.ImageClassifierOutput(logits=logits)


def test_logits_of_more_than_the_last_layer_are_refused():
    with pytest.raises(ModelError, match="does not map the pre-logits"):
        HFClassifierEncoder(HalvesForImageClassification(), tiny.blank)


def saved(folder, kind: str, **more):
    model = swins.hf(kind, **more)
    tiny.shake(model)
    model.save_pretrained(folder, safe_serialization=True)
    processor().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["hf v1", "hf v2"])
def test_loads_from_a_folder(kind, tmp_path):
    names = {i: f"animal {i}" for i in range(swins.CLASSES)}
    model = saved(tmp_path, kind, id2label=names)
    enc = load_model(f"hf:{tmp_path}", device="cpu")
    assert isinstance(enc, HFClassifierEncoder)
    assert enc.class_names == tuple(names.values())
    assert enc.name == f"hf:{tmp_path}"
    from PIL import Image

    shown = enc.preprocess(Image.new("RGB", (90, 50), (200, 30, 60)))[None]
    assert shown.shape == (1, 3, swins.IMAGE, swins.IMAGE)
    got = enc.head().similarities(enc.encode_image(shown).image).image
    with torch.no_grad():
        torch.testing.assert_close(
            got, model(shown).logits, rtol=0, atol=tol.CLASSIFIER_LOGITS_ATOL
        )
    # the folder alone is enough to name it
    assert load_model(str(tmp_path), device="cpu").fingerprint == enc.fingerprint
    half = load_model(str(tmp_path), device="cpu", dtype="bf16")
    assert half.dtype == torch.bfloat16
    assert half.encode_image(shown).image.dtype == torch.bfloat16


def test_classes_without_names_and_random_weights(tmp_path):
    saved(tmp_path, "hf v2")
    with pytest.warns(UserWarning, match="untrained"):
        first = load_model(f"hf:{tmp_path}", pretrained="random", device="cpu", seed=1)
    assert first.class_names is None
    with pytest.warns(UserWarning, match="untrained"):
        again = load_model(f"hf:{tmp_path}", pretrained="random", device="cpu", seed=1)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != load_model(f"hf:{tmp_path}", device="cpu").fingerprint


def test_folders_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path, "hf v2")
    with pytest.raises(ValueError, match="has no meaning for hf:"):
        load_model(f"hf:{tmp_path}", tokenizer=object(), device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    changed = {**config, "architectures": ["Swinv2ForMaskedImageModeling"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"expected a CLIP or SigLIP model, got .*swinv2"):
        load_model(f"hf:{tmp_path}", device="cpu")
    # other depths: some weights would stay random
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [2, 2, 4, 2]}))
    with pytest.raises(ModelError, match="random"):
        load_model(f"hf:{tmp_path}", device="cpu")


@pytest.mark.parametrize("kind", swins.KINDS)
def test_copies_have_weights_of_their_own(kind):
    build = HFClassifierEncoder if "hf" in kind else TimmEncoder
    names = [f"c{i}" for i in range(swins.CLASSES)]
    enc = build(swins.swin(kind), tiny.blank, name="first", class_names=names)
    twin = copy_encoder(enc, name="second")
    assert type(twin) is build and twin.name == "second"
    assert twin.class_names == tuple(names) and twin.preprocess is enc.preprocess
    assert (twin.preprocess_id, twin.fingerprint) == (enc.preprocess_id, enc.fingerprint)
    pixels = tiny.pixels(2, size=swins.IMAGE)
    before = enc.encode_image(pixels).image
    assert torch.equal(twin.encode_image(pixels).image, before)
    with torch.no_grad():
        list_matrices(twin.model)[4].weight(twin.model).zero_()
    assert torch.equal(enc.encode_image(pixels).image, before)
    assert not torch.allclose(twin.encode_image(pixels).image, before)
    assert twin.fingerprint != enc.fingerprint
