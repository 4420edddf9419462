"""Dropping singular directions, against the float64 SVD that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastood.ops import lowrank
from fastood.ops.lowrank import drop_tails, resolution, solver_of, tail_basis
from tests import tolerances

SHAPES = [(3, 40, 24), (2, 24, 40), (1, 17, 17), (4, 1, 9), (2, 9, 1)]


def weights(count: int, m: int, n: int, *, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Like those of a tower: entries of one size, so singular values that fall slowly."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, m, n, generator=g, dtype=torch.float64) * 0.02).to(dtype)


def without(w: Tensor, count: int) -> Tensor:
    """From the definition."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    s[:, s.shape[1] - count :] = 0
    return u * s[:, None] @ v


def error(got: Tensor, want: Tensor, w: Tensor) -> float:
    """The largest over matrices, relative to the weights."""
    return float(((got.double() - want).norm(dim=(1, 2)) / w.double().norm(dim=(1, 2))).max())


@pytest.mark.parametrize(("count", "m", "n"), SHAPES)
def test_every_number_of_directions_agrees_with_the_svd(count, m, n):
    w = weights(count, m, n)
    basis = tail_basis(w)
    counts = range(min(m, n) + 1)
    for dropped, got in zip(counts, drop_tails(w, basis, counts), strict=True):
        assert got.dtype == w.dtype and got.shape == w.shape
        assert error(got, without(w, dropped), w) <= tolerances.LOW_RANK_RTOL
    assert torch.equal(drop_tails(w, basis, [0])[0], w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_left_of_everything(dtype):
    """Not even rounding, which a norm of the features would make a feature of."""
    w = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    most, all_ = drop_tails(w, tail_basis(w), [5, 6])
    assert most.norm() > 0.1 and not all_.any()


def test_values_are_squared_singular_values_and_vectors_are_orthonormal():
    w = weights(3, 30, 12)
    basis = tail_basis(w)
    s = torch.linalg.svdvals(w.double()).flip(-1)
    torch.testing.assert_close(basis.values.sqrt(), s, rtol=1e-10, atol=0)
    eye = basis.vectors.mT @ basis.vectors
    torch.testing.assert_close(eye, torch.eye(12, dtype=torch.float64).expand_as(eye))


def test_ties_lose_the_same_energy():
    """Directions of one singular value may mix: what is left differs, what is lost does not."""
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(20, 8, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    s = torch.tensor([3, 2, 2, 2, 1, 1, 1, 0.5], dtype=torch.float64)
    w = (u * s @ v.T)[None]
    for dropped, got in enumerate(drop_tails(w, tail_basis(w), range(9))):
        lost = float((w - got).norm())
        assert abs(lost - float(s[8 - dropped :].norm())) < 1e-12


def test_order_and_repeats_of_counts_do_not_matter():
    w = weights(2, 20, 10)
    basis = tail_basis(w)
    one = {c: drop_tails(w, basis, [c])[0] for c in (0, 3, 7, 10)}
    counts = [7, 0, 10, 3, 7]
    results = drop_tails(w, basis, counts)
    for c, got in zip(counts, results, strict=True):
        assert error(got, one[c].double(), w) <= 1e-7
    assert len({got.data_ptr() for got in results}) == 5  # each can be written to
    assert drop_tails(w, basis, []) == []


def test_weak_and_strong_directions_do_not_mix():
    """A condition number of 1e6 is 1e12 in the Gram matrix: float32 there would lose the tail."""
    g = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    s = torch.logspace(0, -6, 6, dtype=torch.float64)
    w = (u * s @ v.T)[None]
    for dropped, got in enumerate(drop_tails(w, tail_basis(w), range(6))):
        lost = float((w - got).norm())
        assert abs(lost - float(s[6 - dropped :].norm())) <= 1e-9 * max(lost, 1e-6)


@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 24, 40), (1, 17, 17), (2, 1, 9), (2, 200, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solvers_agree(shape, dtype):
    w = weights(*shape, dtype=dtype)
    gram, svd = tail_basis(w, solver="torch"), tail_basis(w, solver="svd")
    torch.testing.assert_close(gram.values, svd.values, rtol=1e-10, atol=0)
    counts = [0, 1, min(shape[1:]) // 3, min(shape[1:])]
    for a, b in zip(drop_tails(w, gram, counts), drop_tails(w, svd, counts), strict=True):
        assert error(a, b.double(), w) <= 1e-7


def test_each_dtype_has_the_solver_that_resolves_it():
    """A float64 matrix has directions that vanish in a Gram matrix."""
    g = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(30, 5, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    s = torch.logspace(0, -12, 5, dtype=torch.float64)
    w = (u * s @ v.T)[None]
    assert solver_of(w) == "svd" and solver_of(w.float()) == solver_of(w.bfloat16()) == "gram"
    found = tail_basis(w).values.sqrt()[0].flip(0)
    torch.testing.assert_close(found, s, rtol=1e-3, atol=0)
    assert float(s[-1]) > resolution(w) and float(s[-1]) < resolution(w.float())


def test_another_order_of_directions_is_another_part():
    """The strongest first, as many as are needed: what is left is the weak ones."""
    w = weights(2, 20, 12)
    basis = tail_basis(w)
    strongest = basis._replace(vectors=basis.vectors.flip(-1)[..., :5])
    for count, got in zip([2, 5], drop_tails(w, strongest, [2, 5]), strict=True):
        assert error(got, w.double() - without(w, 12 - count), w) <= tolerances.LOW_RANK_RTOL
    with pytest.raises(ValueError, match="basis: expected vectors"):
        drop_tails(w, strongest, [6])


def test_weights_are_left_as_they_are():
    """Also those that need no conversion to float64."""
    for shape in ((2, 20, 12), (2, 12, 20), (1, 8, 8)):
        w = weights(*shape, dtype=torch.float64)
        before = w.clone()
        drop_tails(w, tail_basis(w), [0, 3, 8])
        assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    w = weights(2, 16, 8, dtype=dtype)
    (got,) = drop_tails(w, tail_basis(w), [3])
    assert got.dtype == dtype
    assert error(got, without(w, 3), w) <= 2 * torch.finfo(dtype).eps + 1e-14


def test_chunks_change_nothing(monkeypatch):
    w = weights(5, 12, 7)
    basis = tail_basis(w)
    whole = drop_tails(w, basis, [2, 4])
    monkeypatch.setattr(lowrank, "_CHUNK_BYTES", {"cpu": 8 * 7 * 5, "other": 1})
    pieces = tail_basis(w)
    torch.testing.assert_close(pieces.values, basis.values)
    for a, b in zip(drop_tails(w, basis, [2, 4]), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_views_gradients_and_empty_sets():
    w = weights(2, 10, 6).mT.requires_grad_()
    (got,) = drop_tails(w, tail_basis(w), [2])
    assert not got.requires_grad and error(got, without(w.detach(), 2), w.detach()) < 1e-6
    for shape in ((0, 4, 3), (2, 0, 3), (2, 3, 0)):
        empty = torch.zeros(shape)
        basis = tail_basis(empty)
        assert drop_tails(empty, basis, [0])[0].shape == shape


def test_what_does_not_fit_is_named():
    w = weights(2, 6, 4)
    basis = tail_basis(w)
    with pytest.raises(ValueError, match=r"weights: expected \(N, m, n\)"):
        tail_basis(w[0])
    with pytest.raises(ValueError, match=r"weights: expected \(N, m, n\)"):
        tail_basis(torch.ones(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="weights: values must be finite"):
        tail_basis(torch.full((1, 2, 2), float("nan")))
    for solver in ("torch", "svd"):
        for bad in (float("nan"), float("inf")):
            spoilt = weights(2, 6, 4)
            spoilt[1, 5, 3] = bad
            with pytest.raises(ValueError, match="weights: values must be finite"):
                tail_basis(spoilt, solver=solver)
    with pytest.raises(ValueError, match=r"counts: expected 0 <= count <= min\(m, n\) = 4, got 5"):
        drop_tails(w, basis, [1, 5])
    with pytest.raises(ValueError, match="basis: expected vectors"):
        drop_tails(weights(2, 6, 5), basis, [1])
    with pytest.raises(ValueError, match="solver: expected"):
        tail_basis(w, solver="jacobi")
    with pytest.raises(ValueError, match="'batched' takes CUDA tensors"):
        tail_basis(w, solver="batched")
