"""Ranks and entropies of patches without gradients, by the kernels and in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastood.ops import fused
from fastood.ops.patchterms import PatchTerms, patch_terms, terms_of
from tests import tolerances

# (N, K, D, top_k): the smallest; around panels, tiles and blocks of rows; one tile a block
SHAPES = [
    (1, 2, 3, 1),
    (35, 33, 48, 10),
    (140, 31, 17, 10),
    (196, 1030, 32, 300),
    (230, 5000, 16, 900),
    (20, 40000, 4, 9000),
    (1000, 64, 64, 63),
]


def inputs(n: int, k: int, d: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit patches, classes of norm 20, biases and labels."""
    g = torch.Generator().manual_seed(seed)
    local, weight = (
        torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1) for m in (n, k)
    )
    return (
        local,
        20 * weight,
        torch.randn(k, generator=g),
        torch.randint(k, (n,), generator=g),
    )


def definition(
    local: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, top_k: int
) -> PatchTerms:
    """By a stable sort, in float64."""
    s = local.double() @ weight.double().T
    s = s if bias is None else s + bias.double()
    order = s.sort(dim=1, descending=True, stable=True).indices
    rank = (order == labels[:, None]).int().argmax(dim=1)
    own = s.gather(1, labels[:, None])
    above, up_to = (s > own).sum(dim=1), (s >= own).sum(dim=1)
    p = s.softmax(dim=1)
    entropy = (p * (p + 1e-5).log()).sum(dim=1)
    return PatchTerms(
        rank.int(), (above < top_k) & (up_to > top_k), torch.where(rank >= top_k, entropy, 0.0)
    )


