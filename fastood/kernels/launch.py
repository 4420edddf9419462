"""Starting Triton kernels: where they run, on which device, and what if one does not compile."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fastood.errors import KernelError

__all__ = ["INTERPRETED", "launch", "processors", "usable"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when kernels are defined; it turns them into NumPy on the CPU."""

_TRITON = (3, 3)  # first with tuples as arguments
_CAPABILITY = (8, 0)  # first with bfloat16, TF32 and asynchronous copies

_failed: dict[Any, str] = {}


def usable(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot compute these tensors; None if they can."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype == torch.float64:
            return "the kernels sum in float32, got a float64 tensor"
        if not (x.is_cuda or (INTERPRETED and x.is_cpu)):
            return f"Triton kernels take CUDA tensors, got one on {x.device}"
        if x.is_cuda:
            reason = _device(x.device.index)
            if reason is not None:
                return reason
    return _installed()


@cache
def _installed() -> str | None:
    version = _version()
    if version is None:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < _TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, _TRITON))}; update torch"
    return None


def _version() -> str | None:
    for name in ("triton", "pytorch-triton"):  # the latter with nightly torch, in NVIDIA's images
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


@cache
def _device(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written and tuned for NVIDIA GPUs"
    found = torch.cuda.get_device_capability(index)
    if found < _CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {found[0]}.{found[1]}, the kernels need 8.0"
    return None


def processors(device: torch.device) -> int:
    """How many programs run side by side."""
    if device.type != "cuda":
        return 1
    return _processors(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **options: Any
) -> None:
    """``kernel[grid](*arguments, **options)`` on ``device`` and its current stream.

    Raises:
        KernelError: if it does not compile; from then on at every call of its kind.
    """
    if 0 in grid:
        return
    if _failed:
        known = _failed.get(_kind(kernel, arguments, options, device))
        if known is not None:
            raise KernelError(known)
    options.setdefault("enable_fp_fusion", True)  # multiply-adds; Triton's default may change
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*arguments, **options)
        else:
            kernel[grid](*arguments, **options)
    except Exception as error:
        if INTERPRETED or not _of_compiler(error):
            raise
        message = _message(kernel, error)
        _failed[_kind(kernel, arguments, options, device)] = message
        raise KernelError(message) from error


def _kind(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[Any, ...]:
    """One of the things that compile or do not: by precision, tile size, types and GPU."""
    dtypes = tuple(x.dtype for x in arguments if isinstance(x, Tensor))
    constants = tuple((name, x) for name, x in options.items() if name != "enable_fp_fusion")
    return (kernel, device, dtypes, constants)


def _of_compiler(error: Exception) -> bool:
    """Not what a running kernel did, nor memory that ran out."""
    from triton.errors import TritonError

    if isinstance(error, (TritonError, subprocess.CalledProcessError, OSError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        known in text for known in ("PassManager", "ptxas", "C compiler")
    )


def _message(kernel: Callable[..., Any], error: Exception) -> str:
    output = getattr(error, "stderr", None)
    text = output.decode(errors="replace") if isinstance(output, bytes) else str(output or error)
    last = "\n".join(text.strip().splitlines()[-6:])
    return f"triton: {getattr(kernel, '__name__', kernel)} does not compile here:\n{last}"
