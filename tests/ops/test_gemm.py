"""The multiply under the fused kernels, seen through the sorted products it leaves behind."""

from __future__ import annotations

import pytest
import torch

import fastood
from fastood.ops.rows import row_statistics
from fastood.scores import ClassBank


def products(image, text):
    """(B, K) all products: the K largest of each row, put back in their places."""
    found = row_statistics(image, text, taus=[1.0], c=len(text))
    return torch.empty_like(found.values).scatter(1, found.classes, found.values)


def numbers(b, k, d, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, d, generator=g), torch.randn(k, d, generator=g)


WIDTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 144, 256, 512, 1030]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("b", "k"), [(1, 1), (5, 31), (14, 32), (15, 33), (30, 65)])
def test_products(instruction_set, b, k, d):
    image, text = numbers(b, k, d)
    exact = image.double() @ text.double().mT
    size = image.double().abs() @ text.double().abs().mT
    error = (products(image, text).double() - exact).abs() / size
    assert float(error.max()) < 1e-6
    if d == 1030 and b > 1:  # chains of at most 128: no worse than a large library's
        beside = ((image @ text.mT).double() - exact).abs() / size
        assert float(error.max()) < 2 * float(beside.max())


def test_whole_numbers_are_exact(instruction_set):
    g = torch.Generator().manual_seed(0)
    image = torch.randint(-9, 10, (45, 77), generator=g).float()
    text = torch.randint(-9, 10, (100, 77), generator=g).float()
    image[:, 0], text[:, 0] = 1, 1
    assert torch.equal(products(image, text), image @ text.mT)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosines_with_a_prepared_bank(instruction_set, d, dtype):
    """Where a matrix unit is used, this is what it multiplies."""
    image, text = numbers(37, 1, d)
    image = image.to(dtype)
    z = image.double() / image.double().norm(dim=1, keepdim=True)
    t = text.double() / text.double().norm(dim=1, keepdim=True)
    for bank in (ClassBank(text), text):
        got = fastood.max_similarity(image, bank, impl="cpu")
        torch.testing.assert_close(got.double(), (z @ t.mT)[:, 0], rtol=0, atol=4e-7)


def test_a_row_is_the_same_wherever_it_lies(instruction_set):
    image, text = numbers(61, 70, 300)
    whole = products(image, text)
    for first, stop in ((0, 1), (3, 17), (13, 14), (15, 60), (60, 61)):
        assert torch.equal(products(image[first:stop], text), whole[first:stop])
    for first in (0, 5, 32, 69):
        assert torch.equal(products(image, text[first:]), whole[:, first:])


def test_text_is_packed_from_any_layout(kernels, instruction_set):
    _, text = numbers(1, 75, 43)
    want = kernels.pack_text(text, False, "text")
    panels, rows, lanes = want.shape
    assert (panels, rows, lanes) == (3, 48, 32)
    spread = want.transpose(1, 2).reshape(96, 48)
    assert torch.equal(spread[:75, :43], text)
    assert not spread[75:].any() and not spread[:, 43:].any()
    for layout in (text.T.contiguous().T, torch.stack([text, text], 1)[:, 0]):
        assert torch.equal(kernels.pack_text(layout, False, "text"), want)
    for dtype in (torch.bfloat16, torch.float16):
        half = text.to(dtype)
        packed = kernels.pack_text(half, False, "text")
        assert torch.equal(packed, kernels.pack_text(half.float(), False, "text"))


def test_panels_of_other_classes_are_refused(kernels):
    image, text = numbers(5, 40, 24)
    for other in (text[:20], text[:, :7]):
        panels = kernels.pack_text(other, False, "text")
        with pytest.raises(ValueError, match=r"text: expected classes packed for \(40, 24\)"):
            row_statistics(image, text, taus=[1.0], panels=panels)
    with pytest.raises(ValueError, match=r"c: expected 1 <= c <= K = 40, got 41"):
        row_statistics(image, text, taus=[1.0], c=41)
    with pytest.raises(ValueError, match="tau: expected a temperature > 0, got 0"):
        row_statistics(image, text, taus=[0.0])
    with pytest.raises(ValueError, match="instruction set: expected"):
        kernels.choose_instruction_set("sse9")
