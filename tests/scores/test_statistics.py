"""Row statistics: the identities that make every global score an epilogue of them."""

from __future__ import annotations

import pytest
import torch

import fastood
from tests.conftest import clip_like


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("c", [1, 3, 21])
@pytest.mark.parametrize("form", ["plain", "bank", "per image", "similarity"])
def test_the_log_sum_and_the_top_come_back(impl, c, form):
    image, text, _ = clip_like(17, 21)
    z = torch.nn.functional.normalize(image.double(), dim=1)
    s = z @ torch.nn.functional.normalize(text.double(), dim=1).mT
    source = {
        "plain": {"image": image, "text": text},
        "bank": {"image": image, "text": fastood.ClassBank(text)},
        "per image": {"image": image, "text": text.expand(17, 21, -1)},
        "similarity": {"similarity": s.float()},
    }[form]
    taus = (0.01, 1.0)
    found = fastood.row_statistics(**source, taus=taus, c=c, moments=True, impl=impl)
    values, classes = s.topk(c, dim=1)
    assert torch.equal(found.classes, classes)
    torch.testing.assert_close(found.values.double(), values, rtol=0, atol=2e-7)
    for t, tau in enumerate(taus):
        top = ((found.values.double() - found.values[:, :1]) / tau).exp().sum(dim=1)
        lse = found.values[:, 0].double() / tau + (top + found.rest[:, t].exp()).log()
        torch.testing.assert_close(lse, torch.logsumexp(s / tau, dim=1), rtol=2e-6, atol=3e-5)
        p = torch.softmax(s / tau, dim=1)
        entropy = torch.log(torch.tensor(21.0)) + (p * p.clamp_min(1e-300).log()).sum(dim=1)
        torch.testing.assert_close(found.neg_entropy[:, t].double(), entropy, rtol=1e-4, atol=1e-7)
        variance = p.var(dim=1, correction=0)
        torch.testing.assert_close(found.variance[:, t].double(), variance, rtol=1e-4, atol=1e-10)
    if c == 21:
        assert (found.rest == -torch.inf).all()


def test_both_implementations_have_the_same_gradients():
    image, text, _ = clip_like(9, 33)
    gradients = []
    for impl in ("reference", None):
        z, t = image.clone().requires_grad_(), text.clone().requires_grad_()
        found = fastood.row_statistics(z, t, taus=(0.05,), c=2, moments=True, impl=impl)
        total = found.values.sum() + found.rest.sum() + found.neg_entropy.sum()
        gradients.append(torch.autograd.grad(total, (z, t)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0}, "c: expected 1 <= c <= K = 5, got 0"),
        ({"c": 6}, "c: expected 1 <= c <= K = 5, got 6"),
        ({"taus": ()}, "taus: expected 1 to 16 temperatures, got 0"),
        ({"taus": (1.0, -1.0)}, "tau: expected a temperature > 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastood.row_statistics(similarity=torch.rand(2, 5), **options)


def test_nan_is_refused():
    s = torch.rand(3, 5)
    s[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"similarity: .* row 1"):
        fastood.row_statistics(similarity=s)


@pytest.mark.parametrize("name", ["image", "text"])
def test_what_is_no_tensor_is_named(name):
    given = {"image": torch.eye(2), "text": torch.eye(2)} | {name: [[1.0, 0.0]]}
    with pytest.raises(TypeError, match=rf"{name}: expected a torch.Tensor .* got list"):
        fastood.row_statistics(**given)
