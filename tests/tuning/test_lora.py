"""Low-rank updates against plain arithmetic on the weights, peft, and the frozen model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models import CallableEncoder
from fastood.models.base import Encoder
from fastood.models.copies import copy_encoder
from fastood.models.matrices import KINDS, list_matrices
from fastood.tuning.locoop import locoop_loss
from fastood.tuning.loop import train
from fastood.tuning.lora import LoRA
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.state import load_method, save_method
from tests.models import tiny
from tests.tolerances import LORA_MERGED_ATOL
from tests.tuning.towers import (
    ENCODERS,
    LABELS,
    NAMES,
    WORDS,
    hf_encoder,
    moved,
    open_clip_encoder,
    pixels,
)


@pytest.fixture(params=list(ENCODERS))
def encoder(request) -> Encoder:
    return ENCODERS[request.param]()


def updated_state(method: LoRA, model: nn.Module) -> dict[str, Tensor]:
    """The plain form: weights + scale · B A, written out for each matrix of ``model``."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    scale = method.settings()["alpha"] / method.settings()["rank"]
    for m in method.matrices:
        key = m.address.replace(".", "_")
        delta = scale * (method.B[key] @ method.A[key])
        delta = delta.T if m.transposed else delta
        full = torch.zeros_like(state[m.key])
        rows = slice(None) if m.rows is None else slice(*m.rows)
        full[rows] = delta
        state[m.key] = state[m.key] + full
    return state


def plain_loss(method: LoRA, encoder: Encoder, batch: Batch, loss: str) -> Tensor:
    """The loss with updated weights put into the untouched model by ``functional_call``."""
    model = encoder.model

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images, tokens):
            if hasattr(model, "get_image_features"):
                from fastood.models.common import features_of

                z = features_of(model.get_image_features(pixel_values=images))
                t = features_of(model.get_text_features(input_ids=tokens))
                return z, t
            return model.encode_image(images), model.encode_text(tokens)

    state = {f"model.{k}": v for k, v in updated_state(method, model).items()}
    tokens = encoder.tokenize([f"a photo of a {w}" for w in WORDS])
    z, t = torch.func.functional_call(Both(), state, (batch.image, tokens))
    assert loss == "ce"
    s = F.normalize(z, dim=-1) @ F.normalize(t, dim=-1).T
    return F.cross_entropy(s * encoder.logit_scale, batch.labels)


