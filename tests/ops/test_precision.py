"""How close to float64 the fused row scores are, and that they keep images apart."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import fastood
from fastood.ops.requests import Kind, Request
from tests import tolerances
from tests.conftest import clip_like
from tests.ops.rows import cosines, eager, every_request, exact, name_of, relative, scores

TAUS = pytest.mark.parametrize("tau", [0.01, 1.0])


@TAUS
@pytest.mark.parametrize("k", [1, 2, 4, 5, 33, 1000, 1057])
def test_error_is_bounded_and_no_worse_than_eager_float32(instruction_set, k, tau):
    s = cosines(120, k, seed=k)
    requests = every_request(k, tau)
    for request, got in zip(requests, scores(requests, similarity=s), strict=True):
        want = exact(request, s)
        # a margin is a difference of float32 cosines, and one class has no entropy at all
        atol = 1e-7 if request.kind in (Kind.MARGIN, Kind.NEG_ENTROPY, Kind.VARIANCE) else 0.0
        if k > 1:
            assert relative(got, want) <= tolerances.SCORE_RTOL, name_of(request)
        torch.testing.assert_close(got.double(), want, rtol=tolerances.SCORE_RTOL, atol=atol)
        worst = relative(eager(request, s), want) + tolerances.SCORE_BESIDE_EAGER_RTOL
        assert relative(got, want) <= worst or k == 1, name_of(request)


@cache
def distinct_in_float64(request: Request) -> int:
    s = cosines(4000, 1000)
    if request.kind == Kind.DELTA_ENERGY:  # its stable form: the definition takes minutes
        return (
            scores((request,), impl="reference", similarity=s.double())[0].float().unique().numel()
        )
    return exact(request, s).float().unique().numel()


@TAUS
def test_distinct_images_keep_distinct_scores(instruction_set, tau):
    s = cosines(4000, 1000)
    requests = every_request(1000, tau)
    for request, got in zip(requests, scores(requests, similarity=s), strict=True):
        assert got.unique().numel() >= 0.99 * distinct_in_float64(request), name_of(request)


def test_eager_float32_does_not_keep_them_apart():
    """Else the test above would show nothing."""
    s = cosines(4000, 1000)
    request = Request(Kind.DELTA_ENERGY, 1.0)
    assert eager(request, s).unique().numel() < 1000
    assert scores((request,), similarity=s).unique().numel() > 3900


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@TAUS
def test_half_precision_features_keep_images_apart(instruction_set, dtype, tau):
    image, text, _ = clip_like(2000, 500, 512)
    image, text = image.to(dtype), text.to(dtype)
    z = image / image.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    few = (
        {torch.bfloat16: 400, torch.float16: 900}
        if tau < 1
        else {torch.bfloat16: 60, torch.float16: 300}
    )
    assert eager(Request(Kind.MAX_SOFTMAX, tau), z @ t.mT).unique().numel() < few[dtype]
    if tau == 1.0:
        assert eager(Request(Kind.DELTA_ENERGY, tau), z @ t.mT).unique().numel() < 10
    kept = fastood.mcm(image, text, tau=tau, impl="cpu")
    want = scores(
        (Request(Kind.MAX_SOFTMAX, tau),),
        image=image.double(),
        text=text.double(),
        impl="reference",
    )[0]
    assert kept.unique().numel() >= 0.99 * want.float().unique().numel()
    torch.testing.assert_close(
        kept.double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0
    )


@TAUS
@pytest.mark.parametrize("d", [3, 64, 512, 1030])
def test_from_features_no_worse_than_eager_float32(instruction_set, d, tau):
    image, text, _ = clip_like(150, 200, d, seed=d)
    z = image / image.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    s64 = z.double() @ t.double().mT
    requests = every_request(200, tau)
    got = scores(requests, image=z, text=t, normalize=False)
    for request, mine in zip(requests, got, strict=True):
        want = exact(request, s64)
        error = (mine.double() - want).abs()
        beside = (eager(request, z @ t.mT).double() - want).abs()
        # rounded cosines make both err: compare typical rows, not the luckiest
        slack = tolerances.SCORE_RTOL * float(want.abs().mean()) / 10
        assert float(error.mean()) <= 1.5 * float(beside.mean()) + slack, name_of(request)


# ------------------------------------------------------------------------------ the far ends


def test_changes_too_small_for_one_plus_them(instruction_set):
    """ΔE of classes next to their reset, moments of near ties: 1 and these would be 1."""
    s = torch.tensor([[1e-12, 1e-13, 0.0], [1e-18, 0.0, -1e-19], [1e-7, 1e-8, 0.0]])
    for joint in (False, True):
        for c in (1, 2, 3):
            request = Request(Kind.DELTA_ENERGY, 1.0, c, 0.0, joint)
            want = scores((request,), similarity=s.double(), impl="reference")[0]
            assert relative(scores((request,), similarity=s)[0], want) < tolerances.SCORE_RTOL
    for k in (2, 3, 4):
        near = torch.full((3, k), 0.2)
        near[:, 0] += torch.tensor([1e-6, 1e-5, 1e-4])
        for kind in (Kind.VARIANCE, Kind.NEG_ENTROPY):
            want = scores((Request(kind),), similarity=near.double(), impl="reference")[0]
            assert relative(scores((Request(kind),), similarity=near)[0], want) < 1e-3


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 0.1, 10.0, 100.0])
@pytest.mark.parametrize("reset", [0.0, 0.2, -1e4, 1e4])
def test_other_temperatures_and_resets(instruction_set, tau, reset):
    s = cosines(40, 150)
    for request in every_request(150, tau, c=5, reset=reset):
        # at tau = 100 the entropy of what is nearly uniform is the sum of what cancels
        rtol = 1e-3 if request.kind == Kind.NEG_ENTROPY and tau > 1 else tolerances.SCORE_RTOL
        want = scores(
            (request._replace(reset=float(torch.tensor(reset))),),
            similarity=s.double(),
            impl="reference",
        )[0]
        assert relative(scores((request,), similarity=s)[0], want) < rtol, name_of(request)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30, 1e-20])
@pytest.mark.parametrize("tau", [1e-4, 0.01, 1.0, 100.0])
def test_extreme_similarities_stay_finite(instruction_set, scale, tau):
    s = (cosines(20, 70) - 0.2) * scale
    requests = every_request(70, tau)
    found = scores(requests, similarity=s)
    want = scores(requests, similarity=s.double(), impl="reference")
    fits = want.abs() < 3e38
    assert torch.isfinite(found[fits]).all()
    for request, mine, true in zip(requests, found, want, strict=True):
        if request.kind not in (Kind.NEG_ENTROPY, Kind.VARIANCE):
            assert relative(mine[true.abs() < 3e38], true[true.abs() < 3e38]) < 1e-5


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e-41])
def test_rows_of_any_norm(instruction_set, factor):
    image, text, _ = clip_like(20, 33, 48)
    want = fastood.mcm(image, text, tau=0.01, impl="cpu")
    got = fastood.mcm(image * factor, text, tau=0.01, impl="cpu")
    rtol = 2e-2 if factor < 1e-38 else tolerances.SCORE_FROM_FEATURES_RTOL  # subnormals
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.bfloat16, -130), (torch.bfloat16, 100), (torch.float16, -20)]
)
def test_half_precision_subnormals_and_large_values(instruction_set, dtype, exponent):
    """Rows of them have few digits, but they are exact: as good as the same row further up."""
    levels = torch.randint(1, 8, (20, 40), generator=torch.Generator().manual_seed(0)).float()
    image = (levels * 2.0**exponent).to(dtype)
    assert torch.equal(image.double(), levels.double() * 2.0**exponent)
    text = clip_like(1, 33, 40)[1]
    want = scores(
        (Request(Kind.MAX_SOFTMAX, 0.01),),
        image=levels.double(),
        text=text.double(),
        impl="reference",
    )[0]
    got = fastood.mcm(image, text, tau=0.01, impl="cpu")
    torch.testing.assert_close(got.double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0)


def test_unnormalised_features_with_logits_of_ten_thousand(instruction_set):
    g = torch.Generator().manual_seed(0)
    image, text = 100 * torch.randn(30, 64, generator=g), 10 * torch.randn(40, 64, generator=g)
    for tau in (0.1, 1.0):
        requests = every_request(40, tau)
        got = scores(requests, image=image, text=text, normalize=False)
        want = scores(
            requests, image=image.double(), text=text.double(), normalize=False, impl="reference"
        )
        assert want.abs().max() > 1e4
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-2)