def assert_terms(found: PatchTerms, want: PatchTerms) -> None:
    assert torch.equal(found.rank, want.rank)
    assert torch.equal(found.tied, want.tied)
    torch.testing.assert_close(
        found.entropy, want.entropy, rtol=0, atol=tolerances.PATCH_TERMS_ATOL
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(kernels, instruction_set, threads, shape, with_bias):
    n, k, d, top_k = shape
    local, weight, bias, labels = inputs(n, k, d)
    if not with_bias:
        bias = None
    found = patch_terms(local, weight, bias, labels, top_k=top_k)
    want = definition(local, weight, bias, labels, top_k)
    # float32 logits in another order may swap two classes that all but tie
    near = (found.rank - want.rank).abs()
    assert int(near.max()) <= (1 if k >= 1000 else 0)
    same = (found.rank >= top_k) == (want.rank >= top_k)
    assert float(same.double().mean()) > 0.99
    assert not found.tied.any()
    torch.testing.assert_close(
        found.entropy[same], want.entropy[same], rtol=0, atol=tolerances.PATCH_TERMS_ATOL
    )
    packed = fused.score_panels(weight, normalize=False)
    threads(1)
    for x, y in zip(
        patch_terms(local, weight, bias, labels, top_k=top_k, panels=packed), found, strict=True
    ):
        assert torch.equal(x, y)


def test_some_patches_count_and_some_do_not():
    """The shapes above would show nothing if every patch counted, or none."""
    for n, k, d, top_k in SHAPES[1:5]:
        local, weight, _, labels = inputs(n, k, d)
        ood = definition(local, weight, None, labels, top_k).rank >= top_k
        assert 0.2 < float(ood.double().mean()) < 0.9


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch(shape, with_bias):
    n, k, d, top_k = shape
    local, weight, bias, labels = inputs(n, k, d)
    if not with_bias:
        bias = None
    found = terms_of(local.double(), weight.double(), bias, labels, top_k=top_k)
    assert_terms(found, definition(local, weight, bias, labels, top_k))


def check_order_of_equal_logits(run: Callable[..., PatchTerms]) -> None:
    local, weight, _, labels = inputs(200, 40, 8)
    weight = weight[torch.arange(120) % 40]  # each class three times
    labels = labels + 40 * (torch.arange(200) % 3)
    for top_k in (1, 2, 3, 60, 61, 119):
        found = run(local, weight, None, labels, top_k=top_k)
        assert_terms(found, definition(local, weight, None, labels, top_k))
        assert bool(found.tied.any()) is (top_k % 3 != 0)


def test_equal_logits_keep_the_order_of_classes(kernels, instruction_set):
    check_order_of_equal_logits(patch_terms)


def test_equal_logits_keep_the_order_of_classes_in_plain_torch():
    check_order_of_equal_logits(terms_of)


def test_flat_rows_are_one_tie(kernels, instruction_set):
    local, weight, _, labels = inputs(50, 70, 8)
    found = patch_terms(torch.zeros_like(local), weight, None, labels, top_k=20)
    assert torch.equal(found.rank, labels.int())
    assert found.tied.all()
    p = 1 / 70
    want = torch.where(labels >= 20, 70 * p * math.log(p + 1e-5), 0.0)
    torch.testing.assert_close(found.entropy, want.double(), rtol=0, atol=1e-6)


def test_sure_rows_neither_overflow_nor_vanish(kernels, instruction_set):
    """One logit of 10^4 beside zeros: p is 1 or 0, and log(0 + 1e-5) is multiplied by 0."""
    weight = torch.zeros(33, 2)
    weight[:, 1] = 1e-30
    weight[32, 0] = 1e4
    local = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = patch_terms(local, weight, None, torch.tensor([5, 32]), top_k=1)
    assert found.rank.tolist() == [6, 32]
    flat = 32 * (1 / 32) * math.log(1 / 32 + 1e-5)
    want = torch.tensor([math.log(1 + 1e-5), flat], dtype=torch.float64)
    torch.testing.assert_close(found.entropy, want, rtol=0, atol=1e-6)


def test_strides_and_half_precision(kernels):
    local, weight, bias, labels = inputs(60, 30, 24)
    wide = torch.cat([local, local], dim=1)[:, :24]
    apart = torch.stack([local, local], dim=-1)[..., 0]
    want = patch_terms(local, weight, bias, labels, top_k=9)
    for z in (wide, apart):
        for x, y in zip(patch_terms(z, weight, bias, labels, top_k=9), want, strict=True):
            assert torch.equal(x, y)
    half = local.bfloat16()
    want = definition(half.float(), weight, bias, labels, 9)
    assert_terms(patch_terms(half, weight, bias, labels, top_k=9), want)


def test_bad_numbers_and_labels_are_named(kernels):
    local, weight, bias, labels = inputs(9, 30, 8)
    for value in (math.nan, math.inf):
        bad = local.clone()
        bad[4, 1] = value
        with pytest.raises(ValueError, match=r"local: features must be finite.*row 4"):
            patch_terms(bad, weight, bias, labels, top_k=9)
    bad = local.clone()
    bad[3] *= 1e38
    with pytest.raises(ValueError, match=r"values must be finite.*row 3"):
        patch_terms(bad, weight, bias, labels, top_k=9)
    assert terms_of(bad, weight, bias, labels, top_k=9).entropy.isnan().tolist() == [
        i == 3 for i in range(9)
    ]
    labels[2] = 30
    with pytest.raises(ValueError, match=r"labels: expected values in 0..29 \(K = 30\), got 30"):
        patch_terms(local, weight, bias, labels, top_k=9)
    with pytest.raises(ValueError, match=r"weight: expected \(K, 8\)"):
        patch_terms(local, weight[:, :7], bias, labels, top_k=9)
    with pytest.raises(ValueError, match=r"bias: expected \(30,\)"):
        patch_terms(local, weight, bias[:29], labels[:9] % 30, top_k=9)


def test_no_rows(kernels):
    local, weight, bias, labels = inputs(4, 30, 8)
    for run in (patch_terms, terms_of):
        found = run(local[:0], weight, bias, labels[:0], top_k=9)
        assert [len(x) for x in found] == [0, 0, 0]


def test_the_operator_itself():
    local, weight, bias, labels = inputs(5, 7, 8)
    for b in (None, bias):
        torch.library.opcheck(
            torch.ops.fastood.patch_terms.default, (local, weight, None, b, labels, 3)
        )