def gradients(loss: Tensor, method: LoRA) -> dict[str, Tensor]:
    names, parameters = zip(*method.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_a_new_update_changes_nothing_bit_for_bit(encoder):
    method = LoRA(encoder, NAMES, kinds=KINDS, rank=3)
    prompts = [f"a photo of a {w}" for w in WORDS]
    images = pixels(encoder)
    student = method._student
    with torch.no_grad():
        for local in (False, True):
            ours, theirs = (e.encode_image(images, local=local) for e in (student, encoder))
            assert torch.equal(ours.image, theirs.image)
            assert ours.local is None or torch.equal(ours.local, theirs.local)
    assert torch.equal(student.encode_text(prompts), encoder.encode_text(prompts))
    same = method.adapted(encoder)
    assert same.fingerprint == encoder.fingerprint
    assert torch.equal(same.encode_image(images).image, encoder.encode_image(images).image)


def test_gradients_are_those_of_the_plain_form(encoder):
    method = moved(LoRA(encoder, NAMES, kinds=KINDS, rank=3, loss="ce"))
    batch = Batch(pixels(encoder), LABELS)
    terms, predicted = method.terms(batch)
    ours, theirs = total_loss(terms), plain_loss(method, encoder, batch, "ce")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    mine, wanted = gradients(ours, method), gradients(theirs, method)
    assert len(mine) == 2 * len(list_matrices(encoder.model))
    for name, want in wanted.items():
        torch.testing.assert_close(mine[name], want, rtol=1e-8, atol=1e-10, msg=name)
        assert float(want.abs().max()) > 0, name
    trained = {id(p) for p in method._student.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in method.parameters()}
    assert predicted.shape == LABELS.shape


def test_libraries_agree():
    """The same weights in open_clip and Hugging Face, the same seed: the same training."""
    ours, theirs = open_clip_encoder(), hf_encoder()
    a, b = (LoRA(e, NAMES, kinds=KINDS, rank=2, top_k=2) for e in (ours, theirs))
    batch = Batch(pixels(ours), LABELS)
    losses: list[list[float]] = []
    for method in (a, b):
        optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = total_loss(method.terms(batch)[0])
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    merged = [m.adapted(e).encode_image(batch.image).image for m, e in ((a, ours), (b, theirs))]
    torch.testing.assert_close(*merged, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("library", list(ENCODERS))
def test_merged_equals_attached_and_has_the_original_keys(library, dtype):
    encoder = ENCODERS[library](dtype=dtype)
    method = moved(LoRA(encoder, NAMES, kinds=KINDS, rank=3))
    state = copy.deepcopy(encoder.model.state_dict())
    merged = method.adapted(encoder)
    assert list(merged.model.state_dict()) == list(state)
    assert [n for n, _ in merged.model.named_parameters()] == [
        n for n, _ in encoder.model.named_parameters()
    ]
    assert {type(m) for m in merged.model.modules()} == {type(m) for m in encoder.model.modules()}
    encoder.model.load_state_dict(merged.model.state_dict(), strict=True)  # fits
    encoder.model.load_state_dict(state, strict=True)
    images, prompts = pixels(encoder), [f"a photo of a {w}" for w in WORDS]
    tolerance = {"rtol": 0, "atol": LORA_MERGED_ATOL if dtype == torch.float32 else 1e-12}
    ours, theirs = (e.encode_image(images, local=True) for e in (merged, method._student))
    torch.testing.assert_close(ours.image, theirs.image, **tolerance)
    torch.testing.assert_close(ours.local, theirs.local, **tolerance)
    text = F.normalize(merged.encode_text(prompts), dim=-1)
    torch.testing.assert_close(text, method.text().detach(), **tolerance)
    # and the plain form says the same of every weight
    for key, want in updated_state(method, encoder.model).items():
        torch.testing.assert_close(merged.model.state_dict()[key], want.to(dtype), **tolerance)
    # the encoder given is as it was
    assert all(torch.equal(v, state[k]) for k, v in encoder.model.state_dict().items())
    assert merged.fingerprint != encoder.fingerprint
    assert float((ours.image - encoder.encode_image(images).image).abs().max()) > 1e-3
    assert [p.requires_grad for p in merged.model.parameters()] == [
        p.requires_grad for p in encoder.model.parameters()
    ]


def test_locoop_loss_is_that_of_the_features(encoder):
    """Global and patch features of the merged model, put into the loss by themselves."""
    method = moved(LoRA(encoder, NAMES, kinds=("up", "v"), rank=3, weight=0.4, top_k=2))
    batch = Batch(pixels(encoder), LABELS)
    terms, predicted = method.terms(batch)
    merged = method.adapted(encoder)
    found = merged.encode_image(batch.image, local=True)
    text = merged.encode_text([f"a photo of a {w}" for w in WORDS])
    want = locoop_loss(
        found.image, found.local, text, LABELS,
        tau=1 / encoder.logit_scale, weight=0.4, top_k=2, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(total_loss(terms).detach(), want, rtol=1e-8, atol=1e-8)
    assert [t.name for t in terms] == ["cross_entropy", "patches", "ood_patches"]
    assert float(terms[1].count) > 0  # there were OOD patches
    s = F.normalize(found.image, dim=-1) @ F.normalize(text, dim=-1).T
    assert torch.equal(predicted, s.argmax(dim=-1))


def test_patch_loss_has_the_gradient_of_finite_differences():
    encoder = open_clip_encoder()
    method = moved(LoRA(encoder, NAMES, kinds=("v", "up"), rank=2, weight=0.7, top_k=2, layers=[1]))
    batch = Batch(pixels(encoder), LABELS)
    found = gradients(total_loss(method.terms(batch)[0]), method)
    for name, parameter in method.named_parameters():
        direction = torch.randn_like(parameter)
        step = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(float(total_loss(method.terms(batch)[0])))
                parameter.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("towers", ["image", "text"])
def test_one_tower_alone(towers):
    encoder = open_clip_encoder()
    method = moved(LoRA(encoder, NAMES, towers=towers, rank=2, loss="ce"))
    assert {m.tower for m in method.matrices} == {towers}
    total_loss(method.terms(Batch(pixels(encoder), LABELS))[0]).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in method.parameters())
    merged = method.adapted(encoder)
    same_image = torch.equal(*(e.encode_image(pixels(encoder)).image for e in (merged, encoder)))
    same_text = torch.equal(*(e.encode_text(WORDS) for e in (merged, encoder)))
    assert (same_image, same_text) == (towers == "text", towers == "image")


def test_half_precision_towers_train_float32_masters():
    encoder = open_clip_encoder(dtype=torch.bfloat16)
    method = moved(LoRA(encoder, NAMES, rank=2, loss="ce"))
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    total_loss(method.terms(Batch(pixels(encoder), LABELS))[0]).backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters())
    merged = method.adapted(encoder)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(
        merged.encode_image(pixels(encoder)).image,
        method._student.encode_image(pixels(encoder)).image,
    )


def test_saved_and_loaded(encoder, tmp_path):
    method = moved(LoRA(encoder, NAMES, rank=2, towers=("image", "text"), layers=[-1]))
    path = save_method(tmp_path / "lora.safetensors", method)
    again = load_method(path, encoder)
    assert isinstance(again, LoRA)
    assert torch.equal(
        again.adapted(encoder).encode_image(pixels(encoder)).image,
        method.adapted(encoder).encode_image(pixels(encoder)).image,
    )
    assert again.adapted(encoder).fingerprint == method.adapted(encoder).fingerprint


def test_template_ensembles():
    encoder = open_clip_encoder()
    templates = ["a photo of a {}", "{} texture."]
    method = moved(LoRA(encoder, NAMES, rank=2, templates=templates, loss="ce"))
    merged = method.adapted(encoder)
    each = [
        F.normalize(merged.encode_text([t.format(w) for w in WORDS]), dim=-1) for t in templates
    ]
    want = F.normalize(torch.stack(each).mean(dim=0), dim=-1)
    torch.testing.assert_close(method.text().detach(), want, rtol=1e-9, atol=1e-9)


def test_texts_in_chunks_have_the_same_gradient(encoder):
    batch = Batch(pixels(encoder), LABELS)
    found = []
    for chunk in (None, 1, 3):
        method = moved(LoRA(encoder, NAMES, kinds=KINDS, rank=2, loss="ce", chunk=chunk))
        found.append(gradients(total_loss(method.terms(batch)[0]), method))
    for other in found[1:]:
        for name, want in found[0].items():
            torch.testing.assert_close(other[name], want, rtol=1e-9, atol=1e-11, msg=name)


def test_tower_without_a_causal_mask_runs_whole():
    encoder = open_clip_encoder(text={"no_causal_mask": True})
    method = moved(LoRA(encoder, NAMES, rank=2, loss="ce"))
    merged = method.adapted(encoder)
    want = F.normalize(merged.encode_text([f"a photo of a {w}" for w in WORDS]), dim=-1)
    torch.testing.assert_close(method.text().detach(), want, rtol=1e-9, atol=1e-9)
    total_loss(method.terms(Batch(pixels(encoder), LABELS))[0]).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in method.parameters())


