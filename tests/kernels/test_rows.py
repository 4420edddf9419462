"""Global scores of the Triton kernels against float64: arithmetic, precisions, shapes, bad rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastood.kernels import configs, rows
from fastood.kernels.operands import prepare
from fastood.kernels.precision import PRECISIONS
from fastood.ops.requests import Kind, Request
from fastood.ops.rows import statistics_of
from tests import tolerances
from tests.conftest import clip_like
from tests.ops.rows import cosines, eager, every_request, exact, name_of, relative
from tests.scores import oracle


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def large_tiles(monkeypatch):
    """Interpreted, a program costs about the same whatever its size."""
    config = configs.Config(64, 256, 64, 4, 2, splits=2)
    if configs.INTERPRETED:
        monkeypatch.setattr("fastood.kernels.source.pick", lambda *_, **__: config)


def of_features(requests, image, text, precision, *, normalize=True, classes=False):
    operand = prepare(text, precision, normalize=normalize)
    return rows.scores(requests, image, operand, normalize=normalize, classes=classes)


def as_multiplied(x: Tensor, precision: str) -> Tensor:
    """Rows as a precision rounds them, in float64."""
    if precision in HALVES:
        return x.to(HALVES[precision]).double()
    if precision == "tf32":
        bits = x.float().view(torch.int32)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
        return bits.view(torch.float32).double()
    return x.double()


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5, 33, 129])
def test_given_similarities_to_the_last_digits(device, k, tau):
    s = cosines(40, k, seed=k)
    requests = every_request(k, tau)
    found, nearest = rows.similarity_scores(requests, s.to(device), classes=True)
    assert torch.equal(nearest.cpu(), s.argmax(dim=-1))
    for request, got in zip(requests, found.cpu(), strict=True):
        want = exact(request, s)
        atol = 1e-7 if request.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE) and k == 1 else 0.0
        torch.testing.assert_close(
            got.double(), want, rtol=tolerances.SCORE_RTOL, atol=atol, msg=name_of(request)
        )
        if request.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE):  # eager may be lucky with few classes
            continue
        worst = relative(eager(request, s), want) + tolerances.SCORE_BESIDE_EAGER_RTOL
        assert relative(got, want) <= worst or k == 1, name_of(request)


def test_many_classes_keep_images_apart(device, large_tiles):
    s = cosines(192, 1000)
    for tau in (0.01, 1.0):
        requests = every_request(1000, tau)
        found, _ = rows.similarity_scores(requests, s.to(device))
        for request, got in zip(requests, found.cpu(), strict=True):
            want = exact(request, s)
            assert relative(got, want) <= tolerances.SCORE_RTOL, name_of(request)
            assert got.unique().numel() >= 0.99 * want.float().unique().numel(), name_of(request)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_precision_rounds_what_it_multiplies_and_nothing_else(device, dtype, precision):
    """Against float64 products of features rounded as the precision says: all else is exact."""
    image, text, _ = clip_like(37, 70, 80, dtype=dtype)
    t = as_multiplied(unit(text.double()).float(), precision)
    if HALVES.get(precision) == dtype:  # go in as they are
        z = image.double()
        want = (z @ t.mT) / z.norm(dim=-1, keepdim=True)
    else:
        want = as_multiplied(unit(image.double()).float(), precision) @ t.mT
    request = (Request(Kind.MAX_SIMILARITY), Request(Kind.ENERGY, 0.01, flag=True))
    found, _ = of_features(request, image.to(device), text.to(device), precision)
    # a rounding that falls the other way moves a product by one unit of its last place
    step = {"bf16": 2e-4, "fp16": 2e-5, "tf32": 2e-5}.get(precision, 3e-7)
    torch.testing.assert_close(
        found[0].cpu().double(), want.amax(dim=-1), rtol=0, atol=0.02 * step + 2e-7
    )
    energy = torch.logsumexp(want / 0.01, dim=-1)
    torch.testing.assert_close(found[1].cpu().double(), energy, rtol=0, atol=100 * step)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_worse_than_eager_at_the_same_precision(device, precision):
    image, text, _ = clip_like(60, 90, 96)
    dtype = HALVES.get(precision, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    exactly = oracle.cosine(image.double(), text.double())
    z = image / image.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    if precision == "tf32":
        z, t = as_multiplied(z, "tf32").float(), as_multiplied(t, "tf32").float()
    s = (z @ t.mT).float()
    requests = (
        Request(Kind.MAX_SIMILARITY),
        Request(Kind.MAX_SOFTMAX, 0.01),
        Request(Kind.ENERGY, 0.01),
        Request(Kind.DELTA_ENERGY, 0.01, 2),
    )
    found, _ = of_features(requests, image.to(device), text.to(device), precision)
    for request, got in zip(requests, found.cpu(), strict=True):
        want = exact(request, exactly)
        mine = (got.double() - want).abs().max()
        theirs = (eager(request, s).double() - want).abs().max()
        assert mine <= theirs + 3e-5 * want.abs().max(), name_of(request)


@pytest.mark.parametrize(("b", "k", "d"), [(1, 1, 1), (3, 31, 17), (17, 65, 33), (16, 64, 32)])
def test_odd_shapes(device, b, k, d):
    g = torch.Generator().manual_seed(b)
    image, text = torch.randn(b, d, generator=g), torch.randn(k, d, generator=g)
    s = oracle.cosine(image, text)
    requests = every_request(k, 0.1)
    found, nearest = of_features(
        requests, image.to(device), text.to(device), "fp16x3", classes=True
    )
    assert found.shape == (len(requests), b)
    assert torch.equal(nearest.cpu(), s.argmax(dim=-1))
    for request, got in zip(requests, found.cpu(), strict=True):
        torch.testing.assert_close(
            got.double(), exact(request, s), rtol=1e-4, atol=2e-5, msg=name_of(request)
        )


def test_layouts_and_empty_batches(device):
    image, text, _ = clip_like(12, 40, 48)
    requests = (Request(Kind.DELTA_ENERGY, 0.01, 2), Request(Kind.NEG_ENTROPY, 1.0))
    image, text = image.to(device), text.to(device)
    want, _ = of_features(requests, image, text, "fp16x3")
    wide = torch.cat([image, image], dim=1)
    for same in (wide[:, 48:], image.mT.contiguous().mT, torch.cat([image] * 2)[:12]):
        assert torch.equal(of_features(requests, same, text, "fp16x3")[0], want)
    spread = torch.stack([text, text], dim=1)[:, 1]
    assert torch.equal(of_features(requests, image, spread, "fp16x3")[0], want)
    one = of_features(requests, image[:1].expand(5, -1), text, "fp16x3")[0]
    assert torch.equal(one, want[:, :1].expand(-1, 5))
    found, nearest = of_features(requests, image[:0], text, "fp16x3", classes=True)
    assert found.shape == (len(requests), 0) and nearest is not None and nearest.shape == (0,)


def test_features_of_unit_norm_are_taken_as_they_are(device):
    image, text, _ = clip_like(9, 20, 32)
    z, t = unit(image.double()).float(), unit(text.double()).float()
    for precision in PRECISIONS:
        request = (Request(Kind.MAX_SIMILARITY),)
        got, _ = of_features(request, z.to(device), t.to(device), precision, normalize=False)
        rounded = as_multiplied(z, precision) @ as_multiplied(t, precision).mT
        torch.testing.assert_close(got[0].cpu().double(), rounded.amax(dim=-1), rtol=0, atol=3e-7)


def test_norms_that_float32_can_only_just_hold(device):
    image, text, _ = clip_like(6, 20, 32)
    scaled = image * torch.tensor([1e25, 1e-25, 1e18, 1e-18, 1.0, 1e10])[:, None]
    requests = (Request(Kind.MAX_SIMILARITY),)
    for precision in PRECISIONS:
        want, _ = of_features(requests, image.to(device), text.to(device), precision)
        got, _ = of_features(requests, scaled.to(device), text.to(device), precision)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 if precision == "bf16" else 1e-4)


def test_bad_rows_become_nan_and_leave_the_others_alone(device):
    image, text, _ = clip_like(12, 40, 48)
    requests = every_request(40, 0.01)
    want, nearest = of_features(requests, image.to(device), text.to(device), "fp16", classes=True)
    image[2] = 0
    image[5, 7] = math.nan
    image[9, 0] = math.inf
    got, classes = of_features(requests, image.to(device), text.to(device), "fp16", classes=True)
    bad = torch.tensor([2, 5, 9])
    good = torch.tensor([i for i in range(12) if i not in (2, 5, 9)])
    assert bool(got.cpu()[:, bad].isnan().all())
    assert torch.equal(got.cpu()[:, good], want.cpu()[:, good])
    assert torch.equal(classes.cpu()[good], nearest.cpu()[good])
    assert bool(((classes >= 0) & (classes < 40)).all())


@pytest.mark.parametrize("c", [1, 2, 4, 8])
def test_a_bad_class_spoils_every_score(device, c):
    """Whatever is held beside it: maxima ignore NaN, the scores must not."""
    requests = every_request(20, 0.01, c=c)
    for value in (math.nan, math.inf):
        s = cosines(5, 20)
        s[:, 3] = value
        got, _ = rows.similarity_scores(requests, s.to(device))
        assert bool(got.isnan().all()), value


@pytest.mark.parametrize("c", [1, 2, 3, 8])
def test_ties_take_the_lowest_class(device, c):
    s = torch.zeros(4, 50)
    s[0, [7, 20, 40]] = 0.5
    s[1, [33, 34]] = 0.5
    s[2, 49] = 0.5
    found = rows.similarity_statistics(s.to(device), taus=[0.1], c=c, moments=False)
    values, classes = s.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found[0].cpu(), values[:, :c])
    assert torch.equal(found[1].cpu(), classes[:, :c])


def test_of_equal_values_in_several_splits_the_lowest_classes_are_held(device):
    s = torch.full((1, 600), 0.1)
    s[0, 2] = 0.2
    s[0, [1, 500, 502]] = 0.3
    _, classes, *_ = rows.similarity_statistics(s.to(device), taus=(1.0,), c=2, moments=False)
    assert classes.tolist() == [[1, 500]]


@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_given_similarity_that_is_not_finite_makes_its_scores_nan(device, value):
    s = cosines(3, 40)
    s[1, 7] = value
    found, _ = rows.similarity_scores(every_request(40, 1.0), s.to(device))
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(("c", "taus"), [(1, [1.0]), (3, [0.01, 1.0, 0.1]), (8, [0.002])])
@pytest.mark.parametrize("k", [8, 70])
def test_statistics(device, c, taus, k):
    s = cosines(21, k)
    found = rows.similarity_statistics(s.to(device), taus=taus, c=c, moments=True)
    want = statistics_of(s.double(), taus, c, True)
    assert torch.equal(found[1].cpu(), want[1])
    assert found[2].dtype == torch.float64
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(
            got.cpu().double(), expected.double(), rtol=tolerances.SCORE_RTOL, atol=1e-6
        )


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 100.0, 1e6])
def test_confident_and_flat_rows(device, tau):
    """Gaps of thousands of logits, beyond what exp holds, and none at all."""
    s = cosines(20, 90)
    s[:10, 4] = 0.99
    requests = [r for r in every_request(90, tau) if r.kind != Kind.MARGIN]
    if tau > 1:
        # nearly uniform: the definition in float64 leaves no digits of these
        requests = [r for r in requests if r.kind not in (Kind.NEG_ENTROPY, Kind.VARIANCE)]
    found, _ = rows.similarity_scores(tuple(requests), s.to(device))
    for request, got in zip(requests, found.cpu(), strict=True):
        want = exact(request, s)
        torch.testing.assert_close(
            got.double(), want, rtol=tolerances.SCORE_RTOL, atol=1e-37, msg=name_of(request)
        )


def test_logits_of_ten_thousand(device):
    s = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * 1e4
    requests = every_request(40, 1.0)
    found, _ = rows.similarity_scores(requests, s.to(device))
    for request, got in zip(requests, found.cpu(), strict=True):
        torch.testing.assert_close(
            got.double(), exact(request, s), rtol=1e-5, atol=1e-30, msg=name_of(request)
        )


def test_splits_change_nothing_but_the_last_digits(device, monkeypatch):
    image, text, _ = clip_like(20, 110, 32)
    image, text = image.to(device), text.to(device)
    requests = every_request(110, 0.01)
    found = []
    for splits in (1, 3, 7):
        config = configs.Config(32, 16, 32, 4, 2, splits=splits)
        monkeypatch.setattr("fastood.kernels.source.pick", lambda *_, c=config, **__: c)
        found.append(of_features(requests, image, text, "fp16x3")[0])
        again = of_features(requests, image, text, "fp16x3")[0]
        assert torch.equal(found[-1], again)
    for a, b in itertools.pairwise(found):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


class Largest(TorchDispatchMode):
    """The largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_nothing_of_the_size_of_the_similarities(device, large_tiles):
    b, k = 200, 500
    image, text, _ = clip_like(b, k, 16)
    operand = prepare(text.to(device), "fp16", normalize=True)
    image = image.to(device).half()
    requests = (Request(Kind.DELTA_ENERGY, 0.01, 2), Request(Kind.NEG_ENTROPY, 1.0))
    with Largest() as made:
        rows.scores(requests, image, operand, normalize=True, classes=True)
    assert 0 < made.numel < b * k / 2


