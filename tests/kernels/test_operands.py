"""Classes as kernels multiply them: against float64, at the ends of the number ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastood.kernels.operands import Operand, prepare, scaled_first
from fastood.kernels.precision import PRECISIONS, check_precision, resolve
from tests import tolerances
from tests.conftest import clip_like

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp16x3": torch.float16,
    "fp32": torch.float32,
}
# half a unit in the last place, relative
ROUNDING = {
    "fp16": 2**-11,
    "bf16": 2**-8,
    "tf32": 2**-11,
    "fp16x3": 2**-22,
    "fp32": 2**-24,
}


def value(operand: Operand) -> Tensor:
    """What an operand stands for, in float64 on the CPU."""
    whole = operand.high.double()
    if operand.low is not None:
        whole = whole + operand.low.double() / 2048
    return whole.cpu()


def unit(x: Tensor) -> Tensor:
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def tf32(x: np.ndarray) -> np.ndarray:
    """To nearest even with 10 bits of mantissa, by arithmetic instead of bits."""
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(np.abs(x).astype(np.float64))
        quantum = np.ldexp(1.0, np.maximum(exponent - 11, -136))
        rounded = (np.rint(x.astype(np.float64) / quantum) * quantum).astype(np.float32)
    return np.where(np.isfinite(x), rounded, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_normalised_rows_are_those_of_float64_rounded_once(precision, dtype, device):
    text = clip_like(1, 41, 300, dtype=dtype)[1].to(device)
    found = prepare(text, precision, normalize=True)
    assert found.precision == precision
    assert found.high.dtype == DTYPES[precision]
    assert found.high.shape == text.shape and found.high.is_contiguous()
    assert (found.low is not None) == (precision == "fp16x3")
    exact = unit(text).cpu()
    bound = (ROUNDING[precision] + tolerances.TRITON_NORM_RTOL) * exact.abs()
    if precision in ("fp16", "fp16x3"):  # subnormal
        bound = bound + (2**-25 if precision == "fp16" else 2**-36)
    assert ((value(found) - exact).abs() <= bound).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_are_unit_already_are_only_rounded(precision, device):
    text = unit(clip_like(1, 23, 70)[1]).float().to(device)
    found = prepare(text, precision, normalize=False)
    exact = text.double().cpu()
    tiny = {"fp16": 2**-25, "fp16x3": 2**-36}.get(precision, 0.0)
    assert ((value(found) - exact).abs() <= ROUNDING[precision] * exact.abs() + tiny).all()
    if precision == "fp32":
        assert torch.equal(found.high, text)
    if precision in ("fp16", "bf16"):
        assert torch.equal(found.high, text.to(found.high.dtype))


def test_two_halves_hold_22_bits_down_to_float16s_smallest(device):
    g = torch.Generator().manual_seed(0)
    exponent = torch.randint(-40, 15, (64, 64), generator=g, dtype=torch.float64)
    sign = torch.randint(0, 2, (64, 64), generator=g) * 2 - 1
    x = (sign * (1 + torch.rand(64, 64, generator=g, dtype=torch.float64)) * 2.0**exponent).float()
    found = prepare(x.to(device), "fp16x3", normalize=False)
    error = (value(found) - x.double()).abs()
    assert (error <= 2**-22 * x.double().abs() + 2**-36).all()
    # a low half that was not scaled would be subnormal from 2^-3 down
    small = (x.abs() < 2**-6) & (x.abs() > 2**-14)
    assert error[small].max() > 0
    assert (error[small] / x[small].double().abs()).max() <= 2**-22


def test_tf32_is_rounded_to_nearest_even(device):
    g = np.random.default_rng(0)
    patterns = g.integers(0, 2**32, size=4000, dtype=np.uint64).astype(np.uint32)
    ties = (patterns[:1000] & ~np.uint32(0x1FFF)) | np.uint32(0x1000)
    around = np.concatenate([ties, ties - np.uint32(1), ties + np.uint32(1)])
    largest = np.array([3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 0.0, -0.0], np.float32)
    other = np.array([np.inf, -np.inf, np.nan, 1.17549435e-38], np.float32)
    x = np.concatenate([patterns.view(np.float32), around.view(np.float32), largest, other])
    x = x[: len(x) // 10 * 10].reshape(10, -1)
    found = prepare(torch.from_numpy(x).to(device), "tf32", normalize=False).high.cpu().numpy()
    np.testing.assert_array_equal(found, tf32(x))
    finite = np.isfinite(found)
    assert (found.view(np.uint32)[finite] & 0x1FFF == 0).all()
    assert (np.isfinite(x) & np.isinf(found)).any(), "nothing rounded up to infinity: no such case?"


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_norms_whose_squares_leave_float32(precision, scale, device):
    text = clip_like(1, 9, 300)[1]
    text[::2] *= scale  # beside ordinary rows in one program
    found = prepare(text.to(device), precision, normalize=True)
    exact = unit(text)
    bound = (ROUNDING[precision] + tolerances.TRITON_NORM_RTOL) * exact.abs() + 2**-25
    assert ((value(found) - exact).abs() <= bound).all()


def test_a_row_with_large_and_small_values(device):
    text = torch.ones(3, 40)
    text[0, 7] = 1e30
    text[1, 7] = 1e-30
    text[2] *= 1e-20
    text[2, 7] = 1e-30
    found = prepare(text.to(device), "fp32", normalize=True)
    torch.testing.assert_close(
        value(found), unit(text), rtol=tolerances.TRITON_NORM_RTOL, atol=2**-126
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_without_a_direction_are_nan_and_leave_others_alone(precision, device):
    text = clip_like(1, 10, 70)[1]
    whole = prepare(text.to(device), precision, normalize=True)
    bad = text.clone()
    bad[2] = 0
    bad[5, 3] = float("inf")
    bad[7, 69] = float("nan")
    found = prepare(bad.to(device), precision, normalize=True)
    assert value(found)[[2, 7]].isnan().all()
    assert value(found)[5].isnan().any()
    good = [0, 1, 3, 4, 6, 8, 9]
    assert torch.equal(found.high[good], whole.high[good])


@pytest.mark.parametrize("precision", ["fp16x3", "fp32"])
def test_strides(precision, device):
    wide = clip_like(1, 30, 90)[1].to(device)
    for view in (wide[:, 3:73], wide[::3], wide.T, wide[5:6].expand(7, -1), wide[:, ::2]):
        found = prepare(view, precision, normalize=True)
        of_copy = prepare(view.contiguous(), precision, normalize=True)
        assert found.high.is_contiguous()
        assert torch.equal(bits(found.high), bits(of_copy.high))
        if found.low is not None:
            assert torch.equal(bits(found.low), bits(of_copy.low))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_neighbours(precision, device):
    text = clip_like(1, 11, 300)[1].to(device)
    text[3] *= 1e20
    whole = prepare(text, precision, normalize=True)
    alone = prepare(text[5:6], precision, normalize=True)
    assert torch.equal(bits(whole.high[5:6]), bits(alone.high))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_rows(precision, device):
    found = prepare(torch.empty(0, 12, device=device), precision, normalize=True)
    assert found.high.shape == (0, 12)
    assert found.low is None or found.low.shape == (0, 12)


def test_gradients_are_not_recorded(device):
    text = clip_like(1, 4, 20)[1].to(device).requires_grad_()
    assert not prepare(text, "fp16x3", normalize=True).high.requires_grad


def test_what_is_cast_is_scaled_before():
    def first(dtype):
        return {p for p in PRECISIONS if scaled_first(torch.empty(1, dtype=dtype), p)}

    assert first(torch.float32) == set(PRECISIONS)
    assert first(torch.bfloat16) == {"fp16", "tf32", "fp16x3", "fp32"}
    assert first(torch.float16) == {"bf16", "tf32", "fp32"}


class TestPrecision:
    def test_by_default_halves_run_as_they_are_and_float32_at_float32_grade(self):
        half, brain, single = (
            torch.empty(1, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32)
        )
        assert resolve(None, half) == "fp16"
        assert resolve(None, brain, brain) == "bf16"
        assert resolve(None, single) == "fp16x3"
        assert resolve(None, half, brain) == "fp16x3"
        assert resolve(None, half, single) == "fp16x3"
        assert resolve(None) == "fp16x3"

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_what_is_asked_for_is_what_runs(self, precision):
        assert resolve(precision, torch.empty(1)) == precision
        assert check_precision(precision) == precision

    def test_unknown_names_say_what_there_is(self):
        assert check_precision(None) is None
        for wrong in ("fp8", "FP16", ""):
            with pytest.raises(ValueError, match=r"precision: expected None or one of 'fp16'.*got"):
                resolve(wrong, torch.empty(1))
