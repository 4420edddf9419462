"""Which implementation computes a call: the plain-torch reference or fused kernels, and why."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastood.kernels.precision import check_precision, resolve
from fastood.ops import loader

__all__ = [
    "IMPLEMENTATIONS",
    "Impl",
    "asked",
    "choose",
    "demanded",
    "fall_back",
    "operator_precision",
    "refuse_cuda",
    "triton_refuses",
]

Impl = Literal["reference", "cpu", "triton", "cuda"]
IMPLEMENTATIONS: tuple[Impl, ...] = ("reference", "cpu", "triton", "cuda")

_warned: set[str] = set()


def choose(impl: str | None, *tensors: Tensor | None, precision: str | None = None) -> Impl:
    """The implementation for these tensors, which are on one device.

    ``impl``, else ``FASTOOD_IMPL``, is obeyed or refused. Left open, float32, bfloat16 and float16
    tensors take the C++ kernels on the CPU and the Triton kernels on a GPU if they can be had
    (``fastood info`` says why not); everything else, float64 above all, takes the reference, and so
    does whatever runs under ``torch.func`` or forward-mode derivatives: the kernels know backward
    gradients alone.

    Args:
        precision: in what the products are taken. On the CPU and in the reference they are float32,
            which None and ``"fp32"`` allow.
    Raises:
        ValueError: an unknown name; one that cannot compute these tensors, or not so.
        BuildError: ``"cpu"`` is asked for and the extension cannot be built.
    """
    name = asked(impl)
    given = [x for x in tensors if x is not None]
    if precision is not None:
        check_precision(precision)
        if any([x.dtype == torch.float64 for x in given]):  # noqa: C419 (torch.compile)
            raise ValueError(
                f"precision: {precision!r} is for float32, bfloat16 and float16 features; float64 "
                "is computed in float64, leave precision=None"
            )
    found: Impl
    if name is None:
        found = _open(given)
    else:
        found = name
        if name != "reference":
            _check_demanded(name, _source(impl), given)
    if precision is not None and precision != "fp32" and found in ("cpu", "reference"):
        raise ValueError(
            f"precision: {precision!r} is for the kernels of a GPU; {_where(found, given)} in "
            "float32, expected None or 'fp32'"
        )
    return found


def _open(tensors: list[Tensor]) -> Impl:
    on_gpu = False
    for x in tensors:
        if x.dtype == torch.float64 or not (x.is_cpu or x.is_cuda):
            return "reference"
        on_gpu = x.is_cuda
        if on_gpu and triton_refuses(x.device.index) is not None:
            return "reference"
    if _transformed():
        return "reference"
    if on_gpu:
        return "triton"
    return "cpu" if _have_cpu() else "reference"


def _check_demanded(name: Impl, source: str, tensors: list[Tensor]) -> None:
    for x in tensors:
        if name == "cpu" and not x.is_cpu:
            raise ValueError(f"{source}: 'cpu' takes CPU tensors, got one on {x.device}")
        if x.dtype == torch.float64:
            raise ValueError(
                f"{source}: {name!r} computes in float32, got a float64 tensor; "
                "use impl='reference' or .float()"
            )
        if name == "cuda" and not x.is_cuda:
            raise ValueError(f"{source}: 'cuda' takes CUDA tensors, got one on {x.device}")
        if name == "triton":
            if not (x.is_cuda or (x.is_cpu and _interpreted())):
                raise ValueError(f"{source}: 'triton' takes CUDA tensors, got one on {x.device}")
            refused = triton_refuses(x.device.index if x.is_cuda else None)
            if refused is not None:
                raise ValueError(f"{source}: 'triton' is not to be had here: {refused}")
    if _transformed():
        raise ValueError(
            f"{source}: {name!r} knows neither torch.func nor forward-mode derivatives; "
            "use impl='reference'"
        )
    if name == "cpu":
        _require_cpu()


def _source(impl: str | None) -> str:
    return "impl" if impl else "FASTOOD_IMPL"


def _where(found: Impl, tensors: list[Tensor]) -> str:
    if tensors and tensors[0].is_cpu:
        return "the CPU computes"
    if found == "reference" and tensors and tensors[0].is_cuda:
        refused = triton_refuses(tensors[0].device.index)
        if refused is not None:
            return f"here ({refused}) the reference computes"
    return "the reference computes"


def refuse_cuda(impl: str | None, what: str) -> NoReturn:
    """``"cuda"`` has been chosen for something it has no kernel for.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{_source(impl)}: 'cuda' has global and local scores without gradients, not {what}; "
        "use impl='triton' or impl='reference'"
    )


def demanded(impl: str | None, precision: str | None) -> bool:
    """Whether a call named what is to compute it: then nothing else may."""
    return precision is not None or asked(impl) is not None


def operator_precision(impl: str | None, precision: str | None, *features: Tensor) -> str:
    """What an operator is told: a name if the kernel is demanded, ``""`` if it is preferred."""
    return resolve(precision, *features) if demanded(impl, precision) else ""


def fall_back(error: Exception, impl: str | None = None, precision: str | None = None) -> None:
    """Warn, once for each reason, that the reference takes over from a kernel that fails here.

    Raises:
        KernelError: ``error`` itself, if the kernel was demanded.
    """
    if demanded(impl, precision):
        raise error
    message = f"{error}\nthe reference computes instead (slower); impl='reference' says so quietly"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# What follows is asked of the world, not of tensors: torch.compile takes the answers as constants.


@torch.compiler.assume_constant_result
def asked(impl: str | None) -> Impl | None:
    """The implementation that ``impl`` or ``FASTOOD_IMPL`` names, None if neither does."""
    name = impl or os.environ.get("FASTOOD_IMPL") or None
    if name is None:
        return None
    for known in IMPLEMENTATIONS:
        if name == known:
            return known
    raise ValueError(
        f"{_source(impl)}: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {name!r}"
    )


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    inside_func = torch._C._functorch.peek_interpreter_stack() is not None
    return inside_func or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _have_cpu() -> bool:
    return loader.try_cpu() is not None


@torch.compiler.assume_constant_result
def _require_cpu() -> None:
    loader.cpu()


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def triton_refuses(device: int | None) -> str | None:
    """Why the Triton kernels cannot run on this GPU (None: on the CPU, interpreted)."""
    return _refusal(device)


@cache
def _refusal(device: int | None) -> str | None:
    from fastood.kernels.launch import usable

    if device is None:
        return usable(torch.empty(0))
    if not torch.cuda.is_available():
        return "no CUDA device"
    return usable(torch.empty(0, device=torch.device("cuda", device)))
