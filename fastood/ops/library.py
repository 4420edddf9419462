"""The operator library ``fastood``: schemas declared once, in Python.

So they exist without a compiler. Each family (``rows``, ``grouped``, ``patches``, ``ebm``) declares
its operators with ``define``, gives each a default implementation in plain torch, a fake and, if it
is differentiable, a backward; the C++ extension registers CPU implementations for the same names
when it is loaded, and those then take precedence on CPU tensors. On CUDA tensors the Triton kernels
do, through the functions given as ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["GPU", "LIBRARY", "define"]

LIBRARY = torch.library.Library("fastood", "DEF")

GPU: dict[str, Callable[..., Any]] = {}
"""What runs on CUDA tensors, by name of the operator."""


def define(
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> None:
    """Declare ``fastood::<schema>`` with all it needs but the kernels of the CPU.

    Args:
        schema: ``"name(Tensor x, float tau) -> Tensor"``.
        default: plain torch, for any device and without a compiler.
        fake: shapes and dtypes of the outputs only.
        backward, setup_context: as for ``torch.library.register_autograd``; without them the
            operator is not differentiable.
        gpu: for CUDA tensors, in place of ``default``.
    """
    short = schema.split("(", 1)[0]
    name = "fastood::" + short
    LIBRARY.define(schema)
    torch.library.impl(name, "CompositeExplicitAutograd", lib=LIBRARY)(_as_given(default))
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    if gpu is not None:
        GPU[short] = _as_given(gpu)
        torch.library.impl(name, "CUDA", lib=LIBRARY)(GPU[short])


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would leave a few half-precision values of thousands."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run
