"""Training losses against slow float64 versions, their gradients, and the derived statements."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastood
from tests.conftest import clip_like
from tests.scores import oracle

OPTIONS = list(
    itertools.product(
        ("sign", "topp"), ("top1", "label"), ("top1", "all"), ("edited", "original"), (False, True)
    )
)


@pytest.mark.parametrize(("mask", "mask_by", "edit", "ce_on", "renorm"), OPTIONS)
def test_ebm_loss_for_every_option(mask, mask_by, edit, ce_on, renorm):
    image, text, labels = clip_like(12, 7, 20, dtype=torch.float64)
    options = {
        "tau": 0.05, "weight": 0.3, "mask": mask, "keep": 0.3, "mask_by": mask_by,
        "edit": edit, "ce_on": ce_on, "renorm": renorm,
    }  # fmt: skip
    text.requires_grad_()
    got = fastood.ebm_loss(image, text, labels, **options)
    want = oracle.ebm_loss(image, text, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (mine,) = torch.autograd.grad(got, text)
    (theirs,) = torch.autograd.grad(want, text)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_ebm_gradient_equals_the_closed_form_for_unit_rows():
    image, text, labels = clip_like(6, 5, 8, dtype=torch.float64)
    z = torch.nn.functional.normalize(image, dim=-1)
    t = torch.nn.functional.normalize(text, dim=-1).requires_grad_()
    tau, b = 0.1, 6
    ce_free = fastood.ebm_loss(z, t, labels, tau=tau, weight=1.0, normalize=False)
    no_term = fastood.ebm_loss(z, t, labels, tau=tau, weight=0.0, normalize=False)
    (grad,) = torch.autograd.grad(ce_free - no_term, t)
    s = z @ t.detach().T
    y1 = s.argmax(-1)
    zm = z * (z * t.detach()[y1] > 0)
    edited = s.clone()
    edited[torch.arange(b), y1] = (zm * t.detach()[y1]).sum(-1)
    q, p = (edited / tau).softmax(-1), (s / tau).softmax(-1)
    want = torch.zeros_like(t)
    for i in range(b):
        for k in range(5):
            own = zm[i] if k == y1[i] else z[i]
            want[k] += (q[i, k] * own - p[i, k] * z[i]) / (b * tau)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)


def test_ebm_gradcheck():
    image, text, labels = clip_like(4, 3, 5, dtype=torch.float64)
    image.requires_grad_()
    text.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, t: fastood.ebm_loss(z, t, labels, tau=0.2), (image, text)
    )


def test_the_bound_of_the_sign_mask_and_of_kept_shares():
    """Derived: E2 - E0 <= ΔE_1 iff st >= reset, always so for the sign mask at reset 0."""
    image, text, labels = clip_like(200, 20, 32, dtype=torch.float64)
    s = oracle.cosine(image, text)
    delta = fastood.delta_energy(similarity=s, tau=0.05)
    for keep in (None, 0.1, 0.5, 0.9):
        mask = {"mask": "sign"} if keep is None else {"mask": "topp", "keep": keep}
        for i in range(0, 200, 20):
            rows = slice(i, i + 1)
            gap = fastood.ebm_loss(
                image[rows], text, labels[rows], tau=0.05, weight=1.0, ce_on="original", **mask
            ) - torch.nn.functional.cross_entropy(s[rows] / 0.05, labels[rows])
            e2_minus_e0 = -gap
            if keep is None:
                assert e2_minus_e0 <= 1e-12
            if keep is None or s[rows].max() >= 0:
                assert e2_minus_e0 <= delta[rows] + 1e-12


def test_float32_losses_follow_float64():
    image, text, labels = clip_like(64, 300, 64)
    for loss in (
        lambda z, t: fastood.ebm_loss(z, t, labels),
        lambda z, t: fastood.locoop_loss(z, z[:, None], t, labels, top_k=50),
    ):
        torch.testing.assert_close(
            loss(image, text).double(), loss(image.double(), text.double()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_locoop_loss(top_k):
    image, text, labels = clip_like(5, 7, 16, dtype=torch.float64)
    local = clip_like(20, 7, 16, seed=4, dtype=torch.float64)[0].view(5, 4, 16).clone()
    text.requires_grad_()
    options = {"tau": 0.05, "weight": 0.4, "top_k": top_k}
    got = fastood.locoop_loss(image, local, text, labels, **options)
    want = oracle.locoop_loss(image, local, text, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (mine,) = torch.autograd.grad(got, text)
    (theirs,) = torch.autograd.grad(want, text)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_locoop_without_ood_patches_is_cross_entropy():
    _, text, _ = clip_like(1, 6, 16)
    labels = torch.arange(6)
    loss = fastood.locoop_loss(text, text[:, None], text, labels, top_k=5)
    s = fastood.ClassBank(text).similarities(text).image
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(s / 0.01, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "hard"}, "mask: expected one of 'sign', 'topp', got 'hard'"),
        ({"keep": 0.0}, "keep: expected 0 < keep <= 1"),
        ({"edit": "top2"}, "edit: expected"),
        ({"ce_on": "x"}, "ce_on: expected"),
        ({"mask_by": "x"}, "mask_by: expected"),
        ({"tau": 0.0}, "tau: expected"),
        ({"weight": float("inf")}, "weight: expected a finite"),
        (
            {"labels": torch.tensor([0, 1, 9])},
            r"labels: expected values in 0..4 \(K = 5\), got 0..9",
        ),
        ({"labels": torch.tensor([0, 1])}, r"labels: expected \(3,\), got \(2,\)"),
        ({"labels": torch.zeros(3)}, "labels: expected an integer tensor"),
        ({"image": torch.zeros(0, 64)}, "at least one image"),
    ],
)
def test_bad_input_is_named(change, message):
    image, text, labels = clip_like(3, 5)
    given = {"image": image, "text": text, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        fastood.ebm_loss(**given)


def test_locoop_refuses_a_rank_no_patch_can_have():
    image, text, labels = clip_like(3, 5)
    with pytest.raises(ValueError, match="top_k: expected 1 <= top_k <= K - 1 = 4, got 200"):
        fastood.locoop_loss(image, image[:, None], text, labels)
