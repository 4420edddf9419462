"""Real CLIP ViT-B/32 features: every score against its float64 definition, and known figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fastood
from tests.scores import oracle
from tests.scores.test_row import ROW

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def clip(data_root):
    folder = data_root / "features" / "vitb32"

    def load(name, key="features"):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            return torch.from_numpy(file[key])

    return {
        "text": load("text", "imagenet1k_features"),
        "id": load("imagenet_1shot_2shot"),
        "labels": load("imagenet_1shot_2shot", "labels").long(),
        "dtd": load("dtd"),
        "cifar": load("cifar10_500"),
    }


@pytest.mark.parametrize("name", ROW)
@pytest.mark.parametrize("which", ["id", "dtd", "cifar"])
def test_every_global_score(clip, name, which):
    ours, slow = ROW[name]
    image = clip[which][:300]
    got = ours(image=image, text=clip["text"])
    want = slow(oracle.cosine(image, clip["text"]))
    # float32 cosines err by 1.2e-7 at most here; tau = .01 turns that into 1.2e-5 of a logit, and
    # where a score is a small difference (margin, variance at tau = 1) into more of its own size
    scale = want.abs().mean()
    allowed = 2e-4 * (want.abs() + 0.05 * scale)
    if name == "margin":  # of two nearly equal cosines nothing but their rounding is left
        allowed += 2 * 1.3e-7
    assert ((got.double() - want).abs() / allowed).max() < 1
    assert got.unique().numel() >= 0.99 * want.float().unique().numel()


def test_neg_label_and_fitted_scores(clip, data_root):
    with np.load(data_root / "features" / "vitb32" / "text.npz", allow_pickle=False) as file:
        negatives = torch.from_numpy(file["lvis_features"])
    image = clip["dtd"][:100]
    bank = fastood.ClassBank(clip["text"], negatives=negatives, groups=12)
    order = bank.permutation.tolist()
    groups = [order[i : i + 100] for i in range(0, 1200, 100)]
    want = oracle.neg_label(
        oracle.cosine(image, clip["text"]), oracle.cosine(image, negatives), 0.01, groups
    )
    torch.testing.assert_close(fastood.neg_label(image, bank).double(), want, rtol=1e-4, atol=1e-9)
    train, labels = clip["id"][:400], clip["labels"][:400] % 20
    fit = fastood.fit_mahalanobis(train, labels, eps=1e-3)
    torch.testing.assert_close(
        fastood.mahalanobis(image, fit).double(),
        oracle.mahalanobis(image, train, labels, 1e-3),
        rtol=1e-6,
        atol=0,
    )
    torch.testing.assert_close(
        fastood.knn(image, fastood.fit_knn(train)).double(),
        oracle.knn(image, train, 50),
        rtol=1e-5,
        atol=0,
    )


def test_identical_classes_tie_and_the_lower_index_wins(clip):
    """Rows 134/517, 264/474 and 638/639 of the ImageNet text features are bit-identical."""
    s = fastood.ClassBank(clip["text"]).similarities(clip["id"]).image
    from fastood.reference import top

    values, index = top(s, 2)
    tied = values[:, 0] == values[:, 1]
    pairs = {tuple(p) for p in index[tied].tolist()}
    assert pairs and pairs <= {(134, 517), (264, 474), (638, 639)}


def test_zero_shot_accuracy_is_the_known_one(clip, data_root):
    known = json.loads((data_root / "reference.json").read_text())["zero_shot_top1"]
    s = fastood.ClassBank(clip["text"].double()).similarities(clip["id"].double()).image
    accuracy = (s.argmax(1) == clip["labels"]).double().mean().item()
    assert accuracy == pytest.approx(known["imagenet_1shot_2shot"], abs=5e-6)
