"""Checking and normalising what users pass in, so that the arithmetic does not have to.

All messages name the argument, what was expected, what came, and the usual cause.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "check_count",
    "check_features",
    "check_finite",
    "check_scalar",
    "check_tau",
    "check_tensor",
    "check_width",
    "matmul_classes",
    "must_check",
    "row_blocks",
    "unit_rows",
    "working",
]

BLOCK = 1 << 23
"""Most numbers in a block of similarities: 32 MiB of float32 stays near the caches."""

_SAFE_NORM = (1e-15, 1e15)
_TAU = (1e-30, 1e30)

# asked once, here: torch.compile before 2.12 cannot trace the question
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def working(x: Tensor) -> Tensor:
    """``x`` in the precision scores are computed in: float64 stays, the rest becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def must_check(x: Tensor) -> bool:
    """Whether the numbers of ``x`` are to be looked at before they are used."""
    if torch.compiler.is_compiling():
        return False
    # reading a flag back from a GPU waits for it, so there it is done on request only; a tensor
    # without values has nothing to read
    return x.is_cpu or (not x.is_meta and os.environ.get("FASTOOD_CHECK") == "1")


def _rows(bad: Tensor) -> str:
    index = bad.nonzero()[:, 0].unique().tolist()
    shown = ", ".join(str(i) for i in index[:5])
    return f"row {shown}" if len(index) == 1 else f"{len(index)} rows, first {shown}"


def check_tensor(name: str, x: Any, dims: tuple[int, ...], shape: str) -> Tensor:
    """A floating-point tensor with one of ``dims`` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {shape}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}; use .float()")
    if x.ndim not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    return x


def check_finite(name: str, x: Tensor, *, what: str = "features") -> None:
    """Raise a ValueError that names the rows holding NaN or Inf (CPU, or FASTOOD_CHECK=1)."""
    if not must_check(x) or x.numel() == 0:
        return
    bad = ~torch.isfinite(x.detach()).reshape(x.shape[0], -1).all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: {what} must be finite, found NaN or Inf in {_rows(bad)}")


def check_features(name: str, x: Any, dims: tuple[int, ...], shape: str) -> Tensor:
    """Like ``check_tensor``, and every feature vector is finite and not zero."""
    x = check_tensor(name, x, dims, shape)
    check_finite(name, x)
    if must_check(x) and x.numel():
        zero = (x.detach() == 0).all(dim=-1)
        if bool(zero.any()):
            raise ValueError(
                f"{name}: a zero vector has no direction, found in {_rows(zero)}; "
                "was an image or a prompt left out without being masked?"
            )
    return x


def check_tau(tau: Any) -> float:
    value = check_scalar("tau", tau)
    if value <= 0:
        raise ValueError(f"tau: expected a temperature > 0, got {tau!r}")
    if not _TAU[0] <= value <= _TAU[1]:  # 1 / tau and cosines / tau have to be numbers
        raise ValueError(f"tau: expected a temperature from 1e-30 to 1e30, got {tau!r}")
    return value


def check_scalar(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, bool)):  # float() would read both
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a finite number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def check_count(name: str, value: Any, low: int, high: int | None, *, high_name: str = "") -> int:
    allowed = f"{low} <= {name}" + ("" if high is None else f" <= {high_name}{high}")
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}: expected an integer with {allowed}, got {value!r}")
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {allowed}, got {number}")
    return number


def check_width(image: Tensor, text: Tensor, names: tuple[str, str] = ("image", "text")) -> None:
    """Same D, same device, and the same B where the classes come per image."""
    first, second = names
    if image.shape[-1] == 0:
        raise ValueError(f"{first}: expected features of D >= 1 numbers, got {tuple(image.shape)}")
    if image.shape[-1] != text.shape[-1]:
        lead = ", ".join("B" if text.ndim == 3 and i == 0 else "K" for i in range(text.ndim - 1))
        raise ValueError(
            f"{second}: expected ({lead}, {image.shape[-1]}) to match {first} "
            f"{tuple(image.shape)}, got {tuple(text.shape)}; were both encoded by the same model?"
        )
    if text.ndim == 3 and text.shape[0] != image.shape[0]:
        raise ValueError(
            f"{second}: per-image classes need one set an image, expected "
            f"({image.shape[0]}, K, {image.shape[-1]}), got {tuple(text.shape)}"
        )
    if image.device != text.device:
        raise ValueError(
            f"{second}: expected on {image.device} like {first}, got {text.device}; "
            f"use {second}.to({str(image.device)!r})"
        )


def row_blocks(b: int, per_row: int) -> Iterator[slice]:
    """Rows so many at a time that a block holds at most ``BLOCK`` numbers; one block for B = 0."""
    step = max(1, BLOCK // max(1, per_row))
    for start in range(0, max(1, b), step):
        yield slice(start, min(start + step, b))


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm, for any norm float32 can hold."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    # squares of 1e20 overflow and of 1e-25 vanish; ordinary rows are left bit for bit alone
    extreme = (largest > _SAFE_NORM[1]) | (largest < _SAFE_NORM[0])
    x = x / torch.where(extreme, largest, torch.ones_like(largest))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def matmul_classes(x: Tensor, text: Tensor) -> Tensor:
    """Inner products of ``x (B, D)`` or ``(B, P, D)`` with ``text (K, D)`` or ``(B, K, D)``.

    In the precision of the inputs: autocast, usual around encoders, would leave a few bfloat16
    values of thousands.
    """
    with _as_given(x.device.type):
        if text.ndim == 2:
            return x @ text.mT
        if x.ndim == 2:
            return torch.einsum("bd,bkd->bk", x, text)
        return torch.einsum("bpd,bkd->bpk", x, text)


def _as_given(device: str) -> AbstractContextManager[object]:
    if device in _AUTOCAST:
        return torch.autocast(device, enabled=False)
    return nullcontext()
