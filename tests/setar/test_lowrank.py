"""Weights without a part of their directions, against numpy's float64 SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastood.setar
from fastood.setar import LowRankBasis, count_of, low_rank, truncated_svd
from tests import tolerances

RATIOS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
PARTS = ["minor", "principal", "random"]
SHAPES = [(60, 24), (24, 60), (31, 31), (12, 1), (1, 12), (1, 1), (150, 140)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def of(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * 0.02).to(dtype)


def with_values(s: list[float] | Tensor, m: int, n: int, *, seed: int = 0) -> Tensor:
    """(m, n) float64 with these singular values."""
    g = torch.Generator().manual_seed(seed)
    s = torch.as_tensor(s, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(m, len(s), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), generator=g, dtype=torch.float64))[0]
    return u * s @ v.T


def dropped_of(count: int, size: int, part: str, seed: int) -> np.ndarray:
    """Places, strongest first, from the definition."""
    if part == "minor":
        return np.arange(size - count, size)
    if part == "principal":
        return np.arange(count)
    permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return permutation[:count].numpy()


def without(w: Tensor, count: int, part: str = "minor", seed: int = 0) -> np.ndarray:
    """U S V' with some of S set to zero, by numpy."""
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    s[dropped_of(count, len(s), part, seed)] = 0
    return u * s @ v


def error(got: Tensor, want: np.ndarray, w: Tensor) -> float:
    """Frobenius norm of the difference, relative to the weights'."""
    return float(
        np.linalg.norm(got.double().numpy() - want) / max(float(w.double().norm()), 1e-300)
    )


def allowed(dtype: torch.dtype) -> float:
    """The figure demanded; shorter dtypes round the result itself more coarsely."""
    return max(tolerances.LOW_RANK_RTOL, torch.finfo(dtype).eps)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_ratio_agrees_with_numpy(shape, dtype, part):
    w = of(shape, dtype=dtype)
    size = min(shape)
    ratios = [0.0, *RATIOS, 0, 1, size]
    for x, got in zip(ratios, low_rank(w, drop=ratios, part=part, seed=3), strict=True):
        assert got.dtype == dtype and got.shape == w.shape
        want = without(w, count_of(x, size), part, 3)
        assert error(got, want, w) <= allowed(dtype), x
    assert torch.equal(low_rank(w, drop=0, part=part), w)


@pytest.mark.parametrize("shape", [(60, 24), (24, 60)])
def test_float64_is_right_to_float64(shape):
    w = of(shape, dtype=torch.float64)
    for x, got in zip(RATIOS, LowRankBasis(w).drop(RATIOS), strict=True):
        assert error(got, without(w, count_of(x, 24)), w) <= tolerances.LOW_RANK64_RTOL


def test_the_default_is_the_published_one():
    w = of((40, 20))
    assert error(low_rank(w), without(w, 3), w) <= 1e-6


@pytest.mark.parametrize("part", PARTS)
def test_lists_equal_single_calls(part):
    basis = LowRankBasis(of((3, 50, 30)))
    mixed = [0.4, 5, 0.0, 0.1, 5, 30]
    for x, got in zip(mixed, basis.drop(mixed, part=part, seed=1), strict=True):
        one = basis.drop(x, part=part, seed=1)
        torch.testing.assert_close(got, one, rtol=0, atol=1e-8)
    assert basis.drop([]) == [] and basis.drop((0.1,))[0].shape == (3, 50, 30)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_a_batch_equals_its_matrices(shape, part):
    w = of((4, *shape))
    w[2] = 0
    batch = LowRankBasis(w)
    a, b = batch.factors(0.3, part=part)
    whole = batch.drop(RATIOS, part=part)
    for i in range(4):
        one = LowRankBasis(w[i])
        assert one.shape == w[i].shape and one.values.shape == (12 if 30 in shape else 16,)
        torch.testing.assert_close(batch.values[i], one.values, rtol=1e-10, atol=0)
        torch.testing.assert_close(batch.energy(0.3, part=part)[i], one.energy(0.3, part=part))
        for got, want in zip(one.drop(RATIOS, part=part), whole, strict=True):
            torch.testing.assert_close(got, want[i], rtol=0, atol=1e-8)
        one_a, one_b = one.factors(0.3, part=part)
        torch.testing.assert_close(one_b @ one_a, b[i] @ a[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_ties_at_the_cut_lose_the_same_energy(part):
    """Which of the tied directions goes is arbitrary; what is lost is not."""
    s = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5]
    for m, n in ((20, 8), (8, 20)):
        w = with_values(s, m, n).float()
        exact = np.linalg.svd(w.double().numpy(), compute_uv=False)
        for count, got in enumerate(LowRankBasis(w).drop(range(9), part=part, seed=2)):
            lost = float((w.double() - got.double()).norm())
            want = np.linalg.norm(exact[dropped_of(count, 8, part, 2)])
            assert abs(lost - want) <= tolerances.LOW_RANK_RTOL * float(w.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (20, 20)])
