"""Patches, negative labels, and fitted scores against float64 definitions."""

from __future__ import annotations

import pytest
import torch

import fastood
from fastood.scores import ClassBank
from tests.conftest import clip_like
from tests.scores import oracle
from tests.tolerances import SCORE_FROM_FEATURES_RTOL


def patches(b=6, p=9, k=11, d=32):
    image, text, _ = clip_like(b * p, k, d)
    return image.view(b, p, d), text


def test_l_mcm_and_gl_mcm():
    local, text = patches()
    image = local.mean(1)
    sl = oracle.cosine(local.flatten(0, 1), text).view(6, 9, 11)
    want = oracle.l_mcm(sl, 1.0)
    got = fastood.l_mcm(local, text)
    torch.testing.assert_close(got.double(), want, rtol=SCORE_FROM_FEATURES_RTOL, atol=0)
    glob = oracle.max_softmax(oracle.cosine(image, text), 1.0)
    for weight in (1.0, 0.5):
        both = fastood.gl_mcm(image, local, text, weight=weight)
        torch.testing.assert_close(
            both.double(), glob + weight * want, rtol=SCORE_FROM_FEATURES_RTOL, atol=0
        )
    from_s = fastood.gl_mcm(
        similarity=fastood.ClassBank(text).similarities(image).image, local_similarity=sl.float()
    )
    torch.testing.assert_close(from_s, fastood.gl_mcm(image, local, text), rtol=1e-5, atol=0)


def test_one_patch_equal_to_the_image_gives_twice_mcm():
    image, text, _ = clip_like(5, 7)
    torch.testing.assert_close(
        fastood.gl_mcm(image, image[:, None], text), 2 * fastood.mcm(image, text)
    )


def test_patch_order_does_not_matter_and_blocks_agree(monkeypatch):
    local, text = patches(b=7)
    whole = fastood.l_mcm(local, text)
    torch.testing.assert_close(fastood.l_mcm(local.flip(1), text), whole)
    monkeypatch.setattr("fastood.scores.inputs.BLOCK", 9 * 11 * 2)
    torch.testing.assert_close(fastood.l_mcm(local, text), whole)
    each = text.expand(7, -1, -1)
    torch.testing.assert_close(fastood.l_mcm(local, each), whole, rtol=1e-5, atol=0)
    assert fastood.l_mcm(local[:0], text).shape == (0,)


def test_local_gradients():
    image, text, _ = clip_like(6, 4, 5, dtype=torch.float64)
    local = image.view(2, 3, 5).requires_grad_()
    text.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: fastood.l_mcm(z, t), (local, text))


