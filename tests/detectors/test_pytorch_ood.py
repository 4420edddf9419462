"""The installed pytorch-ood takes our detectors for its own, and agrees with them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastood import detectors
from fastood.detectors import LogitsHead
from fastood.metrics import evaluate
from tests.conftest import clip_like
from tests.detectors.toys import D, K, Tower, encoder, images, loader, text

pytest.importorskip("pytorch_ood")

from pytorch_ood import detector as theirs  # after the check that it is installed
from pytorch_ood.api import Detector as TheirDetector
from pytorch_ood.api import FeaturesDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_mcm_is_theirs(temperature):
    tower, (x, _) = Tower(), images(13)
    ours = detectors.MCM(encoder=tower, text_embeddings=text(), temperature=temperature)
    oracle = theirs.MCM(encoder=tower, text_embeddings=text(), temperature=temperature)
    torch.testing.assert_close(ours.predict(x), oracle.predict(x), rtol=2e-5, atol=1e-6)
    z = clip_like(40, K, D)[0]
    torch.testing.assert_close(
        ours.predict_features(z), oracle.predict_features(z), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_scores_of_logits_are_theirs(t):
    logits = 4 * torch.randn(30, K, generator=torch.Generator().manual_seed(2))
    for ours, oracle in (
        (detectors.EnergyBased, theirs.EnergyBased),
        (detectors.MSP, theirs.MaxSoftmax),
    ):
        got = ours(None, LogitsHead(), t).predict_features(logits)
        torch.testing.assert_close(got, oracle(None, t=t).predict_logits(logits))


def test_knn_is_theirs():
    pytest.importorskip("sklearn")
    z, _, y = clip_like(90, K, D)
    y[::7] = -1
    ours = detectors.KNN(None, k=5).fit_features(z, y)
    oracle = theirs.KNN(None, k=5).fit_features(z, y)
    probe = clip_like(25, K, D, seed=4)[0]
    want = oracle.predict_features(probe).float()
    torch.testing.assert_close(ours.predict_features(probe), want, rtol=1e-5, atol=1e-6)


def test_mahalanobis_ranks_as_theirs():
    z, _, y = clip_like(200, K, D)
    ours = detectors.Mahalanobis(None).fit_features(z, y)
    oracle = theirs.Mahalanobis(None).fit_features(z, y)
    probe = clip_like(60, K, D, seed=4)[0]
    got, want = ours.predict_features(probe), oracle.predict_features(probe)
    assert torch.equal(got.argsort(), want.argsort())
    # theirs sums outer products where the paper, and we, take their mean
    torch.testing.assert_close(got, want * len(z), rtol=1e-3, atol=1e-3)


def test_metrics_loop():
    detector, metrics = detectors.MCM(Tower(), text()), OODMetrics()
    scores, labels = [], []
    for x, y in loader():
        metrics.update(detector(x), y)
        scores.append(detector.confidence(x))
        labels.append(y)
    found = metrics.compute()
    score, label = torch.cat(scores), torch.cat(labels)
    inside, outside = score[label >= 0], score[label < 0]
    wins = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    assert found["AUROC"] == pytest.approx(wins.mean().item(), abs=1e-6)


class Tiny(Benchmark):
    """Two OOD sets against one ID set, as pytorch-ood's own benchmarks are built."""

    ood_names = ("near", "far")

    def train_set(self):
        return TensorDataset(*images(40, seed=8))

    def test_sets(self, known=True, unknown=True):
        del known, unknown
        return [TensorDataset(*images(24, seed=s)) for s in (1, 2)]


@pytest.mark.parametrize("wrap", [lambda t: t, encoder])
def test_benchmark_encodes_once_for_all_detectors(wrap):
    tower = Tower()
    shared = wrap(tower)
    every = [
        detectors.MCM(shared, text()),
        detectors.Energy(shared, text()),
        detectors.KNN(shared, k=3).fit(loader(40, seed=8)),
    ]
    tower.images = 0
    results = Tiny().evaluate(every, loader_kwargs={"batch_size": 8})
    assert tower.images == 48
    assert [r["Detector"] for r in results] == ["MCM", "Energy", "KNN"] * 2
    assert [r["Dataset"] for r in results] == ["near"] * 3 + ["far"] * 3
    oracle = Tiny().evaluate(theirs.MCM(tower, text()), loader_kwargs={"batch_size": 8})
    for got, want in zip(results[::3], oracle, strict=True):
        for name in ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95TPR"):
            assert got[name] == pytest.approx(want[name], abs=1e-6)


def test_benchmark_with_patches_and_with_the_general_class():
    tower = Tower(patches=True)
    for detector in (
        detectors.GLMCM(tower, text()),
        detectors.Detector("mcm", Tower(), text()),
    ):
        assert isinstance(detector, TheirDetector)
        assert not isinstance(detector, FeaturesDetector)  # features alone would not do, or may not
        results = Tiny().evaluate(detector, loader_kwargs={"batch_size": 8})
        assert [r["Dataset"] for r in results] == ["near", "far"]
        assert all(0 <= r["AUROC"] <= 1 for r in results)


def test_grid_search_picks_and_refits():
    search = GridSearch(
        detectors.KNN(Tower(), k=2),
        fit_loader=loader(40, seed=8),
        val_loader=loader(40, seed=9),
        hyperparameter_space={"k": [1, 4, 9]},
    )
    best = search.run()
    scores = {r["params"]["k"]: r["score"] for r in search.results_}
    assert set(scores) == {1, 4, 9}
    assert scores[best["k"]] == max(scores.values())
    assert search.detector.options["k"] == best["k"]
    assert search.detector.fitted


def test_imports_nothing_and_is_recognised_by_a_later_import():
    code = """
import sys, torch
from fastood.detectors import MCM, GLMCM
mcm, local = MCM(None, torch.eye(2)), GLMCM(None, torch.eye(2))
isinstance(mcm, MCM)
assert not {"pytorch_ood", "openood", "open_clip", "transformers", "timm"} & set(sys.modules)
from pytorch_ood.api import Detector, FeaturesDetector
assert isinstance(mcm, Detector) and isinstance(mcm, FeaturesDetector)
assert isinstance(local, Detector) and not isinstance(local, FeaturesDetector)
assert not isinstance(torch.nn.Identity(), Detector)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.data
def test_real_clip_features_in_their_metrics(data_root):
    folder = data_root / "features" / "vitb32"

    def load(name, key="features"):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            return torch.from_numpy(file[key])

    classes = load("text", "imagenet1k_features")
    inside, outside = load("imagenet_1shot_2shot"), load("dtd")
    z = torch.cat([inside, outside])
    label = torch.cat([torch.zeros(len(inside)), -torch.ones(len(outside))]).long()
    ours, oracle = detectors.MCM(None, classes), theirs.MCM(None, classes)
    torch.testing.assert_close(
        ours.predict_features(z), oracle.predict_features(z), rtol=2e-6, atol=0
    )
    found = OODMetrics().update(ours.predict_features(z), label).compute()
    want = evaluate(ours.scores(inside), ours.scores(outside), aupr="trapezoid")
    assert found["AUROC"] == pytest.approx(want["AUROC"], abs=1e-6)
    assert found["FPR95TPR"] == pytest.approx(want["FPR95TPR"], abs=1e-6)
    assert found["AUPR-IN"] == pytest.approx(want["AUPR-IN"], abs=1e-6)
    assert found["AUROC"] > 0.6  # a swapped sign would fall below one half
