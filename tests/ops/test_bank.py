"""A prepared bank: what is packed once is right later on, wherever it has been meanwhile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastood
from fastood.ops import loader
from tests.conftest import clip_like


def bank_of(negatives: bool = True, **options):
    image, text, _ = clip_like(6, 40, 48)
    if negatives:
        options |= {"negatives": clip_like(1, 60, 48, seed=2)[1], "groups": 6}
    return image, text, fastood.ClassBank(text, **options)


def test_packed_in_inference_mode_and_trained_with_afterwards(instruction_set):
    image, _, bank = bank_of()
    with torch.inference_mode():
        fastood.mcm(image, bank, impl="cpu")
        fastood.neg_label(image, bank, impl="cpu")
        assert bank.panels is not None and bank.negative_panels is not None
    image.requires_grad_()
    (fastood.mcm(image, bank).sum() + fastood.neg_label(image, bank).sum()).backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("normalize", [True, False])
def test_what_happens_to_the_callers_tensor_does_not_matter(kernels, normalize):
    image, text, _ = clip_like(6, 40, 48)
    bank = fastood.ClassBank(text, normalize=normalize)
    want = fastood.mcm(image, bank, tau=0.01)
    text.neg_()
    assert torch.equal(fastood.mcm(image, bank, tau=0.01), want)
    reference = fastood.mcm(image, bank, tau=0.01, impl="reference")
    torch.testing.assert_close(reference, want, rtol=1e-3, atol=0)


def test_copies_leave_the_packed_classes_behind(instruction_set):
    image, _, bank = bank_of()
    small = len(pickle.dumps(bank))
    want = fastood.mcm(image, bank), fastood.neg_label(image, bank)
    assert bank.score_panels is bank.score_panels  # kept, but not taken along
    assert len(pickle.dumps(bank)) == small
    for other in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank), bank.to(torch.float32)):
        assert torch.equal(fastood.mcm(image, other), want[0])
        assert torch.equal(fastood.neg_label(image, other), want[1])


def test_the_reference_asks_for_no_kernels(monkeypatch):
    def refuse():
        raise AssertionError("nothing may be compiled or loaded")

    monkeypatch.setattr(loader, "cpu", refuse)
    monkeypatch.setattr(loader, "try_cpu", refuse)
    image, text, _ = clip_like(6, 40, 48)
    negatives = clip_like(1, 60, 48, seed=2)[1]
    fastood.score(image, text, methods=["mcm"], impl="reference")
    fastood.neg_label(image, text, negatives, groups=6, impl="reference")