@pytest.mark.parametrize("remainder", ["drop", "spread"])
@pytest.mark.parametrize("groups", [1, 4, 10])
def test_neg_label_closed_form_equals_the_published_grouping(groups, remainder):
    image, text, _ = clip_like(50, 12, seed=1)
    _, negatives, _ = clip_like(1, 43, seed=2)
    bank = ClassBank(text, negatives=negatives, groups=groups, remainder=remainder)
    order = bank.permutation.tolist()
    assert sorted(order) == list(range(43 - 43 % groups if remainder == "drop" else 43))
    sizes = [len(order) // groups + (g < len(order) % groups) for g in range(groups)]
    parts, start = [], 0
    for size in sizes:
        parts.append(order[start : start + size])
        start += size
    s, sn = oracle.cosine(image, text), oracle.cosine(image, negatives)
    want = oracle.neg_label(s, sn, 0.01, parts)
    got = fastood.neg_label(image, text, negatives, groups=groups, remainder=remainder)
    torch.testing.assert_close(got.double(), want, rtol=SCORE_FROM_FEATURES_RTOL, atol=1e-12)
    assert torch.equal(fastood.neg_label(image, bank), got)
    assert ((got >= 0) & (got <= 1)).all()


def test_neg_label_permutation_is_private_and_repeatable():
    _, text, _ = clip_like(1, 5)
    _, negatives, _ = clip_like(1, 40, seed=3)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = ClassBank(text, negatives=negatives, groups=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(
        first.permutation, ClassBank(text, negatives=negatives, groups=4).permutation
    )
    other = ClassBank(text, negatives=negatives, groups=4, seed=1)
    assert not torch.equal(first.permutation, other.permutation)
    kept = ClassBank(text, negatives=negatives, groups=4, seed=None)
    assert kept.permutation.tolist() == list(range(40))


def test_one_more_negative_lowers_the_score_of_a_single_group():
    image, text, _ = clip_like(20, 5, seed=1)
    _, negatives, _ = clip_like(1, 9, seed=2)
    few = fastood.neg_label(image, text, negatives[:8], groups=1, tau=0.1)
    more = fastood.neg_label(image, text, negatives, groups=1, tau=0.1)
    assert (more < few).all()


def test_mahalanobis_pools_within_classes():
    g = torch.Generator().manual_seed(0)
    train = torch.randn(60, 6, generator=g) @ torch.randn(6, 6, generator=g)
    labels = torch.arange(60) % 4 * 3 + 1  # labels need not be 0..C-1
    train = train + labels[:, None] * 2.0
    x = torch.randn(9, 6, generator=g) * 3
    bank = fastood.fit_mahalanobis(train, labels, eps=1e-3)
    want = oracle.mahalanobis(x, train, labels, 1e-3)
    torch.testing.assert_close(fastood.mahalanobis(x, bank).double(), want, rtol=1e-6, atol=1e-9)
    assert bank.classes.tolist() == [1, 4, 7, 10]
    one_by_one = torch.cat([fastood.mahalanobis(row[None], bank) for row in x])
    torch.testing.assert_close(one_by_one, fastood.mahalanobis(x, bank))


def test_knn_distance_keeps_the_digits_of_near_neighbours():
    g = torch.Generator().manual_seed(0)
    train = torch.randn(200, 16, generator=g)
    near = train[:40] + 1e-4 * torch.randn(40, 16, generator=g)
    bank = fastood.fit_knn(train)
    for k in (1, 5, 200):
        got = fastood.knn(near, bank, k=k)
        torch.testing.assert_close(got.double(), oracle.knn(near, train, k), rtol=5e-3, atol=1e-7)
    assert fastood.knn(near, bank, k=1).unique().numel() == 40
    assert fastood.knn(near[:0], bank).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fastood.fit_knn(x[:0]), "at least one sample"),
        (lambda x: fastood.knn(x, fastood.fit_knn(x), k=6), "k: expected 1 <= k <= N = 5, got 6"),
        (lambda x: fastood.fit_mahalanobis(x[:1], torch.zeros(1).long()), "at least two samples"),
        (lambda x: fastood.fit_mahalanobis(x, torch.zeros(5)), r"labels: expected \(5,\) integers"),
        (
            lambda x: fastood.fit_mahalanobis(x, torch.arange(5), eps=0.0),
            "not positive definite; give more samples, eps > 0 or shrinkage > 0",
        ),
        (lambda x: fastood.l_mcm(x, x), r"local: expected shape \(B, P, D\)"),
        (lambda x: fastood.l_mcm(x[:, None][:, :0], x), "at least one patch, got P = 0"),
        (lambda x: fastood.gl_mcm(x, x[:3, None], x), "same 5 images, got 3"),
        (lambda x: fastood.gl_mcm(x, x[:, None], x, weight=float("nan")), "weight: expected a"),
        (lambda x: fastood.neg_label(x, x), "negatives: expected"),
        (lambda x: fastood.neg_label(x, ClassBank(x)), "holds none"),
        (lambda x: fastood.neg_label(x, x, x, groups=6), "groups: expected 1 <= groups <= M = 5"),
        (lambda x: ClassBank(x, negatives=x[:, :3], groups=1), r"negatives: expected \(K, 7\)"),
        (lambda x: ClassBank(x, negatives=x, groups=1, remainder="x"), "remainder: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
