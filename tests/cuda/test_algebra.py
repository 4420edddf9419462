"""The algebra of row states on the host: any order of values and of merges gives one answer."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from fastood.ops.cudalib import Request as Asked
from fastood.ops.requests import Request
from tests import tolerances
from tests.ops.rows import cosines, every_request, exact, name_of, relative

FLOAT, INT, P = ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


@pytest.fixture(scope="module")
def algebra(emulated: ctypes.CDLL) -> ctypes.CDLL:
    emulated.fold.argtypes = (P, P, P, ctypes.c_int64, INT, INT, ctypes.c_double, INT, FLOAT, P)
    emulated.finish.argtypes = (P, P, INT, ctypes.c_int64, ctypes.c_double)
    emulated.finish.restype = ctypes.c_double
    return emulated


def folded(lib, row: Tensor, c: int, tau: float, parts: int, seed: int, centred: bool):
    """The state of a row whose values went to `parts` states at random, merged in any order."""
    g = torch.Generator().manual_seed(seed)
    part = torch.randint(parts, (len(row),), generator=g, dtype=torch.int32)
    order = torch.randperm(parts, generator=g).int()
    state = ctypes.create_string_buffer(lib.state_bytes())
    lib.fold(
        row.data_ptr(), part.data_ptr(), order.data_ptr(), len(row), parts, c, tau, centred,
        float(row.mean()), ctypes.addressof(state),
    )  # fmt: skip
    return state


def finished(lib, state, request: Request, c: int, k: int) -> float:
    asked = Asked(int(request.kind), 0, request.c, int(request.flag), request.reset)
    return lib.finish(ctypes.addressof(state), ctypes.byref(asked), c, k, request.tau)


def tops(state, c: int) -> list[tuple[float, int]]:
    raw = bytes(state)[: 8 * c]
    pairs = [raw[8 * j : 8 * j + 8] for j in range(c)]
    return [(FLOAT.from_buffer_copy(p[:4]).value, INT.from_buffer_copy(p[4:]).value) for p in pairs]


@pytest.mark.parametrize("tau", [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("centred", [False, True])
def test_any_order_gives_every_score(algebra, tau, centred):
    row = cosines(1, 60, seed=4)[0].clone()
    for seed, (c, parts) in enumerate([(3, 1), (3, 7), (4, 20), (16, 5)]):
        state = folded(algebra, row, c, tau, parts, seed, centred)
        for request in every_request(60, tau):
            if request.tau != tau:  # a score that has no temperature
                continue
            got = torch.tensor([finished(algebra, state, request, c, 60)], dtype=torch.float64)
            want = exact(request, row[None])
            # sums that are not centred cannot know what is left of log K at a high temperature
            flat = request.kind.name in ("NEG_ENTROPY", "VARIANCE") and (not centred or tau > 1)
            rtol = 1e-6 if flat else 1e-9
            if not (flat and tau > 1 and not centred):
                assert relative(got, want) < rtol or abs(float(got - want)) < 1e-300, (
                    name_of(request), c, parts, got, want,
                )  # fmt: skip


def test_ties_take_the_lowest_index_in_any_order(algebra):
    row = torch.tensor([0.1, 0.5, 0.5, 0.2, 0.5, -0.0, 0.0])
    for seed in range(20):
        state = folded(algebra, row, 4, 1.0, 1 + seed % 5, seed, False)
        assert [i for _, i in tops(state, 4)] == [1, 2, 4, 3]
    zeros = torch.tensor([-0.0, 0.0, -0.0])
    state = folded(algebra, zeros, 3, 1.0, 3, 1, False)
    assert [i for _, i in tops(state, 3)] == [0, 1, 2]


def test_no_rest_at_all(algebra):
    """c = K: nothing is left of the sums, and every score knows it."""
    row = cosines(1, 5)[0].clone()
    for request in every_request(5, 0.1, c=5):
        if request.tau == 0.1:
            state = folded(algebra, row, 5, 0.1, 2, 3, True)
            got = torch.tensor([finished(algebra, state, request, 5, 5)], dtype=torch.float64)
            assert relative(got, exact(request, row[None])) < 1e-9, name_of(request)


def test_a_rest_far_below_the_top_keeps_its_logarithm(algebra):
    """exp(-2000) is no number, its logarithm is: energy changes of confident rows."""
    row = torch.tensor([0.9, -0.5, -0.7, -0.9])
    request = every_request(4, 1e-3)[7]
    assert request.kind.name == "DELTA_ENERGY"
    state = folded(algebra, row, 1, 1e-3, 3, 0, False)
    got = finished(algebra, state, request, 1, 4)
    assert abs(got / 900.0 - 1) < tolerances.SCORE_RTOL  # reset to 0: the best is still far above