def test_an_empty_batch_stays_connected():
    encoder = open_clip_encoder()
    for towers in ("image", "text"):
        method = LoRA(encoder, NAMES, rank=2, loss="ce", towers=towers)
        terms, predicted = method.terms(Batch(pixels(encoder)[:0], LABELS[:0]))
        total_loss(terms).backward()
        assert any(p.grad is not None for p in method.parameters()) and len(predicted) == 0


def test_defaults_are_the_baseline():
    encoder = open_clip_encoder(
        image=tiny.vision(width=64), text={"width": 64}, dtype=torch.float32
    )
    method = LoRA(encoder, [f"class {i}" for i in range(14)])
    assert {m.kind for m in method.matrices} == {"up"}
    assert [m.address for m in method.matrices] == [
        "image.0.up", "image.1.up", "text.0.up", "text.1.up",
    ]  # fmt: skip
    settings = method.settings()
    assert (settings["rank"], settings["alpha"], settings["weight"]) == (32, 8.0, 0.1)
    assert settings["top_k"] == 4  # of SeTAR's 14 classes
    recipe = LoRA.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (5, 100, 0.01)


def test_defaults_of_deep_and_of_narrow_towers():
    deep = open_clip_encoder(image=tiny.vision(width=64, layers=13), text={"width": 64})
    settings = LoRA(deep, [f"class {i}" for i in range(10)]).settings()
    assert (settings["rank"], settings["weight"], settings["top_k"]) == (64, 0.5, 3)
    narrow = LoRA(open_clip_encoder(image=tiny.vision(layers=13)), NAMES)
    assert narrow.settings()["rank"] == min(min(m.shape) for m in narrow.matrices) == 32


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected"),
        ({"rank": 33}, ValueError, r"rank: expected at most 32, the full rank of image.0.up"),
        ({"loss": "mse"}, ValueError, 'loss: expected "locoop" or "ce"'),
        ({"top_k": 4}, ValueError, "top_k: expected below the 4 classes, got 4: no patch"),
        ({"top_k": 0}, ValueError, "top_k: expected"),
        ({"kinds": "fc1"}, ValueError, "kinds: expected some of"),
        ({"layers": [7]}, ValueError, "layers: expected numbers in -2..1"),
        ({"chunk": 0}, ValueError, "chunk: expected"),
        ({"alpha": "8"}, ValueError, "alpha: expected a finite number"),
        ({"templates": "none"}, ValueError, "templates: expected one with {}"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        LoRA(open_clip_encoder(), NAMES, **{"rank": 2, **settings})


def test_bad_encoders():
    resnet = open_clip_encoder(image=tiny.RESNET)
    with pytest.raises(ModelError, match="image tower of CLIP has no up"):
        LoRA(resnet, NAMES, rank=2)
    pooled = open_clip_encoder(image=tiny.vision(pool_type="avg"))
    with pytest.raises(ModelError, match='use loss="ce"'):
        LoRA(pooled, NAMES, rank=2)
    LoRA(pooled, NAMES, rank=2, loss="ce")
    with pytest.raises(ModelError, match=r"Hugging Face CLIPs.* got a CallableEncoder"):
        copy_encoder(CallableEncoder(nn.Flatten(), tiny.blank, embed_dim=4, preprocess_id="none"))
    one = open_clip_encoder()
    other = open_clip_encoder(image=tiny.vision(layers=3))
    with pytest.raises(ModelError, match="does not have the matrices"):
        LoRA(one, NAMES, rank=2).adapted(other)


def test_peft_agrees():
    """peft on the Hugging Face model: the same A and B, the same outputs and gradients."""
    peft = pytest.importorskip("peft")
    encoder = hf_encoder()
    targets = {"up": "fc1", "down": "fc2", "q": "q_proj", "v": "v_proj", "o": "out_proj"}
    method = moved(LoRA(encoder, NAMES, kinds=tuple(targets), rank=3, alpha=5.0, loss="ce"))
    theirs = peft.get_peft_model(
        copy.deepcopy(encoder.model),
        peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=list(targets.values()), bias="none"),
    ).double()
    layers = dict(theirs.base_model.model.named_modules())
    factors = {}
    for m in method.matrices:
        layer = layers[m.module]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        key = m.address.replace(".", "_")
        with torch.no_grad():
            a.copy_(method.A[key])
            b.copy_(method.B[key])
        factors[f"A.{key}"], factors[f"B.{key}"] = a, b
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert len(trained) == len(factors)
    images, tokens = pixels(encoder), encoder.tokenize([f"a photo of a {w}" for w in WORDS])
    from fastood.models.common import features_of

    theirs.eval()
    z = features_of(theirs.get_image_features(pixel_values=images))
    t = features_of(theirs.get_text_features(input_ids=tokens))
    s = F.normalize(z, dim=-1) @ F.normalize(t, dim=-1).T
    want = F.cross_entropy(s * encoder.logit_scale, LABELS)
    terms, _ = method.terms(Batch(images, LABELS))
    torch.testing.assert_close(total_loss(terms), want, rtol=1e-10, atol=1e-10)
    mine = gradients(total_loss(terms), method)
    for name, gradient in zip(factors, torch.autograd.grad(want, factors.values()), strict=True):
        torch.testing.assert_close(mine[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(
        features_of(merged.get_image_features(pixel_values=images)),
        method.adapted(encoder).encode_image(images).image,
        rtol=1e-10,
        atol=1e-10,
    )


class Pixels:
    """Training data of pixels, equal in every epoch."""

    name, views, digest = "pixels", 1, "pixels of a test"

    def __init__(self, encoder: Encoder, n: int) -> None:
        self.class_names = tuple(NAMES)
        self.labels = torch.arange(n) % len(NAMES)
        g = torch.Generator().manual_seed(3)
        shape = (3, tiny.SIZE, tiny.SIZE)
        kinds = torch.randn(len(NAMES), *shape, generator=g)
        self.images = (kinds[self.labels] + torch.randn(n, *shape, generator=g)).to(encoder.dtype)
        self.paths = tuple(f"{i}.png" for i in range(n))

    def batch(self, index: Tensor, epoch: int) -> Batch:
        return Batch(self.images[index], self.labels[index])

    def prefetch(self, index: Tensor, epoch: int) -> None:
        pass

    def contents(self) -> dict[bytes, str]:
        return {p.encode(): p for p in self.paths}

    def describe(self) -> dict[str, str]:
        return {"name": self.name}


def test_the_loop_trains_both_towers(tmp_path):
    encoder = open_clip_encoder(dtype=torch.float32)
    data = Pixels(encoder, 16)
    recipe = replace(LoRA.recipe, epochs=3, batch_size=6, lr=0.05)
    method = LoRA(encoder, NAMES, rank=4, top_k=2)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    history = train(method, data, recipe=recipe, validation=data, out=tmp_path)
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert all(not torch.equal(v, before[k]) for k, v in method.state_dict().items())
    merged = method.adapted(encoder)
    z = F.normalize(merged.encode_image(data.images).image, dim=-1)
    text = F.normalize(merged.encode_text([f"a photo of a {w}" for w in WORDS]), dim=-1)
    right = ((z @ text.T).argmax(dim=-1) == data.labels).float().mean()
    assert float(right) == pytest.approx(history.epochs[-1]["validation"])
