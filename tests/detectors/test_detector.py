"""Detectors give minus the functional score, whatever they were made of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastood
from fastood import detectors
from fastood.detectors import Detector, LogitsHead, NotFittedError
from fastood.errors import FastoodError
from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.scores import SCORES, ClassBank, Similarities
from tests.conftest import clip_like
from tests.detectors.toys import D, K, Tower, encoder, images, loader, text

PLAIN = [name for name, spec in SCORES.items() if spec.needs is None]


def features(n: int = 20, seed: int = 3):
    return clip_like(n, K, D, seed=seed)[0]


@pytest.mark.parametrize("score", PLAIN)
def test_predict_is_minus_the_function(score):
    x, t = features(), text()
    detector = Detector(score, head=t)
    want = getattr(fastood, score)(x, t)
    torch.testing.assert_close(detector.predict_features(x), -want, rtol=0, atol=0)
    torch.testing.assert_close(detector.confidence_features(x), want, rtol=0, atol=0)
    assert not detector.requires_fit


@pytest.mark.parametrize(
    ("named", "want"),
    [
        (lambda t: detectors.MaxSimilarity(None, t), lambda x, t: fastood.max_similarity(x, t)),
        (lambda t: detectors.MCM(None, t, 0.5), lambda x, t: fastood.mcm(x, t, tau=0.5)),
        (lambda t: detectors.MSP(None, t), lambda x, t: fastood.msp(x, t, tau=0.01)),
        (lambda t: detectors.MaxLogit(None, t, 0.1), lambda x, t: fastood.max_logit(x, t, tau=0.1)),
        (
            lambda t: detectors.Energy(None, t, 0.1, scale="unit"),
            lambda x, t: fastood.energy(x, t, tau=0.1, scale="unit"),
        ),
        (
            lambda t: detectors.DeltaEnergy(None, t, c=2, reset=0.1, joint=True),
            lambda x, t: fastood.delta_energy(x, t, c=2, reset=0.1, joint=True),
        ),
        (lambda t: detectors.NegEntropy(None, t), lambda x, t: fastood.neg_entropy(x, t)),
        (
            lambda t: detectors.NegLabel(None, t, text(9).repeat(3, 1) + 1, groups=4, seed=2),
            lambda x, t: fastood.neg_label(x, t, text(9).repeat(3, 1) + 1, groups=4, seed=2),
        ),
    ],
)
def test_named_constructors(named, want):
    x, t = features(), text()
    assert torch.equal(named(t).predict_features(x), -want(x, t))


def test_local_scores_take_patches_from_features_or_encoder():
    tower, (x, _) = Tower(patches=True), images(6)
    with torch.no_grad():
        z, local = tower(x)
    want = fastood.gl_mcm(z, local, text(), weight=0.5)
    for source in (tower, encoder(tower)):
        detector = detectors.GLMCM(source, text(), weight=0.5)
        assert torch.equal(detector.predict(x), -want)
    assert torch.equal(detector.predict_features(z, local), -want)
    got = detectors.LMCM(None, text()).confidence_features(z, local)
    assert torch.equal(got, fastood.l_mcm(local, text()))
    with pytest.raises(ValueError, match="patch features"):
        detector.predict_features(z)
    with pytest.raises(ValueError, match="patch features"):
        detectors.GLMCM(Tower(), text()).predict(x)


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: t.forward, encoder, lambda t: lambda x: t(x)]
)
def test_any_encoder(wrap):
    tower, (x, _) = Tower(), images(7)
    with torch.no_grad():
        want = fastood.mcm(tower(x), text())
    detector = detectors.MCM(wrap(tower), text())
    assert torch.equal(detector(x), -want)
    assert torch.equal(detector.predict(x), -want)
    assert torch.equal(detector.confidence(x), want)
    assert not detector(x).requires_grad
    assert not detector.encode(x).image.requires_grad  # no graph is kept while scoring


def test_pooled_maps_are_flattened():
    def pooled(x):
        return x.mean(dim=(2, 3), keepdim=True)

    x, _ = images(4)
    want = fastood.mcm(x.mean(dim=(2, 3)), torch.eye(3))
    assert torch.equal(detectors.MCM(pooled, torch.eye(3)).confidence(x), want)


def test_temperature_follows_the_model():
    model = encoder(Tower(), logit_scale=50.0)
    assert detectors.MSP(model, text()).options["tau"] == pytest.approx(0.02)
    assert detectors.MCM(model, text()).options["tau"] == 1.0
    assert detectors.MSP(model, text(), logit_scale=torch.tensor(25.0)).options["tau"] == 0.04
    assert detectors.MSP(model, text(), 0.5).options["tau"] == 0.5
    assert detectors.Energy(None, text()).options["tau"] == 0.01
    # the logarithm of γ, which CLIP modules hold under the same name, must not be taken for γ
    clip = Tower()
    clip.logit_scale = nn.Parameter(torch.tensor(4.6))
    assert detectors.MSP(clip, text()).options["tau"] == 0.01


def test_any_head():
    class Adapter:
        def similarities(self, features, local=None):
            return Similarities(features[:, :3].tanh())

    x = features()
    want = fastood.energy(similarity=x[:, :3].tanh())
    assert torch.equal(Detector("energy", head=Adapter()).confidence_features(x), want)
    bank = ClassBank(text())
    assert torch.equal(Detector("mcm", head=bank).confidence_features(x), fastood.mcm(x, text()))


def test_encoded_classes_bring_their_digest():
    classes = SimpleNamespace(features=text(), digest="abc")
    detector = detectors.MCM(None, classes)
    assert detector.key.prompts == "abc"
    assert torch.equal(detector.confidence_features(features()), fastood.mcm(features(), text()))


def test_similarities_and_logits():
    logits = 5 * torch.randn(9, K, generator=torch.Generator().manual_seed(0))
    want = -logits.softmax(-1).amax(-1)
    torch.testing.assert_close(Detector("msp", logit_scale=1.0).predict_similarities(logits), want)
    torch.testing.assert_close(detectors.MSP(lambda x: x, LogitsHead()).predict(logits), want)
    with pytest.raises(ValueError, match="features"):
        detectors.KNN().predict_similarities(logits)
    with pytest.raises(ValueError, match="patch"):
        detectors.GLMCM().predict_similarities(logits)


# -- fitted scores ---------------------------------------------------------------------------------


def test_knn_ignores_ood_samples_in_fit():
    tower, (x, y) = Tower(), images(48)
    with torch.no_grad():
        z = tower(x)
    bank = fastood.fit_knn(z[y >= 0])
    tower.images = 0
    detector = detectors.KNN(tower, k=3).fit(loader(48))
    assert tower.images == int((y >= 0).sum())  # OOD samples are not even encoded
    want = -fastood.knn(z, bank, k=3)
    torch.testing.assert_close(detector.predict(x), want, rtol=1e-5, atol=1e-6)
    from_features = detectors.KNN(k=3).fit_features(z, y.numpy())
    assert torch.equal(from_features.predict_features(z), want)
    unlabelled = detectors.KNN(k=3).fit_features(z[y >= 0])
    assert torch.equal(unlabelled.predict_features(z), want)


def nearest_mean(z, y, *, eps):
    """Class of the nearest mean, with an explicit inverse of the pooled covariance."""
    means = torch.stack([z[y == k].mean(0) for k in range(K)])
    centred = (z - means[y])[y >= 0]
    inverse = torch.linalg.inv(centred.T @ centred / len(centred) + eps * torch.eye(D).double())
    gap = z[:, None] - means
    return torch.einsum("bkd,de,bke->bk", gap, inverse, gap).argmin(-1)


def test_mahalanobis_fit_and_classes():
    tower, (x, y) = Tower(), images(80)
    with torch.no_grad():
        z = tower(x)
    known = y >= 0
    bank = fastood.fit_mahalanobis(z[known], y[known], eps=0.5)
    detector = detectors.Mahalanobis(tower, eps=0.5).fit(loader(80))
    torch.testing.assert_close(
        detector.confidence(x), fastood.mahalanobis(z, bank), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(detector.classify(z), nearest_mean(z.double(), y, eps=0.5))
    unit = detectors.Mahalanobis(eps=0.01, normalize=True).fit_features(z, y)
    scaled = torch.nn.functional.normalize(z.double())
    assert torch.equal(unit.classify(z), nearest_mean(scaled, y, eps=0.01))
    assert torch.equal(unit.classify(100 * z), unit.classify(z))
    with pytest.raises(ValueError, match="labels"):
        detectors.Mahalanobis().fit_features(z)


@pytest.mark.parametrize("make", [detectors.KNN, detectors.Mahalanobis])
def test_fitted_scores_say_so_before_fit(make):
    detector = make(Tower())
    assert detector.requires_fit
    assert not detector.fitted
    for call in (
        lambda: detector.predict(images(2)[0]),
        lambda: detector.predict_features(features()),
        lambda: detector.scores(features()),
    ):
        with pytest.raises(NotFittedError, match=r"fit\(data_loader\)") as caught:
            call()
        assert isinstance(caught.value, FastoodError)


def test_bad_fits():
    x = features(6)
    with pytest.raises(ValueError, match="N = 6"):
        detectors.KNN(k=7).fit_features(x)
    with pytest.raises(ValueError, match="in-distribution"):
        detectors.KNN(k=1).fit_features(x, torch.full((6,), -1))
    with pytest.raises(ValueError, match="labels"):
        detectors.KNN(k=1).fit_features(x, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="row 2"):
        detectors.KNN(k=1).fit_features(x.index_fill(0, torch.tensor([2]), float("nan")))
    with pytest.raises(ValueError, match="in-distribution"):
        detectors.KNN(Tower()).fit([(images(2)[0], torch.tensor([-1, -2]))])


def test_fit_is_nothing_without_need():
    detector = detectors.MCM(None, text())
    assert detector.fit(None) is detector
    assert detector.fit_features(None) is detector


def test_moves_report_where_it_is():
    detector = detectors.KNN(k=1).fit_features(features()).to("cpu")
    assert detector.device == torch.device("cpu")
    assert detectors.MCM(None, text()).to(torch.device("cpu")).head.device.type == "cpu"
    assert Detector("msp").device is None


# -- options, keys, scores -------------------------------------------------------------------------


def test_hyperparameters_can_be_searched():
    detector = detectors.DeltaEnergy(None, text()[:3])
    assert detector.hyperparameter_space["c"] == [1, 2]  # 5 > K = 3
    detector.set_hyperparameters(c=2, tau=0.1)
    assert detector.get_hyperparameters() == {"tau": 0.1, "c": 2}
    x = features()
    want = fastood.delta_energy(x, text()[:3], tau=0.1, c=2)
    assert torch.equal(detector.confidence_features(x), want)
    with pytest.raises(ValueError, match="c <= K = 3"):
        detector.set_hyperparameters(c=4)
    with pytest.raises(ValueError, match="unknown option 'depth'"):
        detector.set_hyperparameters(depth=1)
    assert detector.options["c"] == 2  # a refused value leaves everything as it was
    assert detector.set_hyperparameters(tau=0.2).options["c"] == 2
    for score in SCORES:
        if score != "neg_label":
            detector = Detector(score)
            for name, values in detector.hyperparameter_space.items():
                for value in values:
                    detector.set_hyperparameters(**{name: value})
                    assert detector.get_hyperparameters()[name] == value
    changed = detectors.Mahalanobis().fit_features(features(60), torch.arange(60) % K)
    assert changed.fitted
    assert not changed.set_hyperparameters(shrinkage=0.2).fitted


def test_key_tells_method_model_prompts_and_fit():
    model = encoder(Tower())
    key = detectors.MSP(model, text(), prompts="p").key
    assert (key.score, key.model, key.prompts) == ("msp", model.fingerprint, "p")
    assert key.options == {"tau": 0.02}
    one = detectors.KNN(k=2).fit_features(features(seed=1))
    assert one.key == detectors.KNN(k=2).fit_features(features(seed=1)).key
    assert one.key != detectors.KNN(k=2).fit_features(features(seed=2)).key


def test_scores_of_anything():
    model = encoder(Tower())
    x, _ = images(11)
    detector = detectors.MCM(model, text())
    want = detector.confidence(x).numpy()
    z = model(x)
    batches = [x[:4], (x[4:8], None), {"data": x[8:], "label": torch.zeros(3)}]
    chunks = (FeatureChunk(0, z[:6]), FeatureChunk(6, z[6:]))
    stored = FeatureSet(
        "set",
        tuple("abcdefghijk"),
        None,
        None,
        chunks,
        provenance={"fingerprint": model.fingerprint},
    )
    for source in (x, z, batches, stored):
        found = detector.scores(source, name="" if source is stored else "set")
        np.testing.assert_allclose(found.values, want, rtol=1e-6)
        assert (found.higher, found.key, found.name) == ("id", detector.key, "set")
    assert len(detector.scores(z[:0])) == 0
    assert detector.scores(z).name == ""
    assert detectors.MCM(None, text()).scores(stored).key.model == model.fingerprint
    other = FeatureSet("o", ("a",), None, None, chunks[:1], provenance={"fingerprint": "else"})
    with pytest.raises(ValueError, match="own model"):
        detector.scores(other)
    with pytest.raises(TypeError, match="loader"):
        detector.scores("images")


def test_threshold_decides():
    detector = detectors.MCM(encoder(Tower()), text(), prompts="p")
    x, _ = images(60)
    threshold = fastood.calibrate(detector.scores(x), tpr=0.9)
    rejected = detector.is_ood(x, threshold)
    np.testing.assert_array_equal(rejected, detector.scores(x).values < threshold.threshold)
    assert 0 < rejected.sum() <= 6
    with pytest.raises(ValueError, match="tau"):
        detectors.MCM(detector.encoder, text(), 0.5, prompts="p").is_ood(x, threshold)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("make", [lambda: detectors.MCM(None, text()), lambda: detectors.KNN(k=1)])
def test_unusable_features_raise_where_functions_do_not_check(make, bad, monkeypatch):
    # on a GPU the functional scores look at nothing; a detector has to
    detector = make().fit_features(features())
    monkeypatch.setattr("fastood.scores.inputs.must_check", lambda x: False)
    x = features()
    x[[4, 7]] = bad
    with pytest.raises(ValueError, match="2 rows, first 4, 7"):
        detector.predict_features(x)
    local = torch.ones(20, 3, D)
    local[5, 1] = bad
    with pytest.raises(ValueError, match=r"local: .* row 5"):
        detectors.GLMCM(None, text()).predict_features(features(), local)


def test_unusable_similarities_raise(monkeypatch):
    monkeypatch.setattr("fastood.scores.inputs.must_check", lambda x: False)
    s = torch.zeros(3, K)
    s[1, 2] = float("nan")
    with pytest.raises(ValueError, match="row 1"):
        Detector("mcm").predict_similarities(s)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    detector = detectors.MCM(Tower(), text()).to("cuda")
    x, _ = images(5)
    got = detector.predict(x)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), detectors.MCM(Tower(), text()).predict(x))
    with pytest.raises(ValueError, match="row 0"):
        detector.predict(x.index_fill(0, torch.tensor([0]), float("nan")))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Detector("mcmm"), "did you mean 'mcm'"),
        (lambda: Detector("mcm", c=2), "unknown option 'c'"),
        (lambda: detectors.MCM(None, text(), 0.0), "tau"),
        (lambda: detectors.MSP(None, text(), logit_scale=-1.0), "logit_scale"),
        (lambda: detectors.DeltaEnergy(None, text(), c=K + 1), "c <= K"),
        (lambda: detectors.NegLabel(None, text()), "negative"),
        (lambda: detectors.NegLabel(None, ClassBank(text()), text()), "ClassBank"),
        (lambda: detectors.KNN(k=0), "1 <= k"),
        (lambda: detectors.MCM(None, text()).predict(images(2)[0]), "encoder"),
        (lambda: detectors.MCM(Tower()).predict(images(2)[0]), "class side"),
        (lambda: detectors.MCM(None, text()).predict_features(torch.ones(2, 3)), "same model"),
        (lambda: detectors.MCM(None, text()).predict_features(torch.ones(2, D).long()), "floating"),
        (lambda: detectors.MCM(None, text()).predict_features(torch.ones(D)), r"\(B, D\)"),
        (lambda: detectors.MCM(lambda x: x, text()).scores([{"x": 1}]), "data"),
    ],
)
def test_wrong_values(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: detectors.MCM(text(), text()), "encoder"),  # arguments swapped
        (lambda: detectors.MCM(None, ["cat"]), "head"),
        (lambda: detectors.MCM(lambda x: "no", text()).predict(images(2)[0]), "tensor"),
        (lambda: detectors.MCM(None, text()).predict_features([1.0]), "Tensor"),
    ],
)
def test_wrong_types(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_training_mode_warns():
    with pytest.warns(UserWarning, match="training mode"):
        detectors.MCM(Tower().train(), text()).predict(images(2)[0])


def test_empty_batch():
    assert detectors.MCM(None, text()).predict_features(torch.zeros(0, D)).shape == (0,)
    fitted = detectors.KNN(k=1).fit_features(features())
    assert fitted.predict_features(torch.zeros(0, D)).shape == (0,)
