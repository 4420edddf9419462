"""Tip-Adapter and Tip-Adapter-F against the dense published form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers_tuning
from fastood.detectors import Detector
from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.models import load_model
from fastood.models.base import Encoder
from fastood.scores.bank import ClassBank
from fastood.tuning.loop import train
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.state import load_method, save_method
from fastood.tuning.tip import TipAdapter, TipAdapterF, cache_values, published_alpha_beta
from fastood.tuning.tip_grid import published_grid, search
from fastood.tuning.views import FeatureData
from tests.tolerances import (
    SCORE_FROM_FEATURES_RTOL,
    TRAJECTORY_LOSS64_ATOL,
    TRAJECTORY_LOSS_ATOL,
)

NAMES = ["a_shirt", "shoes", "hat", "skirt", "dress"]
SHOTS = torch.tensor([3, 1, 4, 2, 3])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_model("fastood-tiny")


@pytest.fixture(scope="module")
def wide() -> Encoder:
    return load_model("fastood-tiny", dtype="float64")


class Views:
    """Training data of V views."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self.labels, self.views = images, labels, len(images)
        self.asked: list[int] = []

    def batch(self, index: Tensor, epoch: int) -> Batch:
        self.asked.append(len(index))
        return Batch(self._images[epoch % len(self._images)][index], self.labels[index])


