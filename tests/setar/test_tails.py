"""Dropped parts applied to activations, against the weights without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastood.setar.lowrank import LowRankBasis
from fastood.setar.tails import Tails
from tests import tolerances

SHAPES = [(24, 40), (40, 24), (17, 17), (3, 1)]
PARTS = ["minor", "principal", "random"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_those_of_the_weights_without_the_part(shape, part, dtype):
    w, b = draw(*shape, dtype=dtype), draw(shape[0], seed=1, dtype=dtype)
    x = draw(2, 5, shape[1], seed=2, dtype=dtype)
    basis = LowRankBasis(w)
    counts = [c for c in (1, 4, 5, 16) if c < basis.size] or [1]
    tails = Tails.of(basis, counts, part=part, seed=3, dtype=dtype, device="cpu")
    assert tails.counts == tuple(counts)
    y = x @ w.T + b
    tolerance = tolerances.TAILS_F64_RTOL if dtype == torch.float64 else tolerances.TAILS_RTOL
    seen = 0
    for count, got in zip(counts, tails.results(x, y), strict=True):
        want = x.double() @ basis.drop(count, part=part, seed=3).double().T + b.double()
        assert got.shape == y.shape and got.dtype == dtype
        scale = float(y.abs().max())
        assert float((got.double() - want).abs().max()) <= tolerance * scale, count
        seen += 1
    assert seen == len(counts)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_all_singular_values_are_equal_the_same_directions_go(shape, part, dtype):
    """As of orthogonal initial weights: what is tried is what is dropped afterwards."""
    w = torch.eye(*shape, dtype=dtype)
    x = draw(5, shape[1], seed=2, dtype=dtype)
    basis = LowRankBasis(w)
    tails = Tails.of(basis, [1, 4, 9], part=part, seed=3, dtype=dtype, device="cpu")
    tolerance = tolerances.TAILS_F64_RTOL if dtype == torch.float64 else tolerances.TAILS_RTOL
    for count, got in zip(tails.counts, tails.results(x, x @ w.T), strict=True):
        assert gap(got, x @ basis.drop(count, part=part, seed=3).T) <= tolerance, count


def test_counts_come_sorted_once_each_and_inputs_stay():
    w = draw(6, 8)
    x, y = draw(7, 8, seed=1), draw(7, 6, seed=2)
    before = x.clone(), y.clone()
    tails = Tails.of(LowRankBasis(w), [5, 2, 2, 6], dtype=torch.float64, device="cpu")
    assert tails.counts == (2, 5, 6)
    results = [r.clone() for r in tails.results(x, y)]
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    # all directions gone: what is left of y is what W x does not explain
    assert gap(results[-1], y - x @ w.T) < tolerances.TAILS_F64_RTOL
    # rows with gaps, as one token of each image has
    wide = draw(7, 3, 8, seed=1)
    tails = Tails.of(LowRankBasis(w), [2, 5], dtype=torch.float64, device="cpu")
    again = [r.clone() for r in tails.results(wide[:, :1], (wide[:, :1] @ w.T))]
    full = [r.clone() for r in tails.results(wide, wide @ w.T)]
    for a, b in zip(again, full, strict=True):
        assert gap(a, b[:, :1]) < tolerances.TAILS_F64_RTOL


def test_weights_of_low_rank_lose_what_they_have_not():
    w = draw(12, 3) @ draw(3, 9, seed=1)
    x = draw(4, 9, seed=2)
    tails = Tails.of(LowRankBasis(w), [2, 6], dtype=torch.float64, device="cpu")
    for got in tails.results(x, x @ w.T):
        assert gap(got, x @ w.T) < tolerances.TAILS_F64_RTOL


def test_nothing_in_nothing_out():
    w = draw(4, 6)
    tails = Tails.of(LowRankBasis(w), [1, 2], dtype=torch.float64, device="cpu")
    assert [r.shape for r in tails.results(draw(0, 6), draw(0, 4))] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("counts", "words"),
    [([], "at least one"), ([0], "1 <= counts"), ([5], "min\\(out, in\\) = 4"), ([0.5], "integer")],
)
def test_counts_that_do_not_exist(counts, words):
    with pytest.raises(ValueError, match=words):
        Tails.of(LowRankBasis(draw(4, 6)), counts, dtype=torch.float64, device="cpu")


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="basis: expected that of one matrix"):
        Tails.of(LowRankBasis(draw(2, 4, 6)), [1], dtype=torch.float64, device="cpu")
    tails = Tails.of(LowRankBasis(draw(4, 6)), [1], dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match="x, y: expected"):
        next(tails.results(draw(3, 4), draw(3, 6)))
