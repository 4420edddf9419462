"""LoCoOp's patch term by the Triton kernels against float64: value, ranks, gradients, bad input."""

from __future__ import annotations

import pytest
import torch

from fastood.kernels import locoop, locoop_gradient
from fastood.kernels.configs import Config
from fastood.kernels.locoop import patch_entropy
from fastood.kernels.precision import PRECISIONS
from fastood.ops import patches as operators
from tests import tolerances
from tests.conftest import clip_like
from tests.kernels.test_rows import as_multiplied

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=[1, 2], ids=["whole", "split"])
def splits(request, monkeypatch) -> int:
    """Classes in the hands of one program or shared by two."""
    config = Config(32, 32, 64, 4, 2, splits=request.param)
    monkeypatch.setattr(locoop, "pick", lambda *_, **__: config)
    return request.param


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def features(b, p, k, d, seed=0):
    local, text, labels = clip_like(b * (p + 1), k, d, seed=seed)
    local = local.view(b, p + 1, d)[:, 1:].contiguous()
    return local, unit(text.double()).float(), labels[:: p + 1].contiguous()


def exact(local, text, labels, top_k, tau, normalize):
    """The operator in plain torch, in float64."""
    return operators._patch_entropy(
        local.double(), text.double(), labels, top_k, tau, normalize, True, True
    )


def run(
    local, text, labels, top_k, tau, device, *, normalize=False, gradients=True, precision=None
):
    on = [x.to(device) for x in (local, text, labels)]
    found = patch_entropy(*on, top_k, tau, normalize, gradients, gradients, precision)
    return [x.cpu() for x in found]