def pictures(encoder, n=60, *, seed=0, shots=None):
    """Features near their class's text, any norm; labels, of given counts or drawn."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64
    text = TipAdapter(encoder, NAMES).text.to(dtype)
    labels = (
        torch.arange(len(NAMES)).repeat_interleave(shots)
        if shots is not None
        else torch.randint(len(NAMES), (n,), generator=g)
    )
    labels = labels[torch.randperm(len(labels), generator=g)]
    prototypes = torch.randn(len(NAMES), text.shape[1], generator=torch.Generator().manual_seed(9))
    noise = torch.randn(len(labels), text.shape[1], generator=g, dtype=dtype)
    norms = 1 + 9 * torch.rand(len(labels), 1, generator=g, dtype=dtype)
    rows = F.normalize(prototypes.to(dtype), dim=-1)[labels] + 0.3 * text[labels]
    rows = rows + 1.5 * noise / text.shape[1] ** 0.5
    return (rows * norms).to(torch.float64 if encoder.dtype == dtype else torch.float32), labels


def filled(encoder, cls=TipAdapter, **settings):
    method = cls(encoder, NAMES, **settings)
    method.set_cache(*pictures(encoder, shots=SHOTS))
    return method


def dense(method):
    return F.one_hot(method.key_labels, len(NAMES)).to(method.text)


def test_logits_are_those_of_the_dense_form(encoder):
    method = filled(encoder, alpha=2.5, beta=3.0, scale="logit")
    image, _ = pictures(encoder, seed=1)
    z = F.normalize(image, dim=-1)
    want = peers_tuning.tip_logits(
        z.double(), method.text.double(), method.keys.double(), dense(method).double(),
        2.5, 3.0, encoder.logit_scale,
    )  # fmt: skip
    got = method.head().similarities(image).image
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    # the default scale is that over γ
    cosine = filled(encoder, alpha=2.5, beta=3.0).head().similarities(image).image
    torch.testing.assert_close(cosine * encoder.logit_scale, got, rtol=1e-5, atol=1e-5)


def test_scales_and_temperatures(encoder):
    image, _ = pictures(encoder, seed=1)
    logit, cosine = (filled(encoder, scale=s).head() for s in ("logit", "cosine"))
    assert (logit.logit_scale, cosine.logit_scale) == (1.0, encoder.logit_scale)
    at_one = logit.similarities(image).image.softmax(dim=-1).amax(dim=-1)
    at_gamma = (cosine.similarities(image).image * encoder.logit_scale).softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(at_one, at_gamma, rtol=1e-5, atol=1e-6)
    patches = [h.similarities(image, image[:, None]).local for h in (logit, cosine)]
    torch.testing.assert_close(patches[0], encoder.logit_scale * patches[1])


def test_keys_are_normalised_means_of_raw_views(encoder):
    one, labels = pictures(encoder, shots=SHOTS)
    two = pictures(encoder, shots=SHOTS, seed=5)[0] * 7.0  # longer, so it weighs more
    method = TipAdapter(encoder, NAMES)
    data = Views(torch.stack([one, two]), labels)
    method.prepare(data)
    order = torch.argsort(labels, stable=True)
    want = F.normalize((one + two) / 2, dim=-1)[order]
    torch.testing.assert_close(method.keys, want, rtol=1e-6, atol=1e-7)
    assert method.key_labels.tolist() == sorted(labels.tolist())
    assert data.asked == [len(labels)] * 2
    more = TipAdapter(encoder, NAMES, views=3)
    more.prepare(Views(torch.stack([one, two]), labels))
    want = F.normalize(one + two + one, dim=-1)[order]
    torch.testing.assert_close(more.keys, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shots", [SHOTS, torch.full((5,), 3), torch.tensor([0, 2, 0, 2, 2])])
def test_cache_values_and_their_gradient(shots):
    g = torch.Generator().manual_seed(0)
    owners = torch.arange(5).repeat_interleave(shots)
    keys = torch.randn(len(owners), 6, generator=g, dtype=torch.float64, requires_grad=True)
    z = F.normalize(torch.randn(4, 6, generator=g, dtype=torch.float64), dim=-1)
    want = torch.exp(-2.0 * (1 - z @ keys.T)) @ F.one_hot(owners, 5).double()
    torch.testing.assert_close(cache_values(z, keys, owners, 5, 2.0), want, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda k: cache_values(z, k, owners, 5, 2.0), (keys,))


def test_alpha_zero_is_zero_shot_bit_for_bit(encoder):
    image, _ = pictures(encoder, seed=1)
    local = torch.randn(len(image), 3, image.shape[1], generator=torch.Generator().manual_seed(0))
    method = filled(encoder, alpha=0.0)
    got = method.head().similarities(image, local)
    want = ClassBank(method.text).similarities(image, local)
    assert torch.equal(got.image, want.image)
    assert torch.equal(got.local, want.local)
    assert got.image.abs().max() > 0


def test_patches_meet_the_prompts_alone(encoder):
    image, _ = pictures(encoder, seed=1)
    local = image[:, None] * 2
    found = filled(encoder, alpha=2.0).head().similarities(image, local)
    zero_shot = ClassBank(filled(encoder).text).similarities(image).image
    torch.testing.assert_close(found.local[:, 0], zero_shot, rtol=1e-5, atol=1e-6)
    assert float((found.image - zero_shot).abs().max()) > 1e-3


def test_tip_f_starts_as_tip(encoder):
    image, _ = pictures(encoder, seed=1)
    plain, trained = filled(encoder), filled(encoder, TipAdapterF)
    assert torch.equal(
        plain.head().similarities(image).image, trained.head().similarities(image).image
    )
    assert [n for n, _ in trained.named_parameters()] == ["keys"]
    assert list(plain.parameters()) == []


def test_training_leaves_the_training_free_cache_alone(encoder):
    """The authors' weight was a view of the keys."""
    image, labels = pictures(encoder, shots=SHOTS)
    trained = TipAdapterF(encoder, NAMES)
    trained.set_cache(image, labels)
    before, head = image.clone(), trained.head()
    kept = head.similarities(image).image
    with torch.no_grad():
        trained.keys.add_(1.0)
    assert torch.equal(image, before)
    assert torch.equal(head.similarities(image).image, kept)
    assert head.fingerprint != trained.head().fingerprint


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_twenty_steps_are_those_of_the_published_loop(precision, encoder, wide):
    model = encoder if precision == "float32" else wide
    atol = TRAJECTORY_LOSS_ATOL if precision == "float32" else TRAJECTORY_LOSS64_ATOL
    method = filled(model, TipAdapterF, alpha=2.0, beta=1.5)
    assert method.keys.dtype == getattr(torch, precision)
    image, labels = pictures(model, 64, seed=2)
    g = torch.Generator().manual_seed(3)
    batches = [torch.randperm(64, generator=g)[:16] for _ in range(20)]
    want = peers_tuning.tip_f_losses(
        F.normalize(image, dim=-1), labels, F.normalize(method.text, dim=-1),
        method.keys.detach(), dense(method), batches, alpha=2.0, beta=1.5, gamma=model.logit_scale,
    )  # fmt: skip
    recipe = TipAdapterF.recipe
    optimizer = torch.optim.AdamW(
        method.parameters(), lr=recipe.lr, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    got = []
    for index in batches:
        terms, _ = method.terms(Batch(image[index], labels[index]))
        loss = total_loss(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        got.append(float(loss.detach()))
    assert got[-1] != got[0]
    double = torch.float64
    torch.testing.assert_close(
        torch.tensor(got, dtype=double), torch.tensor(want, dtype=double), rtol=0, atol=atol
    )


def test_terms_predict_what_the_head_does(encoder):
    method = filled(encoder, TipAdapterF, alpha=2.0)
    image, labels = pictures(encoder, seed=4)
    terms, predicted = method.terms(Batch(image, labels))
    s = method.head().similarities(image).image
    assert torch.equal(predicted, s.argmax(dim=-1))
    want = F.cross_entropy(s * encoder.logit_scale, labels)
    torch.testing.assert_close(total_loss(terms).detach(), want, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_stays_connected(encoder):
    method = filled(encoder, TipAdapterF)
    terms, predicted = method.terms(Batch(torch.zeros(0, encoder.embed_dim), torch.zeros(0).long()))
    total_loss(terms).backward()
    assert float(method.keys.grad.abs().sum()) == 0 and len(predicted) == 0


def test_alpha_and_beta_are_chosen_on_validation_data_and_kept(encoder, tmp_path):
    method = filled(encoder, TipAdapterF)
    image, labels = pictures(encoder, 80, seed=6)
    found = method.choose(image, labels, dataset="Caltech-101")
    betas, alphas = published_grid(12.0, 5.0)
    want = search(
        image, labels, method.text, method.keys.detach(), method.key_labels,
        logit_scale=encoder.logit_scale, betas=betas, alphas=alphas,
    )  # fmt: skip
    assert (found.alpha, found.beta) == (want.alpha, want.beta) == (method.alpha, method.beta)
    head = method.head()
    right = head.similarities(image).image.argmax(dim=-1) == labels
    assert int(right.sum()) == round(found.accuracy * 80)
    chosen = method.settings()["chosen"]
    assert (chosen["on"], chosen["images"], chosen["initial"]) == ("validation", 80, [1.17, 1.0])
    again = load_method(save_method(tmp_path / "tip.safetensors", method), encoder)
    assert isinstance(again, TipAdapterF)
    assert torch.equal(again.head().similarities(image).image, head.similarities(image).image)
    assert again.head().fingerprint == head.fingerprint
    # training goes on with what it began with, also from the file
    z = F.normalize(image, dim=-1)
    cache = cache_values(z, method.keys, method.key_labels, 5, 1.0)
    logits = encoder.logit_scale * z @ method.text.T + 1.17 * cache
    for tip in (method, again):
        terms, _ = tip.terms(Batch(image, labels))
        torch.testing.assert_close(total_loss(terms), F.cross_entropy(logits, labels))
    method.choose(image, labels)
    assert method.settings()["chosen"]["initial"] == [1.17, 1.0]


def test_the_test_set_is_said_to_be_it(encoder):
    method = filled(encoder)
    image, labels = pictures(encoder, seed=6)
    method.choose(image, labels, select_on="test")
    assert method.settings()["chosen"]["on"] == "test"
    with pytest.raises(ValueError, match="select_on: expected"):
        method.choose(image, labels, select_on="train")


def test_saved_caches_come_back_with_their_size(encoder, tmp_path):
    image, _ = pictures(encoder, seed=1)
    for cls in (TipAdapter, TipAdapterF):
        method = filled(encoder, cls, alpha=0.7, beta=2.0, scale="logit", templates="{} texture.")
        again = load_method(save_method(tmp_path / "tip.safetensors", method), encoder)
        assert again.keys.requires_grad == (cls is TipAdapterF)
        assert torch.equal(
            again.head().similarities(image).image, method.head().similarities(image).image
        )


def test_heads_move_and_score_in_blocks(encoder, monkeypatch):
    head = filled(encoder, alpha=2.0).head()
    image, _ = pictures(encoder, seed=1)
    whole = head.similarities(image).image
    assert head.to(torch.float64).similarities(image.double()).image.dtype == torch.float64
    monkeypatch.setattr("fastood.scores.inputs.BLOCK", 100)
    torch.testing.assert_close(head.similarities(image).image, whole, rtol=1e-6, atol=1e-7)
    assert (len(head), head.dim) == (5, encoder.embed_dim)


def test_published_defaults():
    assert published_alpha_beta("StanfordCars") == (3.0, 1.0) == published_alpha_beta("caltech-101")
    assert published_alpha_beta("food101") == (1.17, 1.0) == published_alpha_beta()
    assert (TipAdapterF.recipe.epochs, TipAdapterF.recipe.batch_size) == (20, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha: expected a number >= 0, got -0.1"),
        ({"beta": -1}, "beta: expected a number >= 0"),
        ({"beta": math.nan}, "beta: expected a finite number"),
        ({"scale": "logits"}, 'scale: expected "cosine" or "logit"'),
        ({"views": 0}, "views: expected an integer|views: expected 1 <= views"),
        ({"templates": "no place"}, "templates: expected one with {}"),
    ],
)
def test_bad_settings(encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        TipAdapter(encoder, NAMES, **settings)


def test_bad_input(encoder):
    method = TipAdapter(encoder, NAMES)
    image, labels = pictures(encoder, shots=SHOTS)
    for use in (
        method.head,
        lambda: method.choose(image, labels),
        lambda: method.terms(Batch(image, labels)),
    ):
        with pytest.raises(ValueError, match="the cache is empty; call prepare"):
            use()
    with pytest.raises(ValueError, match="1 of 5 have none, first: hat"):
        method.set_cache(image[labels != 2], labels[labels != 2])
    with pytest.raises(ValueError, match=r"labels: expected values in 0..4"):
        method.set_cache(image, labels + 1)
    with pytest.raises(ValueError, match=r"expected \(K, 7\)"):
        method.set_cache(image[:, :7], labels)
    method.set_cache(image, labels)
    with pytest.raises(ValueError, match="at least one validation image"):
        method.choose(image[:0], labels[:0])
    with pytest.raises(ValueError, match=r"labels: expected values in 0..4"):
        method.choose(image, labels + 1)
    with pytest.raises(ValueError, match="max_alpha"):
        method.choose(image, labels, max_alpha=0.0)


@pytest.mark.parametrize("name", ["mcm", "msp", "energy", "delta_energy", "gl_mcm"])
def test_detectors_take_the_head(encoder, name):
    head = filled(encoder, alpha=2.0).head()
    image, _ = pictures(encoder, seed=1)
    local = image[:, None] * torch.tensor([1.0, -0.5])[:, None]
    patches = {"local": local} if name == "gl_mcm" else {}
    got = Detector(name, head=head).predict_features(image, **patches)
    found = head.similarities(image.double(), local.double())
    tau = 1.0 if name in ("mcm", "gl_mcm") else 1 / encoder.logit_scale
    p = (found.image / tau).softmax(dim=-1).amax(dim=-1)
    lse = (found.image / tau).logsumexp(dim=-1)
    top = found.image.topk(1).values[:, 0]
    rest = torch.logaddexp((lse.exp() - (top / tau).exp()).log(), torch.zeros(()).double())
    want = {
        "mcm": p,
        "msp": p,
        "energy": tau * lse,
        "delta_energy": lse - rest,
        "gl_mcm": p + found.local.softmax(dim=-1).amax(dim=(1, 2)),
    }[name]
    torch.testing.assert_close(-got.double(), want, rtol=SCORE_FROM_FEATURES_RTOL, atol=1e-4)


def features_of(encoder, n=60, name="training", **options) -> FeatureData:
    image, labels = pictures(encoder, n, **options)
    paths = tuple(f"{name}/{i}.png" for i in range(len(labels)))
    features = FeatureSet(name, paths, labels.numpy(), tuple(NAMES), (FeatureChunk(0, image),))
    return FeatureData(features)


def test_the_loop_builds_the_cache_trains_it_and_resumes(encoder, tmp_path):
    training, held = features_of(encoder), features_of(encoder, name="held", seed=8)
    recipe = replace(TipAdapterF.recipe, epochs=3, batch_size=16)
    free = TipAdapter(encoder, NAMES)
    train(free, training)
    assert len(free.keys) == 60
    done = []
    for stop in (None, 5):
        method = TipAdapterF(encoder, NAMES)

        def interrupt(at, stop=stop):
            if stop is not None and (at.epoch - 1) * at.steps + at.step == stop:
                raise KeyboardInterrupt

        options = {"recipe": recipe, "validation": held, "out": tmp_path / f"run {stop}"}
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                train(method, training, progress=interrupt, **options)
            method = TipAdapterF(encoder, NAMES)
        history = train(method, training, resume=stop is not None, **options)
        assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
        done.append(method)
    assert torch.equal(done[0].keys, done[1].keys)
    assert not torch.equal(done[0].keys.detach(), free.keys)
    image, labels = pictures(encoder, seed=8)
    right = done[0].head().similarities(image).image.argmax(dim=-1) == labels
    assert float(right.float().mean()) == pytest.approx(history.epochs[-1]["validation"])