def test_matrices_that_are_hard_to_decompose(shape, dtype):
    """Tiny singular values, fewer directions than columns, one direction, none, equal ones, sizes
    near the ends of float32."""
    m, n = shape
    rank_8 = with_values(torch.linspace(1, 2, 8, dtype=torch.float64), m, n)
    matrices = {
        "falling": with_values(torch.logspace(0, -10, 20, dtype=torch.float64), m, n),
        "cliff": with_values(torch.tensor([1.0] * 10 + [1e-9] * 10), m, n),
        "rank 8": rank_8,
        "rank 1": torch.ones(m, n, dtype=torch.float64),
        "zero": torch.zeros(m, n, dtype=torch.float64),
        "all equal": with_values(torch.ones(20), m, n),
        "eye": torch.eye(m, n, dtype=torch.float64),
        "zero columns": of((m, n), dtype=torch.float64) * (torch.arange(n) % 3 > 0),
        "huge": of((m, n), dtype=torch.float64) * 1e37,
        "small": of((m, n), dtype=torch.float64) * 1e-30,
    }
    for name, w in matrices.items():
        w = w.to(dtype)
        basis = LowRankBasis(w)
        s = np.linalg.svd(w.double().numpy(), compute_uv=False)
        norm = float(np.linalg.norm(s))
        for count, got in zip((0, 3, 8, 12, 20), basis.drop([0, 3, 8, 12, 20]), strict=True):
            distance = float((w.double() - got.double()).norm())
            best = float(np.linalg.norm(s[20 - count :]))
            assert abs(distance - best) <= tolerances.LOW_RANK_RTOL * norm, (name, count)
            if count < 20 and s[19 - count] - s[20 - count if count else 19] > 0.01 * s[0]:
                want = without(w, count)
                assert error(got, want, w) <= tolerances.LOW_RANK_RTOL, (name, count)
            a, b = basis.factors(count)
            assert bool(torch.isfinite(a).all() and torch.isfinite(b).all()), name
            left = (got.double() + b @ a - w.double()).norm()
            assert float(left) <= tolerances.LOW_RANK_REST_RTOL * norm, (name, count)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 16, 40), (1, 9, 9)])
def test_base_and_factors_make_the_weights(shape, dtype, part):
    w = of(shape, dtype=dtype)
    basis = LowRankBasis(w)
    for x in (0.0, 0.1, 0.4, 1, min(shape[1:])):
        a, b = basis.factors(x, part=part, seed=5)
        r = count_of(x, min(shape[1:]))
        assert a.shape == (shape[0], r, shape[2]) and b.shape == (shape[0], shape[1], r)
        assert a.dtype == b.dtype == torch.float64
        base = basis.drop(x, part=part, seed=5)
        left = (base.double() + b @ a - w.double()).norm()
        # the base is rounded to its dtype, nothing else is
        assert float(left) <= (0.5 * torch.finfo(dtype).eps + 1e-13) * float(w.double().norm())