def test_scores_of_several_passes_find_their_rows(device):
    """More scores than a launch finishes, more temperatures than a pass holds, and entropies."""
    s = cosines(6, 30)
    requests = (Request(Kind.NEG_ENTROPY, 1.0),)
    for i in range(18):
        tau = 0.01 * 1.3**i
        requests += (Request(Kind.ENERGY, tau), Request(Kind.DELTA_ENERGY, tau, 3))
    requests += (Request(Kind.VARIANCE, 0.1), Request(Kind.MAX_SIMILARITY))
    found, nearest = rows.similarity_scores(requests, s.to(device), classes=True)
    assert torch.equal(nearest.cpu(), s.argmax(dim=-1))
    for request, got in zip(requests, found.cpu(), strict=True):
        assert relative(got, exact(request, s)) <= tolerances.SCORE_RTOL, name_of(request)
    only = (Request(Kind.NEG_ENTROPY, 1.0),)
    alone, nearest = rows.similarity_scores(only, s.to(device), classes=True)
    assert torch.equal(alone[0], found[0]) and torch.equal(nearest.cpu(), s.argmax(dim=-1))


def test_more_values_than_a_row_holds_are_refused(device):
    with pytest.raises(ValueError, match="at most 8 values"):
        rows.similarity_statistics(cosines(3, 20).to(device), taus=[1.0], c=9, moments=False)