def assert_same(found, want, grade=1.0):
    """Value, ranks and gradients; ``grade``: what a precision errs more than float32."""
    value, rank, d_text, d_local = found
    assert (value.dtype, rank.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(value.double(), want[0], rtol=2e-6 * grade, atol=1e-6 * grade)
    assert torch.equal(rank, want[1])
    for mine, true, rtol in (
        (d_text, want[2], tolerances.GRADIENT_RTOL),
        (d_local, want[3], tolerances.PATCH_GRADIENT_RTOL),
    ):
        assert mine.dtype == torch.float32
        atol = grade * rtol * float(true.abs().max()) + 1e-7
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


# (B, P, K, D, top_k): images across tiles, K beside a tile, one patch, the smallest, every patch
SHAPES = [
    (3, 19, 70, 48, 25),
    (5, 7, 33, 17, 10),
    (9, 1, 20, 8, 5),
    (1, 1, 2, 3, 1),
    (2, 9, 31, 8, 1),
]


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_rank_and_gradients(device, splits, shape, tau):
    *sizes, top_k = shape
    local, text, labels = features(*sizes)
    want = exact(local, text, labels, top_k, tau, True)
    assert_same(run(local, text, labels, top_k, tau, device, normalize=True), want)


def test_some_patches_count_and_some_do_not():
    """The first shape would show little if every patch counted, or none."""
    local, text, labels = features(3, 19, 70, 48)
    rank = exact(local, text, labels, 25, 0.01, True)[1]
    assert 0.2 < float((rank >= 25).float().mean()) < 0.9


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(device, splits, precision):
    """Of features that need no rounding only the weights of the gradients are rounded."""
    local, text, labels = features(2, 10, 40, 24)
    local, text = (as_multiplied(unit(x), precision).float() for x in (local, text))
    want = exact(local, text, labels, 12, 0.1, False)
    for x in (local, local.to(HALVES.get(precision, torch.float32))):
        value, rank, *found = run(x, text, labels, 12, 0.1, device, precision=precision)
        torch.testing.assert_close(value.double(), want[0], rtol=2e-6, atol=1e-6)
        assert torch.equal(rank, want[1])
        bits = {"fp16": 11, "bf16": 8, "tf32": 11}.get(precision)
        for mine, true in zip(found, want[2:], strict=True):
            rtol = tolerances.PATCH_GRADIENT_RTOL if bits is None else 2.0 ** (2 - bits)
            atol = rtol * float(true.abs().max())
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


def test_in_chunks(device, splits, monkeypatch):
    """Several chunks of patches: the classes' gradient adds up, the patches' are put together."""
    local, text, labels = features(3, 19, 70, 24)
    want = exact(local, text, labels, 25, 0.1, True)
    monkeypatch.setattr(locoop_gradient, "_SCRATCH", 1)
    assert_same(run(local, text, labels, 25, 0.1, device, normalize=True), want)


def test_no_patch_counts(device, splits):
    local, text, labels = features(2, 5, 40, 8)
    value, rank, d_text, d_local = run(local, text, labels, 40, 0.1, device, normalize=True)
    assert value == 0 and int(rank.max()) < 40
    assert not d_text.any() and not d_local.any()
    assert d_text.shape == text.shape and d_local.shape == local.shape


def test_no_images(device, splits):
    local, text, labels = features(2, 5, 7, 8)
    value, rank, d_text, d_local = run(local[:0], text, labels[:0], 3, 0.1, device)
    assert value == 0 and rank.shape == (0, 5) and d_local.shape == (0, 5, 8)
    assert d_text.shape == (7, 8) and not d_text.any()


def test_gradients_only_where_asked(device):
    local, text, labels = features(2, 5, 7, 8)
    both = run(local, text, labels, 3, 0.1, device)
    for of_text, of_local in ((False, False), (True, False), (False, True)):
        on = [x.to(device) for x in (local, text, labels)]
        found = patch_entropy(*on, 3, 0.1, False, of_text, of_local, None)
        for got, want, asked in zip(found, both, (True, True, of_text, of_local), strict=True):
            assert torch.equal(got.cpu(), want) if asked else got.shape == (0,)


def test_equal_classes_are_not_above(device, splits):
    """A class that is the label's row again, in another tile or another split, ties with it."""
    local, text, _ = features(3, 9, 16, 24)
    text = text.repeat(5, 1)
    labels = torch.tensor([1, 37, 79])
    rank = run(local, text, labels, 20, 0.01, device, normalize=True)[1]
    s = unit(local.double()) @ text[:16].double().mT
    own = s.gather(-1, (labels % 16)[:, None, None].expand(-1, 9, 1))
    assert torch.equal(rank, 5 * (s > own).sum(dim=-1).int())


def test_strides(device, splits):
    local, text, labels = features(3, 8, 20, 16)
    want = run(local, text, labels, 7, 0.1, device)
    beside = torch.cat([local, -local], dim=-1)[..., :16]
    among = torch.cat([local, -local], dim=1)[:, :8]
    apart = torch.stack([local, -local], dim=-1)[..., 0]
    for x in (beside, among, apart):
        for one, other in zip(run(x, text, labels, 7, 0.1, device), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALVES.values())
def test_half_precision_patches_at_float32_grade(device, splits, dtype):
    local, text, labels = features(2, 9, 33, 16)
    local = local.to(dtype)
    want = exact(local, text, labels, 12, 0.1, True)
    assert_same(run(local, text, labels, 12, 0.1, device, normalize=True), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_bad_patches_make_it_nan(device, splits, bad):
    local, text, labels = features(3, 5, 40, 8)
    local[1, 2] = bad
    for top_k in (1, 40):  # also if it does not count
        value, _, d_text, d_local = run(local, text, labels, top_k, 0.1, device, normalize=True)
        assert value.isnan() and d_text.isnan().all() and d_local[1, 2].isnan().all()


@pytest.mark.parametrize("label", [-1, 40, 1 << 40])
def test_labels_that_are_no_class_make_it_nan(device, splits, label):
    local, text, labels = features(3, 5, 40, 8)
    labels[1] = label
    assert run(local, text, labels, 12, 0.1, device, normalize=True)[0].isnan()


def test_the_same_bits_again(device, splits):
    local, text, labels = features(3, 9, 40, 16)
    one, other = (run(local, text, labels, 12, 0.1, device, normalize=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
