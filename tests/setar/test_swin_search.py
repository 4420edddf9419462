"""Whole searches over Swin classifiers against the search written plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastood.data import load_images
from fastood.data.decode import decode
from fastood.models import HFClassifierEncoder, TimmEncoder
from fastood.models.matrices import find, swin_layers
from fastood.setar import search
from fastood.setar.recipe import Recipe
from tests import tolerances as tol
from tests.models import swins
from tests.setar.plain_search import without
from tests.setar.test_swin import value_path

DEPTHS = (1, 2, 2)
SIZE, CLASSES = 32, swins.CLASSES
RATIOS = (0, 0.1, 0.25, 0.4)
TOP_K, WEIGHT, BATCHES = 3, 0.5, (4, 4, 2)


def preprocess(image):
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return (x.permute(2, 0, 1) - 0.45) * 4


def encoder(kind: str):
    build = HFClassifierEncoder if "hf" in kind else TimmEncoder
    model = swins.swin(kind, image=SIZE, depths=DEPTHS).double()
    names = [f"class {i}" for i in range(CLASSES)]
    return build(model, preprocess, name=kind, class_names=names, preprocess_id="plain")


def noise_images(folder):
    g = np.random.default_rng(0)
    for i in range(10):
        (folder / f"class {i % CLASSES}").mkdir(exist_ok=True)
        noise = g.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((SIZE, SIZE)).save(folder / f"class {i % CLASSES}/{i}.png")
    return load_images(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("id"))


@torch.no_grad()
def loss_of(kind, enc, pixels, labels):
    """The objective by the model's own pass and the formula of the value path."""
    model = enc.model
    if "timm" in kind:
        last, norm, head = model.layers[-1].blocks[-1], model.norm, model.head.fc
    else:
        body = model.swinv2 if "v2" in kind else model.swin
        last, norm, head = body.encoder.layers[-1].blocks[-1], body.layernorm, model.classifier
    seen = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(pixels)
    handle.remove()
    logits = out if "timm" in kind else out.logits
    x = seen[0].reshape(len(pixels), -1, seen[0].shape[-1])
    local = head(norm(value_path(kind, last, x)))
    total = 0.0
    parts = zip(*(t.split(list(BATCHES)) for t in (logits, local, labels)), strict=True)
    for z, patches, y in parts:
        ood = ~patches.topk(TOP_K, dim=2).indices.eq(y[:, None, None]).any(2)
        p = patches.softmax(-1)[ood]
        term = float((p * (p + 1e-5).log()).sum(1).mean()) if ood.any() else 0.0
        total += len(y) / len(labels) * (float(F.cross_entropy(z, y)) + WEIGHT * term)
    return total


@pytest.mark.parametrize(
    ("kind", "name"), [("timm v2", "up"), ("hf v2", "up"), ("hf v1", "v"), ("timm v1", "down")]
)
def test_the_same_picks_and_losses(kind, name, images, tmp_path):
    enc = encoder(kind)
    pixels = torch.stack([preprocess(decode(item.read())) for item in images]).double()
    labels = torch.tensor([item.label for item in images])
    fingerprint = enc.fingerprint
    found = search(
        enc, images, order="visual_only_swin", kinds=name, ratios=RATIOS, top_k=TOP_K,
        weight=WEIGHT, batch_size=4, chunk=3, out=tmp_path,
    )  # fmt: skip
    assert enc.fingerprint == fingerprint

    best, picks, losses = loss_of(kind, enc, pixels, labels), [], []
    plain = encoder(kind)
    for matrix in reversed(find(plain.model, towers="image", kinds=name)):  # last stage first
        weight = matrix.weight(plain.model).detach()
        kept, chosen = weight.clone(), 0.0
        for ratio in RATIOS[1:]:
            weight.copy_(without(kept, ratio))
            losses.append(loss_of(kind, plain, pixels, labels))
            if losses[-1] < best:
                best, chosen = losses[-1], ratio
        weight.copy_(without(kept, chosen))
        picks.append((matrix.layer, chosen))
    assert [(p.layer, p.ratio) for p in found.recipe.picks] == picks
    assert sum(ratio > 0 for _, ratio in picks) > 0  # something was found
    got = [row.value.loss for row in found.rows if row.matrix]
    assert got == pytest.approx(losses, rel=tol.SWIN_F64_RTOL)
    assert found.final.loss == pytest.approx(best, rel=tol.SWIN_F64_RTOL)

    # the recipe makes that model, also through the authors' list of [stage, block]
    made = found.recipe.apply(enc)
    assert loss_of(kind, made, pixels, labels) == pytest.approx(best, rel=tol.SWIN_F64_RTOL)
    theirs = found.recipe.lora_settings()
    places = swin_layers(enc.model)
    assert [tuple(entry[2]) for entry in theirs] == [places[layer] for layer, _ in picks]
    again = Recipe.from_lora_settings(theirs).apply(enc)
    assert loss_of(kind, again, pixels, labels) == pytest.approx(best, rel=tol.SWIN_F64_RTOL)


def test_labels_are_found_by_the_names_of_the_classes(images):
    """Folders come in the order of the alphabet, a model's classes in any."""
    enc = encoder("timm v2")
    names = enc.class_names
    turned = [*names[2:], *names[:2]]
    enc.class_names = tuple(turned)
    assert (
        search(enc, images, ratios=(0.2,), layers=[-1]).recipe.search["objective"]["temperature"]
        == 1
    )
    pixels = torch.stack([preprocess(decode(item.read())) for item in images]).double()
    labels = torch.tensor([turned.index(names[item.label]) for item in images])
    options = {"ratios": (0.2,), "layers": [-1], "top_k": TOP_K, "weight": WEIGHT, "batch_size": 4}
    found = search(enc, images, **options)
    expected = loss_of("timm v2", enc, pixels, labels)
    assert found.baseline.loss == pytest.approx(expected, rel=tol.SWIN_F64_RTOL)

    enc.class_names = tuple(f"n{i:08}" for i in range(CLASSES))
    with pytest.warns(RuntimeWarning, match=r"'class 0' for 'n00000000', ..., 'class 6' for"):
        found = search(enc, images, **options)
    labels = torch.tensor([item.label for item in images])
    expected = loss_of("timm v2", enc, pixels, labels)
    assert found.baseline.loss == pytest.approx(expected, rel=tol.SWIN_F64_RTOL)
