"""The operator library ``fastood``: schemas declared once, in Python.

So they exist without a compiler. Each family (``rows``, ``grouped``, ``patches``, ``ebm``) declares
its operators with ``define``, gives each a default implementation in plain torch, a fake and, if it
is differentiable, a backward; the C++ extension registers CPU implementations for the same names
when it is loaded, and those then take precedence on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["LIBRARY", "define"]

LIBRARY = torch.library.Library("fastood", "DEF")


def define(
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Declare ``fastood::<schema>`` with all it needs but kernels.

    Args:
        schema: ``"name(Tensor x, float tau) -> Tensor"``.
        default: plain torch, for any device and without a compiler.
        fake: shapes and dtypes of the outputs only.
        backward, setup_context: as for ``torch.library.register_autograd``; without them the
            operator is not differentiable.
    """
    name = "fastood::" + schema.split("(", 1)[0]
    LIBRARY.define(schema)
    torch.library.impl(name, "CompositeExplicitAutograd", lib=LIBRARY)(default)
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
