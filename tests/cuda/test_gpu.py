"""The CUDA kernels on a GPU, against float64 definitions. Skipped where there is none."""

from __future__ import annotations

import threading

import pytest
import torch

from fastood.ops import cuda, lowrank
from fastood.ops.lowrank import drop_tails, tail_basis
from fastood.ops.requests import Kind, Request
from fastood.ops.rows import statistics_of
from tests import tolerances
from tests.cuda.test_emulated import assert_scores
from tests.ops.rows import cosines, every_request
from tests.ops.test_lowrank import error, weights, without

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [  # a warp a row, a block a row, parts of a row; edges of each
    (1, 1), (7, 2), (5, 33), (130, 512), (9, 513), (1024, 1000), (40_000, 70), (2500, 4096),
    (3, 8193), (1, 11_000), (300, 11_000), (2, 200_000), (1, 131_073),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_every_score(shape, tau):
    b, k = shape
    x = cosines(min(b, 16), k, seed=k)
    x = x.repeat(-(-b // len(x)), 1)[:b]
    requests = every_request(k, tau)
    got, classes = cuda.similarity_scores(requests, x.cuda(), classes=True)
    assert got.dtype == torch.float32 and got.shape == (len(requests), b)
    first = min(b, 16)  # the rest repeats them
    assert_scores(got[:, :first].cpu(), requests, x[:first])
    for i in range(0, b, first):
        part = got[:, i : i + first]
        assert torch.equal(part, got[:, : part.shape[1]])
    assert torch.equal(classes.cpu(), x.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 2, 3, 4, 8, 15, 16])
@pytest.mark.parametrize("shape", [(70, 100), (9, 1500), (2, 40_000)], ids=str)
def test_statistics(dtype, c, shape):
    x = cosines(*shape, seed=c).to(dtype)
    x[1, 5] = x[1, -3] = x[1].max()  # ties
    taus = (0.01, 0.3, 1.0)
    want = statistics_of(x.double(), taus, c, True)
    got = cuda.similarity_statistics(x.cuda(), taus=taus, c=c, moments=True)
    assert torch.equal(got.values.double().cpu(), want[0])
    assert torch.equal(got.classes.cpu(), want[1])
    torch.testing.assert_close(got.rest.cpu(), want[2], rtol=0, atol=tolerances.SCORE_RTOL)
    for mine, true in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(
            mine.double().cpu(), true, rtol=tolerances.SCORE_RTOL, atol=1e-14
        )


@pytest.mark.parametrize("k", [50, 900, 50_000])
def test_what_is_not_finite_is_nan_and_stays_in_its_row(k):
    x = cosines(6, k).cuda()
    requests = every_request(k, 0.1)
    clean, _ = cuda.similarity_scores(requests, x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, -1] = bad
        got, classes = cuda.similarity_scores(requests, spoiled, classes=True)
        assert bool(got[:, 2].isnan().all()) and 0 <= int(classes[2]) < k
        others = [0, 1, 3, 4, 5]
        assert torch.equal(got[:, others], clean[:, others])


def test_strides_offsets_and_expanded_rows():
    whole = torch.full((6, 301), float("nan"), device="cuda")
    x = whole[1:5, 3:300]
    x.copy_(cosines(4, 297))
    requests = every_request(297, 0.1)
    got, _ = cuda.similarity_scores(requests, x)
    assert torch.equal(got, cuda.similarity_scores(requests, x.contiguous())[0])
    columns = x.mT.contiguous().mT
    assert torch.equal(got, cuda.similarity_scores(requests, columns)[0])
    expanded, _ = cuda.similarity_scores(requests, x[:1].expand(9, 297))
    assert torch.equal(expanded, got[:, :1].expand(-1, 9))


def test_no_rows_many_requests_and_many_temperatures():
    empty = torch.zeros(0, 5, device="cuda")
    got, classes = cuda.similarity_scores(every_request(5, 0.1), empty, classes=True)
    assert got.shape[1] == 0 and len(classes) == 0
    x = cosines(5, 90)
    requests = tuple(
        Request(Kind.DELTA_ENERGY, 0.1, 1 + i % 3, 0.01 * i) for i in range(70)
    )  # three launches
    assert_scores(cuda.similarity_scores(requests, x.cuda())[0].cpu(), requests, x)
    taus = tuple(0.01 * 1.5**i for i in range(16))
    got = cuda.similarity_statistics(x.cuda(), taus=taus, c=2)
    want = statistics_of(x.double(), taus, 2, False)
    torch.testing.assert_close(got.rest.cpu(), want[2], rtol=0, atol=tolerances.SCORE_RTOL)
    with pytest.raises(ValueError, match="at most 16 temperatures"):
        cuda.similarity_statistics(x.cuda(), taus=(*taus, 1.0))
    with pytest.raises(ValueError, match="c: expected 1 <= c <= K"):
        cuda.similarity_statistics(x.cuda(), taus=taus, c=91)
    with pytest.raises(ValueError, match="tau"):
        cuda.similarity_statistics(x.cuda(), taus=(0.0,))


def test_rows_whose_offset_exceeds_32_bits():
    """Row 2 starts behind 2^32 elements."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    whole = torch.empty((3, (1 << 31) + 64), dtype=torch.float16, device="cuda")
    x = whole[:, :400]
    x.copy_(cosines(3, 400))
    requests = (Request(Kind.MAX_SOFTMAX, 0.1),)
    got, _ = cuda.similarity_scores(requests, x)
    assert torch.equal(got, cuda.similarity_scores(requests, x.contiguous())[0])


@pytest.mark.parametrize("shape", [(300, 1000), (20, 3000), (2, 60_000)], ids=str)
def test_the_same_bits_every_time_in_graphs_streams_and_threads(shape):
    x = cosines(*shape).cuda()
    requests = every_request(shape[1], 0.05)
    first, _ = cuda.similarity_scores(requests, x)
    for _ in range(5):
        assert torch.equal(first, cuda.similarity_scores(requests, x)[0])

    graph = torch.cuda.CUDAGraph()
    held = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        inside, _ = cuda.similarity_scores(requests, held)
    held.copy_(x)
    graph.replay()
    assert torch.equal(first, inside)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows waits for this, and for nothing else
        late = x * 1
        there, _ = cuda.similarity_scores(requests, late)
    stream.synchronize()
    assert torch.equal(first, there)

    found = []
    thread = threading.Thread(target=lambda: found.append(cuda.similarity_scores(requests, x)[0]))
    thread.start()
    thread.join()
    assert torch.equal(first, found[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    x = cosines(50, 300)
    requests = every_request(300, 0.1)
    here, _ = cuda.similarity_scores(requests, x.to("cuda:0"))
    there, _ = cuda.similarity_scores(requests, x.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and torch.equal(here.cpu(), there.cpu())


def test_nothing_of_the_size_of_the_input_is_allocated():
    x = torch.randn(2000, 3000, device="cuda").clamp(-1, 1)
    requests = every_request(3000, 0.1)
    cuda.similarity_scores(requests, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuda.similarity_scores(requests, x)
    assert torch.cuda.max_memory_allocated() - before < 2**20


# --- low-rank weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["torch", None, "batched"])
@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 24, 40), (4, 300, 128), (12, 512, 256)])
def test_low_rank_weights_agree_with_the_svd(solver, shape):
    w = weights(*shape)
    if solver == "batched" and lowrank._solver_of(torch.device("cuda:0"), demanded=False) is None:
        pytest.skip("this cuSOLVER has no batched solver")
    basis = tail_basis(w.cuda(), solver=solver)
    r = min(shape[1:])
    torch.testing.assert_close(basis.values.cpu(), tail_basis(w).values, rtol=1e-9, atol=1e-12)
    assert basis.vectors.shape == (shape[0], r, r)
    counts = [0, 1, r // 3, r // 2, r]
    for count, got in zip(counts, drop_tails(w.cuda(), basis, counts), strict=True):
        assert error(got.cpu(), without(w, count), w) <= tolerances.LOW_RANK_RTOL


def test_low_rank_weights_whatever_tf32_says():
    w = weights(2, 200, 100)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        (got,) = drop_tails(w.cuda(), tail_basis(w.cuda()), [40])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert error(got.cpu(), without(w, 40), w) <= tolerances.LOW_RANK_RTOL


def test_low_rank_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="weights: values must be finite"):
        tail_basis(torch.full((2, 8, 4), float("nan"), device="cuda"))