def test_factors_are_balanced_and_strongest_first():
    """A = sqrt(S1) V1' and B = U1 sqrt(S1): both have the singular values as squared norms."""
    for shape in ((30, 12), (12, 30)):
        w = of(shape)
        s = torch.linalg.svdvals(w.double())
        for part, places in (("minor", range(7, 12)), ("principal", range(5))):
            a, b = LowRankBasis(w).factors(5, part=part)
            for product in (a @ a.T, b.T @ b):
                torch.testing.assert_close(product, torch.diag(s[places]), rtol=1e-9, atol=1e-12)
        a, b = LowRankBasis(w).factors(5, part="random", seed=9)
        places = np.sort(dropped_of(5, 12, "random", 9))
        torch.testing.assert_close((a @ a.T).diagonal(), s[places], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_without_a_value_get_no_adapter(dtype):
    half = of((20, 4), dtype=dtype)
    for w in (torch.cat([half, half], dim=1), torch.cat([half, half], dim=1).mT):
        a, b = LowRankBasis(w).factors(6)  # of 8, 4 of which have no value
        assert bool((a[:2] != 0).any(dim=1).all() and (b[:, :2] != 0).any(dim=0).all())
        assert float(a[2:].abs().max()) == float(b[:, 2:].abs().max()) == 0
    a, b = LowRankBasis(torch.zeros(5, 3, dtype=dtype)).factors(2)
    assert float(a.abs().max()) == float(b.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_energy(dtype):
    w = of((2, 25, 10), dtype=dtype)
    basis = LowRankBasis(w)
    s = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert basis.values.dtype == torch.float64
    np.testing.assert_allclose(basis.values.numpy(), s, rtol=1e-9)
    for part in PARTS:
        for x in (0.0, 0.3, 10):
            places = dropped_of(count_of(x, 10), 10, part, 4)
            want = (s[:, places] ** 2).sum(1) / (s**2).sum(1)
            got = basis.energy(x, part=part, seed=4)
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-15)
    assert float(LowRankBasis(torch.zeros(4, 3)).energy(2)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_what_was_dropped_before_is_negligible(shape, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, *shape, generator=g, dtype=torch.float64).to(dtype)
    w[1] = low_rank(w[1], drop=9)
    w[0] = low_rank(w[0], drop=3)
    basis = LowRankBasis(w)
    for count, expected in ((0, [True, True]), (3, [True, True]), (4, [False, True]),
                            (9, [False, True]), (10, [False, False])):  # fmt: skip
        assert basis.negligible(count).tolist() == expected
    assert basis.negligible(1, part="principal").tolist() == [False, False]


def test_a_basis_keeps_its_own_weights():
    """A search replaces the weights of the model they came from."""
    layer = torch.nn.Linear(8, 12)
    basis = LowRankBasis(layer.weight)
    before = basis.drop(0.3)
    with torch.no_grad():
        layer.weight.zero_()
    assert not before.requires_grad and torch.equal(basis.drop(0.3), before)
    before.zero_()
    assert float(basis.drop(0).abs().sum()) > 0


def test_views_of_any_strides():
    """Rows of a packed parameter, and a transposed projection."""
    packed = of((90, 24))
    for w in (packed[30:60], packed.T, packed[::2, 1::3]):
        got, want = low_rank(w, drop=0.2), low_rank(w.contiguous(), drop=0.2)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-8)


def test_random_directions_are_those_of_the_seed():
    basis = LowRankBasis(of((2, 30, 20)))
    state = torch.get_rng_state()
    one, same, other = (basis.drop(0.3, part="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (10, 10), (7, 1), (1, 7)])
def test_truncated_svd(shape, dtype):
    w = of(shape, dtype=dtype)
    size = min(shape)
    exact = np.linalg.svd(w.double().numpy(), compute_uv=False)
    for rank in sorted({1, (size + 1) // 2, size}):
        u, s, vh = truncated_svd(w, rank=rank)
        assert u.shape == (shape[0], rank) and s.shape == (rank,) and vh.shape == (rank, shape[1])
        assert u.dtype == s.dtype == vh.dtype == dtype
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(s.double().numpy(), exact[:rank], rtol=eps + 1e-12)
        u, s, vh = u.double(), s.double(), vh.double()
        assert error(u * s @ vh, without(w, size - rank), w) <= 4 * eps + tolerances.LOW_RANK64_RTOL
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(
            u.T @ u, eye, rtol=0, atol=4 * eps + tolerances.ORTHONORMAL64_ATOL
        )
        torch.testing.assert_close(
            vh @ vh.T, eye, rtol=0, atol=4 * eps + tolerances.ORTHONORMAL64_ATOL
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_svd_of_what_is_hard(dtype):
    """Vectors stay orthonormal where singular values are tiny, zero or tied."""
    stack = torch.stack(
        [
            with_values(torch.logspace(0, -9, 12, dtype=torch.float64), 30, 12),
            with_values([2.0, 1.0], 30, 12),
            torch.zeros(30, 12, dtype=torch.float64),
            with_values([1.0] * 12, 30, 12),
            of((30, 12), dtype=torch.float64),
        ]
    ).to(dtype)
    eps = torch.finfo(dtype).eps
    eye = torch.eye(12, dtype=torch.float64).expand(5, 12, 12)
    for weights in (stack, stack.mT):
        u, s, vh = (x.double() for x in truncated_svd(weights, rank=12))
        assert bool((s[:, 1:] <= s[:, :-1]).all() and (s >= 0).all())
        torch.testing.assert_close(
            u.mT @ u, eye, rtol=0, atol=4 * eps + tolerances.ORTHONORMAL64_ATOL
        )
        torch.testing.assert_close(
            vh @ vh.mT, eye, rtol=0, atol=4 * eps + tolerances.ORTHONORMAL64_ATOL
        )
        left = (u * s[:, None] @ vh - weights.double()).norm(dim=(1, 2))
        assert bool(
            (
                left <= (4 * eps + tolerances.LOW_RANK64_RTOL) * weights.double().norm(dim=(1, 2))
            ).all()
        )


def test_counts_are_the_published_ones():
    assert [count_of(x, 768) for x in RATIOS] == [38, 77, 115, 154, 192, 230, 269, 307]
    assert [count_of(x, 512) for x in RATIOS] == [26, 51, 77, 102, 128, 154, 179, 205]
    # halves go to the even number
    assert [count_of(x, 2) for x in (0.25, 0.75)] == [0, 2] and count_of(0.5, 5) == 2
    assert count_of(np.float64(0.4), 768) == 307 and count_of(np.int64(7), 768) == 7
    assert count_of(0, 4) == count_of(0.0, 4) == 0 and count_of(4, 4) == 4


@pytest.mark.parametrize("x", [-0.1, 1.0, 1.5, 38.0, float("nan"), float("inf")])
def test_shares_outside_are_refused(x):
    with pytest.raises(ValueError, match=r"drop: expected a share in \[0, 1\), got"):
        count_of(x, 768)


def test_numbers_and_kinds_that_do_not_exist_are_refused():
    for x in (-1, 11):
        with pytest.raises(ValueError, match=rf"<= min\(m, n\) = 10, got {x}"):
            count_of(x, 10)
    for x in (True, "0.1", None, 1j, torch.tensor(0.1), [0.1]):
        with pytest.raises(ValueError, match=r"drop: expected a share .* or an integer"):
            count_of(x, 10)
    basis = LowRankBasis(of((6, 4)))
    for call in (basis.drop, basis.factors, basis.energy):
        with pytest.raises(ValueError, match=r"min\(m, n\) = 4, got 5"):
            call(5)
        with pytest.raises(ValueError, match="part: expected one of minor, principal, random, got"):
            call(0.1, part="major")
        with pytest.raises(ValueError, match="seed: expected"):
            call(0.1, part="random", seed=-1)
    with pytest.raises(ValueError, match="drop: expected a share"):
        basis.drop([0.1, 1.5])
    with pytest.raises(ValueError, match=r"drop: expected a share .*'0.1'"):
        basis.drop("0.1")  # type: ignore[call-overload]


@pytest.mark.parametrize("call", [low_rank, LowRankBasis, lambda w: truncated_svd(w, rank=1)])
def test_weights_that_cannot_be_decomposed_are_refused(call):
    for bad in (torch.ones(4), torch.ones(1, 2, 3, 4), torch.ones(0, 3), torch.ones(2, 3, 0)):
        with pytest.raises(ValueError, match=r"weights: expected \(m, n\), or \(N, m, n\).*got \("):
            call(bad)
    for bad in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="weights: expected floating point, got torch"):
            call(bad)
    with pytest.raises(ValueError, match="weights: expected a tensor, got ndarray"):
        call(np.ones((2, 3)))
    for dtype in DTYPES:
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = of((2, 5, 3), dtype=dtype)
            bad[1, 4, 2] = value
            with pytest.raises(ValueError, match="weights: values must be finite"):
                call(bad)
    for rank in (0, 4, 1.0, True):
        with pytest.raises(ValueError, match=r"rank: expected .* min\(m, n\) = 3"):
            truncated_svd(of((5, 3)), rank=rank)


def test_a_wrong_part_is_refused_before_the_weights_are_decomposed(monkeypatch):
    monkeypatch.setattr("fastood.setar.lowrank.tail_basis", lambda w: pytest.fail("too early"))
    for wrong in ({"part": "major"}, {"drop": 1.5}, {"drop": [0.1, 9]}):
        with pytest.raises(ValueError, match="expected"):
            low_rank(of((6, 4)), **wrong)
    with pytest.raises(ValueError, match="rank: expected"):
        truncated_svd(of((6, 4)), rank=5)


def test_names_of_the_package():
    assert set(fastood.setar.__all__) <= set(dir(fastood.setar))
    assert all(getattr(fastood.setar, name) is not None for name in fastood.setar.__all__)
    with pytest.raises(AttributeError, match="no attribute 'high_rank'"):
        fastood.setar.high_rank  # noqa: B018
