"""Tiles of cosines against float64: every precision, features of every type, odd sizes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.launch import launch
from fastood.kernels.operands import Operand, prepare, scaled_first
from fastood.kernels.precision import PRECISIONS
from fastood.kernels.products import inverse_norms, tile
from tests import tolerances
from tests.conftest import clip_like

# half a unit in the last place of a factor
ROUNDING = {
    "fp16": 2**-11,
    "bf16": 2**-8,
    "tf32": 2**-11,
    "fp16x3": 2**-22,
    "fp32": 2**-24,
}


@triton.jit
def _cosines(
    x,
    stride,
    high,
    low,
    out,
    norms,
    B,
    K,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    classes = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.minimum(own, B - 1)
    inverse = tl.full((BB,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = inverse_norms(x, stride, rows, D, BD)
    columns = tl.minimum(classes, K - 1)
    s = tile(x, stride, rows, inverse, high, low, columns, D, BD, MODE, FIRST)
    to = out + own[:, None] * K + classes[None, :]
    tl.store(to, s, mask=(own < B)[:, None] & (classes < K)[None, :])
    tl.store(norms + own, inverse, mask=own < B)


def cosines(
    image: Tensor, text: Operand, *, normalize: bool = True, first: bool | None = None, depth=32
) -> tuple[Tensor, Tensor]:
    """(B, K) products and (B,) inverse norms by one kernel of small tiles."""
    (b, d), k = image.shape, len(text.high)
    out = torch.full((b, k), 77.0, device=image.device)
    norms = torch.full((b,), 77.0, device=image.device)
    launch(
        _cosines,
        (triton.cdiv(b, 16), triton.cdiv(k, 32)),
        image,
        image.stride(0),
        text.high,
        text.high if text.low is None else text.low,
        out,
        norms,
        b,
        k,
        D=d,
        MODE=text.precision,
        FIRST=scaled_first(image, text.precision) if first is None else first,
        NORMALIZE=normalize,
        BB=16,
        BN=32,
        BD=depth,
        device=image.device,
        num_warps=4,
    )
    return out.cpu(), norms.cpu()


def unit(x: Tensor) -> Tensor:
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True)


def value(operand: Operand) -> Tensor:
    whole = operand.high.double()
    if operand.low is not None:
        whole = whole + operand.low.double() / 2048
    return whole.cpu()


SIZES = [(1, 1, 16), (5, 19, 33), (16, 32, 64), (17, 33, 47), (21, 70, 80), (3, 40, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cosines_of_any_size(precision, dtype, device):
    for b, k, d in SIZES:
        image, text, _ = clip_like(b, k, d, dtype=dtype)
        found, norms = cosines(
            image.to(device), prepare(text.to(device), precision, normalize=True)
        )
        exact = unit(image) @ unit(text).T
        # |Σ ab| of unit rows is at most 1, both factors are rounded, sums are float32
        bound = 2 * ROUNDING[precision] + tolerances.TRITON_COSINE_ATOL
        assert (found - exact).abs().max() <= bound, (b, k, d)
        torch.testing.assert_close(
            norms.double(),
            1 / image.double().norm(dim=-1),
            rtol=tolerances.TRITON_NORM_RTOL,
            atol=0,
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_but_the_factors_is_rounded(precision, device):
    image, text, _ = clip_like(18, 37, 300)
    image, text = image.to(device), text.to(device)
    operand = prepare(text, precision, normalize=True)
    found, _ = cosines(image, operand)
    rounded = value(prepare(image, precision, normalize=True))
    exact = rounded @ value(operand).T
    assert (found - exact).abs().max() <= tolerances.TRITON_COSINE_ATOL


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp16x3", torch.float16)],
)
def test_features_of_the_products_type_are_not_rounded_at_all(precision, dtype, device):
    image, text, _ = clip_like(18, 37, 64, dtype=dtype)
    operand = prepare(text.to(device), precision, normalize=True)
    assert not scaled_first(image, precision)
    found, _ = cosines(image.to(device), operand)
    exact = unit(image) @ value(operand).T
    assert (found - exact).abs().max() <= tolerances.TRITON_COSINE_ATOL


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scaling_before_or_after_the_sum_is_the_same_cosine(precision, device):
    image, text, _ = clip_like(18, 37, 64)
    image = image / 8  # such that squares fit float16
    operand = prepare(text.to(device), precision, normalize=True)
    before, _ = cosines(image.to(device), operand, first=True)
    after, _ = cosines(image.to(device), operand, first=False)
    bound = 2 * ROUNDING[precision] + 2 * tolerances.TRITON_COSINE_ATOL
    assert (before - after).abs().max() <= bound


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_are_unit_already(precision, device):
    image, text, _ = clip_like(18, 37, 64)
    image, text = unit(image).float(), unit(text).float()
    operand = prepare(text.to(device), precision, normalize=False)
    found, _ = cosines(image.to(device), operand, normalize=False, first=False)
    exact = image.double() @ text.double().T
    bound = 2 * ROUNDING[precision] + tolerances.TRITON_COSINE_ATOL
    assert (found - exact).abs().max() <= bound


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_images_whose_squares_leave_float32(scale, precision, device):
    image, text, _ = clip_like(9, 12, 40)
    image[::2] *= scale
    found, norms = cosines(image.to(device), prepare(text.to(device), precision, normalize=True))
    bound = 2 * ROUNDING[precision] + tolerances.TRITON_COSINE_ATOL
    assert (found - unit(image) @ unit(text).T).abs().max() <= bound
    torch.testing.assert_close(
        norms.double(), 1 / image.double().norm(dim=-1), rtol=tolerances.TRITON_NORM_RTOL, atol=0
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bad_rows_and_classes_spoil_only_themselves(precision, device):
    image, text, _ = clip_like(9, 12, 40)
    operand = prepare(text.to(device), precision, normalize=True)
    good, _ = cosines(image.to(device), operand)
    image[2] = 0
    image[4, 1] = float("nan")
    image[7, 39] = float("-inf")
    text[5, 3] = float("nan")
    text[8] = 0
    found, _ = cosines(image.to(device), prepare(text.to(device), precision, normalize=True))
    assert found[[2, 4, 7]].isnan().all()
    assert found[:, [5, 8]].isnan().all()
    rows = torch.tensor([0, 1, 3, 5, 6, 8])[:, None]
    columns = torch.tensor([0, 1, 2, 3, 4, 6, 7, 9, 10, 11])
    assert torch.equal(found[rows, columns], good[rows, columns])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_apart_in_memory_and_depths_that_do_not_divide(precision, device):
    image, text, _ = clip_like(18, 20, 48)
    wide = torch.full((18, 61), float("nan"))
    wide[:, 3:51] = image
    view = wide.to(device)[:, 3:51]
    operand = prepare(text.to(device), precision, normalize=True)
    found, _ = cosines(view, operand)
    # compiled for other alignments the squares of a norm are added in another order
    bound = 2 * ROUNDING[precision] + 2 * tolerances.TRITON_COSINE_ATOL
    assert (found - cosines(image.to(device), operand)[0]).abs().max() <= bound
    other, _ = cosines(view, operand, depth=64)
    assert (found - other).abs().max() <= 2 * tolerances.TRITON_COSINE_ATOL


def test_fp16x3_is_of_float32_grade_and_fp16_is_not(device):
    image, text, _ = clip_like(40, 60, 300)
    exact = unit(image) @ unit(text).T

    def error(precision):
        operand = prepare(text.to(device), precision, normalize=True)
        return (cosines(image.to(device), operand)[0] - exact).abs().max().item()

    assert error("fp16x3") <= 2 * error("fp32")
    assert error("fp16") > 100 * error("fp16x3")
    assert error("tf32") > 100 * error("fp16x3")
