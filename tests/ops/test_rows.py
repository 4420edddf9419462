"""Fused row scores: every shape and layout, ties, several at once, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastood
from fastood.ops.requests import Kind, Request
from fastood.ops.rows import similarity_statistics
from fastood.scores import ClassBank
from fastood.scores.compute import score_rows
from tests import tolerances
from tests.conftest import clip_like
from tests.ops.rows import cosines, every_request, name_of, relative, scores

SIZES = [1, 2, 3, 4, 5, 31, 32, 33, 63, 65, 255, 257, 1023, 1024, 1025, 1057, 2049]


def reference(requests, **inputs):
    inputs = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    return scores(requests, impl="reference", **inputs)


def assert_close(requests, got, want, *, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=1e-7):
    for request, mine, true in zip(requests, got, want, strict=True):
        # a margin is a difference of cosines, or of probabilities that err by their error / tau
        loose = 2e-5 if request.kind == Kind.MARGIN else atol
        torch.testing.assert_close(
            mine.double(),
            true.double(),
            rtol=rtol,
            atol=loose,
            msg=lambda m, r=request: f"{r}: {m}",
        )


@pytest.mark.parametrize("k", SIZES)
def test_every_number_of_classes(instruction_set, k):
    image, text, _ = clip_like(17, k, 40, seed=k)
    requests = every_request(k, 0.01) + every_request(k, 1.0, reset=0.1)
    got = scores(requests, image=image, text=text)
    assert got.shape == (len(requests), 17) and got.dtype == torch.float32
    assert_close(requests, got, reference(requests, image=image, text=text))


@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 31, 33, 127, 129, 255, 257, 1030])
@pytest.mark.parametrize("b", [1, 3, 14, 29])
def test_every_width_and_batch(instruction_set, d, b):
    g = torch.Generator().manual_seed(d)
    image, text = torch.randn(b, d, generator=g), torch.randn(45, d, generator=g)
    requests = every_request(45, 0.1)
    got = scores(requests, image=image, text=text)
    assert_close(requests, got, reference(requests, image=image, text=text), atol=1e-5)


@pytest.mark.parametrize("b", [1, 13, 28, 29, 57, 112, 113, 128, 129, 260])
def test_blocks_of_rows(instruction_set, b):
    image, text, _ = clip_like(260, 300, 24)
    requests = every_request(300, 0.05)
    whole = scores(requests, image=image, text=text)
    assert torch.equal(scores(requests, image=image[:b], text=text), whole[:, :b])


def test_twenty_thousand_classes(instruction_set):
    s = cosines(6, 20_000)
    requests = every_request(20_000, 0.01, c=40)
    assert_close(
        requests, scores(requests, similarity=s), reference(requests, similarity=s), rtol=1e-5
    )


@pytest.mark.parametrize("k", [1, 2, 5, 17, 33, 64, 1057, 2000])
def test_reset_of_any_number_of_classes(instruction_set, k):
    s = cosines(5, k, seed=k)
    for c in sorted({1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, k - 1, k} & set(range(1, k + 1))):
        requests = tuple(
            Request(Kind.DELTA_ENERGY, tau, c, 0.05, joint)
            for tau in (0.01, 1.0)
            for joint in (False, True)
        )
        want = reference(
            [r._replace(reset=float(torch.tensor(0.05))) for r in requests], similarity=s
        )
        assert_close(requests, scores(requests, similarity=s), want, rtol=tolerances.SCORE_RTOL)


def test_no_images(instruction_set):
    image, text, _ = clip_like(3, 5)
    requests = every_request(5, 0.01)
    for inputs in (
        {"image": image[:0], "text": text},
        {"image": image[:0], "text": ClassBank(text)},
        {"similarity": torch.zeros(0, 5)},
    ):
        found = score_rows(
            requests,
            *(inputs.get(n) for n in ("image", "text", "similarity")),
            impl="cpu",
            classes=True,
        )
        assert found.values.shape == (len(requests), 0) and found.classes.shape == (0,)
    z = image[:0].clone().requires_grad_()
    t = text.clone().requires_grad_()
    scores(requests, image=z, text=t).sum().backward()
    assert z.grad.shape == (0, 64) and not t.grad.any()
    assert fastood.l_mcm(torch.zeros(0, 3, 64), text, impl="cpu").shape == (0,)


# ------------------------------------------------------------------------------ ties


def tied(b, k, levels=4):
    g = torch.Generator().manual_seed(k)
    s = (torch.randint(0, levels, (b, k), generator=g).float() - 1) * 0.125
    return torch.where(torch.rand(b, k, generator=g) < 0.5, s, -(-s + 0.0))  # zeros of both signs


@pytest.mark.parametrize("k", [1, 2, 7, 33, 64, 100, 1025, 2100])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_equal_similarities_come_in_order_of_their_index(instruction_set, k, levels):
    s = tied(9, k, levels)
    s[0] = 0.0
    s[0, ::2] = -0.0
    order = s.double().sort(dim=1, descending=True, stable=True).indices
    for c in sorted({1, 2, 5, 17, k} & set(range(1, k + 1))):
        found = similarity_statistics(s, taus=[0.1], c=c)
        assert torch.equal(found.classes, order[:, :c])
        assert torch.equal(found.values, s.gather(1, order[:, :c]))
    requests = every_request(k, 0.1)
    assert_close(
        requests,
        scores(requests, similarity=s),
        reference(requests, similarity=s),
        rtol=tolerances.SCORE_RTOL,
    )


def test_duplicated_classes_and_images(instruction_set):
    image, text, _ = clip_like(30, 40, 24)
    text = text[torch.arange(40) % 7]
    found = score_rows((Request(Kind.MAX_SIMILARITY),), image, text, None, impl="cpu", classes=True)
    assert (found.classes < 7).all()
    requests = every_request(40, 0.01)
    assert_close(
        requests,
        scores(requests, image=image, text=text),
        reference(requests, image=image, text=text),
    )
    same = image[:1].expand(30, -1)
    got = scores(requests, image=same, text=text)
    assert torch.equal(got, got[:, :1].expand(-1, 30))


# ------------------------------------------------------------------------------ metamorphic


def test_order_of_classes(instruction_set):
    s = cosines(40, 333)
    order = torch.randperm(333, generator=torch.Generator().manual_seed(1))
    requests = every_request(333, 0.01) + every_request(333, 1.0)
    whole = scores(requests, similarity=s)
    assert_close(requests, scores(requests, similarity=s[:, order]), whole, rtol=2e-6, atol=0)


def test_a_class_far_away_changes_nothing(instruction_set):
    s = cosines(40, 100)
    requests = tuple(
        r for r in every_request(100, 0.01) if r.kind not in (Kind.NEG_ENTROPY, Kind.VARIANCE)
    )
    more = torch.cat([s, torch.full((40, 1), -9.0)], dim=1)
    assert_close(
        requests,
        scores(requests, similarity=more),
        scores(requests, similarity=s),
        rtol=1e-6,
        atol=0,
    )


def test_scaling_similarities_with_tau(instruction_set):
    s = cosines(40, 100)
    for factor in (0.25, 4.0):
        for kind in (Kind.MAX_SOFTMAX, Kind.NEG_ENTROPY, Kind.VARIANCE, Kind.DELTA_ENERGY):
            one = scores((Request(kind, 0.01),), similarity=s)
            other = scores((Request(kind, 0.01 * factor),), similarity=s * factor)
            torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_views(instruction_set, dtype):
    image, text, _ = clip_like(40, 50, 40)
    image, text = image.to(dtype), text.to(dtype)
    s = cosines(40, 50).to(dtype)
    requests = every_request(50, 0.01)

    def layouts(x):
        columns = x.shape[1]
        yield torch.stack([x, -x], dim=1)[:, 0]
        yield torch.stack([x, -x], dim=2)[..., 0]
        yield x.T.contiguous().T
        yield torch.cat([x, x], dim=1)[:, :columns]
        yield torch.cat([x[:1], x])[1:]
        yield torch._neg_view(-x)

    want = scores(requests, image=image, text=text)
    for z in layouts(image):
        assert torch.equal(scores(requests, image=z, text=text), want)
    for t in layouts(text):  # whose norms torch takes, in an order that depends on strides
        assert_close(requests, scores(requests, image=image, text=t), want, rtol=1e-5)
    want = scores(requests, similarity=s)
    assert torch.equal(want, scores(requests, similarity=s.float()))
    for x in layouts(s):
        assert torch.equal(scores(requests, similarity=x), want)
    for expanded in (s[:1].expand(7, -1), s[:, :1].expand(-1, 50), s[:1, :1].expand(7, 50)):
        assert torch.equal(
            scores(requests, similarity=expanded),
            scores(requests, similarity=expanded.contiguous()),
        )


def test_what_the_caller_does_with_gradients(instruction_set):
    image, text, _ = clip_like(9, 20)
    requests = every_request(20, 0.01)
    want = scores(requests, image=image, text=text)
    z = image.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(scores(requests, image=z, text=text), want)
        assert torch.equal(scores(requests, image=(2 * z) / 2, text=text), want)
    with torch.inference_mode():
        got = scores(requests, image=z, text=text)
        assert torch.equal(got, want) and not got.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(requests, image=image, text=text), want)
        grown = scores(requests, image=z, text=text)
    assert_close(requests, grown.detach(), want, rtol=1e-5)
    grown.sum().backward()
    (again,) = torch.autograd.grad(
        scores(requests, image=(3 * z)[1:], text=text).sum() + 0 * z.sum(), z
    )
    assert torch.isfinite(again).all() and not again[0].any()


def test_the_arguments_are_left_alone(instruction_set):
    image, text, _ = clip_like(20, 40)
    s = cosines(20, 40)
    copies = image.clone(), text.clone(), s.clone()
    requests = every_request(40, 0.01)
    scores(requests, image=image, text=text)
    scores(requests, similarity=s)
    for x, copy in zip((image, text, s), copies, strict=True):
        assert torch.equal(x, copy)


# ------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("gradient", [False, True])
def test_several_hundred_requests_at_once(kernels, gradient):
    s = cosines(12, 60).requires_grad_(gradient)
    requests = tuple(
        r for i in range(40) for r in every_request(60, 0.01 * 1.2**i, c=1 + i % 9, reset=0.01 * i)
    )
    assert len(requests) > 300 and len({r.tau for r in requests}) > 16
    together = scores(requests, similarity=s)
    want = reference(
        [r._replace(reset=float(torch.tensor(r.reset))) for r in requests], similarity=s.detach()
    )
    assert_close(requests, together.detach(), want, rtol=1e-3)
    if gradient:
        together.sum().backward()
        assert torch.isfinite(s.grad).all()


# ------------------------------------------------------------------------------ beyond 2^31


@pytest.mark.slow
def test_more_than_two_to_the_31_similarities(kernels):
    b, k = 70_000, 32_000  # 2.2e9
    row = torch.linspace(0, 0.3, k).half()
    got = scores((Request(Kind.MAX_SOFTMAX, 0.01),), similarity=row.expand(b, k))
    assert torch.equal(got, got[:, :1].expand(-1, b))
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(b, 1, generator=g), torch.randn(k, 1, generator=g)
    got = scores((Request(Kind.MAX_SIMILARITY),), image=image, text=text)
    torch.testing.assert_close(got, torch.ones(1, b))  # of either sign there is a class


# ------------------------------------------------------------------------------ refusals


def both(call):
    """What each implementation raises, as text; None if nothing."""
    found = []
    for impl in ("reference", "cpu"):
        try:
            call(impl)
            found.append(None)
        except (ValueError, TypeError, IndexError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


IMAGE, TEXT, _ = clip_like(6, 7, 8)
LOCAL = clip_like(18, 7, 8, seed=4)[0].view(6, 3, 8)


def spoiled(x, value, *rows):
    x = x.clone()
    for row in rows:
        x[row] = value
    return x


NAN, INF = float("nan"), float("inf")
BAD_ROWS = [(v, rows) for v in (NAN, INF, -INF, 0.0) for rows in ((3,), (0, 5), (0, 1, 2, 3, 4, 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("value", "rows"), BAD_ROWS)
def test_bad_rows_get_the_words_of_the_reference(kernels, dtype, value, rows):
    image, text = IMAGE.to(dtype), TEXT.to(dtype)
    bad, bad_text = spoiled(image, value, *rows), spoiled(text, value, *rows)
    one = spoiled(image, value)
    one[rows, 2] = value if value != 0 else 1.0
    bank = ClassBank(text)
    bad_local = LOCAL.to(dtype).clone()
    for row in rows:
        bad_local[row, row % 3] = value
    each = text.expand(6, -1, -1)
    bad_each = spoiled(each, value, *rows)
    s = spoiled(IMAGE @ TEXT.mT, value, *rows).to(dtype)
    calls = [
        lambda i: fastood.mcm(bad, text, impl=i),
        lambda i: fastood.mcm(one, text, impl=i),
        lambda i: fastood.mcm(bad, bank, impl=i),
        lambda i: fastood.mcm(image, bad_text, impl=i),
        lambda i: fastood.mcm(bad, bad_text, impl=i),
        lambda i: fastood.mcm(bad, text, impl=i, normalize=False),
        lambda i: fastood.mcm(image, bad_text, impl=i, normalize=False),
        lambda i: fastood.mcm(bad, each, impl=i),
        lambda i: fastood.mcm(image, bad_each, impl=i),
        lambda i: fastood.mcm(similarity=s, impl=i),
        lambda i: fastood.mcm(bad.clone().requires_grad_(), text, impl=i),
        lambda i: fastood.mcm(bad.clone().requires_grad_(), bank, impl=i),
        lambda i: fastood.mcm(image, bad_text.clone().requires_grad_(), impl=i),
        lambda i: fastood.mcm(similarity=s.clone().requires_grad_(), impl=i),
        lambda i: fastood.l_mcm(bad_local, text, impl=i),
        lambda i: fastood.l_mcm(bad_local, bank, impl=i),
        lambda i: fastood.l_mcm(LOCAL, bad_text, impl=i),
        lambda i: fastood.l_mcm(bad_local, bad_text, impl=i),
        lambda i: fastood.l_mcm(bad_local, each, impl=i),
        lambda i: fastood.l_mcm(bad_local.clone().requires_grad_(), text, impl=i),
        lambda i: fastood.l_mcm(similarity=bad_local, impl=i),
        lambda i: fastood.gl_mcm(bad, LOCAL, text, impl=i),
        lambda i: fastood.gl_mcm(image, bad_local, text, impl=i),
        lambda i: fastood.score(bad, text, methods=["mcm", "energy"], impl=i),
        lambda i: fastood.score(bad, bank, methods=["mcm", "energy"], rows=2, impl=i),
    ]
    for number, call in enumerate(calls):
        slow, fast = both(call)
        assert fast == slow, number
        if number == 0:
            assert "image: " in fast and ("row 3" if rows == (3,) else "rows, first 0") in fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0])
def test_bad_rows_among_many(instruction_set, dtype, value):
    image, text, _ = clip_like(150, 70, 40, dtype=dtype)
    bad, s = image.clone(), cosines(150, 1100).to(dtype)
    bad[77] = bad[130] = value
    with pytest.raises(ValueError, match=r"image: .* 2 rows, first 77, 130"):
        fastood.mcm(bad, text, impl="cpu")
    assert torch.isfinite(fastood.mcm(image, text, impl="cpu")).all()
    if value != 0:
        s[3, 1099] = s[149, 5] = value
        with pytest.raises(ValueError, match=r"similarity: .* 2 rows, first 3, 149"):
            fastood.mcm(similarity=s, impl="cpu")


@pytest.mark.parametrize(
    "call",
    [
        lambda i: fastood.mcm(IMAGE, TEXT[:, :5], impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT[None], impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT[:0], impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT[:0].expand(6, 0, 8), impl=i),
        lambda i: fastood.mcm(similarity=torch.zeros(3, 0), impl=i),
        lambda i: fastood.mcm(similarity=torch.zeros(3), impl=i),
        lambda i: fastood.mcm(similarity=torch.zeros(3, 2, 2), impl=i),
        lambda i: fastood.mcm(similarity=torch.zeros(3, 2).int(), impl=i),
        lambda i: fastood.mcm(similarity=[[0.1]], impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT, tau=0, impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT, tau=NAN, impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT.to("meta"), impl=i),
        lambda i: fastood.mcm(IMAGE.int(), TEXT, impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT.int(), impl=i),
        lambda i: fastood.mcm(IMAGE.to(torch.complex64), TEXT, impl=i),
        lambda i: fastood.mcm(IMAGE[0], TEXT, impl=i),
        lambda i: fastood.mcm(IMAGE, impl=i),
        lambda i: fastood.mcm(text=TEXT, impl=i),
        lambda i: fastood.mcm(IMAGE, TEXT, similarity=IMAGE @ TEXT.T, impl=i),
        lambda i: fastood.energy(IMAGE, TEXT, scale="log", impl=i),
        lambda i: fastood.margin(IMAGE, TEXT[:1], impl=i),
        lambda i: fastood.margin(similarity=IMAGE[:, :1], tau=1.0, impl=i),
        lambda i: fastood.delta_energy(IMAGE, TEXT, c=0, impl=i),
        lambda i: fastood.delta_energy(IMAGE, TEXT, c=8, impl=i),
        lambda i: fastood.delta_energy(IMAGE, TEXT, c=1.5, impl=i),
        lambda i: fastood.delta_energy(similarity=IMAGE, c=9, impl=i),
        lambda i: fastood.delta_energy(IMAGE, TEXT.expand(6, -1, -1), c=9, impl=i),
        lambda i: fastood.delta_energy(IMAGE, TEXT, reset=INF, impl=i),
        lambda i: fastood.l_mcm(LOCAL[:, :0], TEXT, impl=i),
        lambda i: fastood.l_mcm(LOCAL, TEXT[:0], impl=i),
        lambda i: fastood.l_mcm(LOCAL[0], TEXT, impl=i),
        lambda i: fastood.l_mcm(LOCAL, TEXT[:, :3], impl=i),
        lambda i: fastood.l_mcm(similarity=LOCAL[..., :0], impl=i),
        lambda i: fastood.l_mcm(similarity=LOCAL[0], impl=i),
        lambda i: fastood.gl_mcm(IMAGE, LOCAL[:3], TEXT, impl=i),
    ],
)
def test_bad_input_gets_the_words_of_the_reference(kernels, call):
    slow, fast = both(call)
    assert slow is not None
    assert fast == slow


def test_features_without_width_are_refused(kernels):
    assert None not in both(lambda i: fastood.mcm(IMAGE[:, :0], TEXT[:, :0], impl=i))


def test_features_whose_products_overflow_are_reported(instruction_set):
    """NaN among the similarities once led the search for the largest out of its memory."""
    image, text = clip_like(20, 50, 8)[:2]
    image[7] *= 1e30
    text = text * 1e30
    image.requires_grad_(False)
    for z in (image, image.clone().requires_grad_(), image.bfloat16()):
        slow, fast = both(lambda i, z=z: fastood.mcm(z, text, normalize=False, impl=i))
        assert "similarity: values must be finite, found NaN or Inf in row 7" in fast
        assert fast == slow
    local = image.view(5, 4, 8)
    slow, fast = both(lambda i: fastood.l_mcm(local, text, normalize=False, impl=i))
    assert fast == slow and "row 1" in fast
    assert torch.isfinite(fastood.mcm(image, text, impl="cpu")).all()


# ------------------------------------------------------------------------------ anything at all


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    k=st.integers(1, 140),
    b=st.integers(1, 35),
    seed=st.integers(0, 1000),
    tau=st.sampled_from([1e-3, 0.01, 0.1, 1.0, 10.0]),
    c=st.integers(1, 20),
    reset=st.sampled_from([0.0, 0.2, -0.5, 3.0]),
    spread=st.sampled_from([0.0, 0.01, 0.05, 1.0]),
    rounded=st.booleans(),
)
def test_any_row(kernels, k, b, seed, tau, c, reset, spread, rounded):
    s = 0.2 + spread * torch.randn(b, k, generator=torch.Generator().manual_seed(seed))
    s = (s * 16).round() / 16 if rounded else s
    requests = every_request(k, tau, c=c, reset=reset)
    got = scores(requests, similarity=s)
    want = reference([r._replace(reset=float(torch.tensor(reset))) for r in requests], similarity=s)
    for request, mine, true in zip(requests, got, want, strict=True):
        moments = request.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE)
        atol = 1e-6 / k if moments else 1e-30  # what is left of log K - H, and of p - 1 / K
        error = (mine.double() - true).abs() - atol
        assert (
            relative(error.clamp_min(0), torch.zeros(b)) == 0
            or (error <= tolerances.SCORE_RTOL * true.abs()).all()
        ), name_of(request)
