"""The row kernels, run on the host thread by thread, against float64 definitions."""

from __future__ import annotations

import pytest
import torch

from fastood.ops.requests import Kind, Request
from fastood.ops.rows import statistics_of
from tests import tolerances
from tests.cuda.emulation import in_parts, scores, statistics
from tests.ops.rows import cosines, every_request, exact, name_of, relative

WIDE = {"threads": 256, "block": 256}
SHAPES = [  # B, K, what is forced of the plan: a warp a row, a block a row, parts of a row
    (5, 1, {}),
    (3, 2, {}),
    (6, 31, {}),
    (5, 100, {}),
    (1, 333, {}),
    (2, 513, {}),
    (2, 3, WIDE | {"grid": 2}),
    (3, 300, WIDE | {"grid": 3}),
    (1, 1500, 5),
    (2, 700, 32),
    (3, 600, 2),
]


def plan(shape: tuple, x: torch.Tensor) -> dict[str, int]:
    forced = shape[2]
    return forced if isinstance(forced, dict) else in_parts(x, forced)


def assert_scores(got, requests, x, rtol=tolerances.SCORE_RTOL):
    for row, request in zip(got, requests, strict=True):
        want = exact(request, x.float())
        flat = request.tau > 10 and request.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE)
        allowed = tolerances.FLAT_MOMENTS_RTOL if flat else rtol
        # below the smallest float32 there is nothing to be right about
        error = (row.double() - want).abs() - 1e-37
        assert bool((error <= allowed * want.abs()).all()), (name_of(request), row, want)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_every_score_of_every_plan(emulated, shape, tau):
    x = cosines(shape[0], shape[1], seed=shape[1])
    requests = every_request(shape[1], tau)
    got, classes = scores(emulated, requests, x, **plan(shape, x))
    assert_scores(got, requests, x)
    assert classes.tolist() == x.argmax(1).tolist()


@pytest.mark.parametrize("tau", [1e-3, 0.07, 100.0])
def test_extreme_temperatures(emulated, tau):
    x = cosines(3, 150, seed=3)
    requests = every_request(150, tau)
    for forced in ({}, in_parts(x, 4)):
        got, _ = scores(emulated, requests, x, **forced)
        assert_scores(got, requests, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 2, 3, 4, 7, 8, 15, 16])
def test_statistics_of_every_list(emulated, dtype, c):
    x = cosines(5, 70, seed=c).to(dtype)
    x[1, 5] = x[1, 60] = x[1].max()  # ties
    x[2] = x[2, 0]
    taus = (0.01, 0.3, 1.0)
    want = statistics_of(x.double(), taus, c, True)
    for forced in ({}, in_parts(x, 3)):
        got = statistics(emulated, x, taus, c, True, **forced)
        assert torch.equal(got.values.double(), want[0]) and torch.equal(got.classes, want[1])
        torch.testing.assert_close(got.rest, want[2], rtol=0, atol=tolerances.SCORE_RTOL)
        # a row of one value has neither; float64 leaves 1e-16 in the reference's too
        for mine, true in zip(got[3:], want[3:], strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=tolerances.SCORE_RTOL, atol=1e-14)


def test_strides_and_many_temperatures(emulated):
    whole = torch.full((4, 90), float("nan"))
    x = whole[1:3, 7:60]
    x.copy_(cosines(2, 53))
    taus = tuple(0.01 * 1.5**i for i in range(16))
    got = statistics(emulated, x, taus, 2, False)
    want = statistics_of(x.double(), taus, 2, False)
    torch.testing.assert_close(got.rest, want[2], rtol=0, atol=tolerances.SCORE_RTOL)
    expanded = x[:1].expand(5, 53)
    values, _ = scores(emulated, (Request(Kind.MAX_SOFTMAX, 0.1),), expanded)
    assert len(set(values[0].tolist())) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_nan_and_stays_in_its_row(emulated, bad):
    x = cosines(6, 90)
    requests = every_request(90, 0.1)
    for forced in ({}, in_parts(x, 4)):
        clean, _ = scores(emulated, requests, x, **forced)
        spoiled = x.clone()
        spoiled[2, 89] = bad
        got, classes = scores(emulated, requests, spoiled, **forced)
        assert bool(got[:, 2].isnan().all()) and 0 <= int(classes[2]) < 90
        others = [0, 1, 3, 4, 5]
        assert torch.equal(got[:, others], clean[:, others])
        found = statistics(emulated, spoiled, (0.1,), 3, True, **forced)
        assert found.classes[2].tolist() == [0, 1, 2]
        assert all(bool(found[i][2].isnan().all()) for i in (0, 2, 3, 4))


def test_large_values_and_confident_rows(emulated):
    x = torch.tensor([[1e4, -1e4, 0, 0], [1e4, 1e4 - 1, 5, -1e4], [3e38, -3e38, 0, 1]])
    requests = (
        Request(Kind.MAX_SOFTMAX, 1.0), Request(Kind.ENERGY, 1.0, flag=True),
        Request(Kind.DELTA_ENERGY, 1.0, 1), Request(Kind.DELTA_ENERGY, 1.0, 2),
    )  # fmt: skip
    for forced in ({}, in_parts(x, 2)):
        got, _ = scores(emulated, requests, x, **forced)
        for row, request in zip(got, requests, strict=True):
            assert relative(row, exact(request, x)) < tolerances.SCORE_RTOL, name_of(request)


def test_the_same_bits_twice_and_whatever_is_asked_with_it(emulated):
    x = cosines(4, 257, seed=9)
    requests = every_request(257, 0.05)
    first, _ = scores(emulated, requests, x)
    again, _ = scores(emulated, requests, x)
    assert torch.equal(first, again)
    for i, request in enumerate(requests):
        if request.kind not in (Kind.NEG_ENTROPY, Kind.VARIANCE):
            alone, _ = scores(emulated, (request,), x)
            near = torch.isclose(alone[0], first[i], rtol=2e-7, atol=0)
            assert bool(near.all()), name_of(request)
    halves = torch.cat([scores(emulated, requests, part)[0] for part in x.split(2)], dim=1)
    assert torch.equal(halves, first)


def test_order_of_classes_does_not_matter(emulated):
    x = cosines(3, 120, seed=2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    requests = every_request(120, 1.0)
    here, classes = scores(emulated, requests, x)
    there, moved = scores(emulated, requests, x[:, order].contiguous())
    torch.testing.assert_close(here, there, rtol=tolerances.SCORE_RTOL, atol=0)
    assert torch.equal(order[moved], classes)


def test_no_rows_is_no_launch(emulated):
    values, classes = scores(emulated, every_request(5, 0.1), torch.zeros(0, 5))
    assert values.shape[1] == 0 and len(classes) == 0
