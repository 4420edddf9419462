"""SeTAR+FT and LoRA of Swin classifiers: logits of the last layer stand where cosines do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.errors import ModelError
from fastood.models.hf_classifier import HFClassifierEncoder
from fastood.models.timm_classifier import TimmEncoder
from fastood.pipeline.asked import sizes_of
from fastood.setar.recipe import Recipe
from fastood.tuning.adaptation import adapt
from fastood.tuning.lora import LoRA
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.setar_ft import SeTARFT
from fastood.tuning.state import save_method
from tests.models import swins, tiny

NAMES = [f"class {i}" for i in range(swins.CLASSES)]
LABELS = torch.tensor([0, 3, 6])
PICKS = [["image", "up", 8, 0.3], ["image", "v", 3, 0.25], ["visual", "W_down", [2, 1], 4]]


def make(kind: str, dtype: torch.dtype = torch.float64, names=NAMES):
    build = TimmEncoder if "timm" in kind else HFClassifierEncoder
    return build(swins.swin(kind).to(dtype), tiny.blank, name=kind, class_names=names)


def pixels(encoder) -> Tensor:
    return tiny.pixels(3, size=swins.IMAGE).to(encoder.dtype)


def moved(method):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    return method


def logits_of(encoder) -> tuple[Tensor, Tensor]:
    found = encoder.encode_image(pixels(encoder), local=True)
    layer = encoder.classifier()
    return layer(found.image), layer(found.local)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", swins.KINDS)
def test_at_first_it_is_the_original_model_bit_for_bit(kind, dtype):
    encoder = make(kind, dtype)
    method = SeTARFT(encoder, NAMES, picks=PICKS)
    assert [m.address for m in method.matrices] == ["image.8.up", "image.3.v", "image.5.down"]
    assert method.adapted(encoder).fingerprint == encoder.fingerprint
    with torch.no_grad():
        ours, theirs = (e.encode_image(pixels(e), local=True) for e in (method._student, encoder))
    assert torch.equal(ours.image, theirs.image) and torch.equal(ours.local, theirs.local)


@pytest.mark.parametrize("kind", swins.KINDS)
def test_the_loss_is_that_of_the_logits(kind):
    """Cross-entropy and patch term of the merged model's logits, the authors' way."""
    encoder = make(kind)
    method = moved(SeTARFT(encoder, NAMES, picks=PICKS, weight=0.7, top_k=2))
    terms, predicted = method.terms(Batch(pixels(encoder), LABELS))
    logits, local = logits_of(method.adapted(encoder))
    top = local.topk(2, dim=-1).indices
    ood = ~(top == LABELS[:, None, None]).any(dim=-1)
    p = F.softmax(local, dim=-1)[ood]
    want = F.cross_entropy(logits, LABELS) + 0.7 * (p * (p + 1e-5).log()).sum(dim=-1).mean()
    assert 0 < int(ood.sum()) < ood.numel()
    torch.testing.assert_close(total_loss(terms).detach(), want.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(predicted, logits.argmax(dim=-1))
    # gradients reach all of it
    total_loss(terms).backward()
    for name, parameter in method.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["timm v2", "hf v2"])
def test_gradients_are_those_of_finite_differences(kind):
    encoder = make(kind)
    method = moved(SeTARFT(encoder, NAMES, picks=PICKS, top_k=2))
    batch = Batch(pixels(encoder), LABELS)
    total_loss(method.terms(batch)[0]).backward()
    g = torch.Generator().manual_seed(1)
    for name, parameter in method.named_parameters():
        direction, values = torch.randn(parameter.shape, generator=g, dtype=parameter.dtype), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
                values.append(float(total_loss(method.terms(batch)[0])))
                parameter.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        want = float((parameter.grad * direction).sum())
        assert slope == pytest.approx(want, rel=1e-4, abs=1e-7), name


def test_recipes_of_stages_and_adaptations(tmp_path):
    encoder = make("hf v2")
    recipe = Recipe.of(encoder, PICKS)
    assert recipe.model["stages"] == list(swins.DEPTHS)
    assert recipe.lora_settings() == [
        ["visual", "W_up", [3, 1], 0.3], ["visual", "W_v", [1, 1], 0.25],
        ["visual", "W_down", [2, 1], 4],
    ]  # fmt: skip
    theirs = Recipe.from_lora_settings(recipe.lora_settings())
    assert theirs.apply(encoder).fingerprint == recipe.apply(encoder).fingerprint
    with pytest.raises(ModelError, match=r"no image.3.2.up; its stages have \[2, 2, 3, 2\]"):
        Recipe.from_lora_settings([["visual", "W_up", [3, 2], 0.1]]).apply(encoder)
    method = moved(SeTARFT(encoder, NAMES, picks=recipe))
    file = save_method(tmp_path / "ft.safetensors", method)
    found = adapt(encoder, [file]).encoder
    assert found.fingerprint == method.adapted(encoder).fingerprint != encoder.fingerprint
    assert found.head() is not None


def test_published_settings():
    encoder = make("timm v2")
    settings = SeTARFT(encoder, NAMES, picks=PICKS).settings()
    assert (settings["weight"], settings["top_k"]) == (0.01, 2)
    assert sizes_of(SeTARFT, encoder) == sizes_of(LoRA, encoder) == {"batch_size": 50}


def test_lora_of_a_classifier():
    encoder = make("timm v1")
    method = moved(LoRA(encoder, NAMES, loss="ce"))
    assert len(method.matrices) == sum(swins.DEPTHS)
    assert method.settings()["rank"] == min(112, *(min(m.shape) for m in method.matrices))
    assert LoRA(encoder, NAMES, rank=4).settings()["weight"] == 0.01
    want = F.cross_entropy(logits_of(method.adapted(encoder))[0], LABELS)
    found = total_loss(method.terms(Batch(pixels(encoder), LABELS))[0])
    torch.testing.assert_close(found.detach(), want.detach(), rtol=1e-9, atol=1e-9)


def test_classes_are_the_models_own():
    encoder = make("timm v2")
    batch = Batch(pixels(encoder), LABELS)
    turned = NAMES[::-1]  # the same classes in another order: by name
    a = SeTARFT(encoder, NAMES, picks=PICKS, top_k=2).terms(batch)[0]
    b = SeTARFT(encoder, turned, picks=PICKS, top_k=2)
    other = b.terms(Batch(batch.image, swins.CLASSES - 1 - LABELS))[0]
    torch.testing.assert_close(total_loss(a), total_loss(other))
    with pytest.raises(ModelError, match="expected the 7 classes of timm v2, got 3"):
        SeTARFT(encoder, NAMES[:3], picks=PICKS)
    with pytest.warns(RuntimeWarning, match="whose order is taken"):
        SeTARFT(encoder, [f"n0{i}" for i in range(7)], picks=PICKS)
    SeTARFT(make("timm v2", names=None), NAMES, picks=PICKS)


def test_factored_layers_of_a_classifier():
    encoder = make("hf v2", torch.float32)
    recipe = Recipe.of(encoder, [["image", "up", layer, 0.5] for layer in range(9)])
    dense, thin = recipe.apply(encoder), recipe.apply(encoder, factored=True)
    ours, theirs = (e.encode_image(pixels(e)).image for e in (thin, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in thin.model.parameters()) < sum(
        p.numel() for p in dense.model.parameters()
    )
