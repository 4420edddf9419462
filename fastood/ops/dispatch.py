"""Which implementation computes a call: the plain-torch reference or a fused kernel."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastood.ops import loader

__all__ = ["IMPLEMENTATIONS", "Impl", "asked", "choose"]

Impl = Literal["reference", "cpu", "triton", "cuda"]
IMPLEMENTATIONS: tuple[Impl, ...] = ("reference", "cpu", "triton", "cuda")


def choose(impl: str | None, *tensors: Tensor | None) -> Literal["reference", "cpu"]:
    """The implementation for these tensors.

    ``impl``, else ``FASTOOD_IMPL``, is obeyed or refused. Left open, float32, bfloat16 and float16
    tensors on the CPU take the C++ kernels if they can be had (``fastood info`` says why not);
    everything else, float64 above all, takes the reference, and so does whatever runs under
    ``torch.func`` or forward-mode derivatives: the kernels know backward gradients alone.

    Raises:
        ValueError: an unknown name; one that cannot compute these tensors.
        BuildError: ``"cpu"`` is asked for and the extension cannot be built.
    """
    name = asked(impl)
    if name is None:
        for x in tensors:
            if x is not None and not (x.is_cpu and x.dtype != torch.float64):
                return "reference"
        return "cpu" if not _transformed() and _have_cpu() else "reference"
    if name == "reference":
        return "reference"
    source = "impl" if impl else "FASTOOD_IMPL"
    for x in tensors:
        if x is not None and not x.is_cpu:
            raise ValueError(f"{source}: 'cpu' takes CPU tensors, got one on {x.device}")
        if x is not None and x.dtype == torch.float64:
            raise ValueError(
                f"{source}: 'cpu' computes in float32, got a float64 tensor; "
                "use impl='reference' or .float()"
            )
    if _transformed():
        raise ValueError(
            f"{source}: 'cpu' knows neither torch.func nor forward-mode derivatives; "
            "use impl='reference'"
        )
    _require_cpu()
    return "cpu"


# What follows is asked of the world, not of tensors: torch.compile takes the answers as constants.


@torch.compiler.assume_constant_result
def asked(impl: str | None) -> str | None:
    """The implementation that ``impl`` or ``FASTOOD_IMPL`` names, None if neither does."""
    name = impl or os.environ.get("FASTOOD_IMPL") or None
    source = "impl" if impl else "FASTOOD_IMPL"
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{source}: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {name!r}"
        )
    if name in ("triton", "cuda"):
        raise ValueError(f"{source}: {name!r} is not in this version; use 'cpu' or 'reference'")
    return name


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
