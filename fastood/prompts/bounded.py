"""Training in bounded memory: no graph forwards, one part of the classes at a time backwards.

Backward recomputes. What all parts share (each layer's prefix keys and values) is computed once
with a graph and cut off as leaves; every part is run again and adds to the leaves' gradients; one
backward pass through the prefix turns their sum into the context's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Parts", "bounded", "direct"]


class Parts(Protocol):
    """A pass that can be run in parts."""

    @property
    def sizes(self) -> list[int]: ...

    def shared(self, context: Tensor | None) -> list[Tensor]:
        """What every part needs."""
        ...

    def part(self, index: int, context: Tensor | None, shared: list[Tensor]) -> Tensor:
        """Features (B, size, D) of one part."""
        ...


def direct(parts: Parts, context: Tensor | None) -> Tensor:
    """(B, U, D) of all parts, in one graph if there is one."""
    shared = parts.shared(context)
    found = [parts.part(i, context, shared) for i in range(len(parts.sizes))]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def bounded(parts: Parts, context: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
    """The same with the graph of one part at a time.

    Args:
        parameters: whatever else requires a gradient.
    """
    return _Bounded.apply(parts, context, *parameters)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, context: Tensor | None, *parameters: Tensor) -> Tensor:
        out = direct(parts, context)
        ctx.save_for_backward(context, *parameters)
        ctx.parts = parts
        kind = out.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts: Parts = ctx.parts
        context, *parameters = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            wants = context is not None and ctx.needs_input_grad[1]
            own = context.detach().requires_grad_() if wants else context
            leaves = [own, *parameters] if wants else list(parameters)
            shared = parts.shared(own)
            cut = [s.detach().requires_grad_(s.requires_grad) for s in shared]
            links = [(s, c) for s, c in zip(shared, cut, strict=True) if c.requires_grad]
            inputs = [*leaves, *(c for _, c in links)]
            sums: list[Tensor | None] = [None] * len(inputs)
            for i, piece in enumerate(grad.split(parts.sizes, dim=1)):
                found = torch.autograd.grad(
                    parts.part(i, own, cut), inputs, piece, allow_unused=True
                )
                sums = [_add(s, g) for s, g in zip(sums, found, strict=True)]
            ends = [
                (s, g)
                for (s, _), g in zip(links, sums[len(leaves) :], strict=True)
                if g is not None
            ]
            sums = sums[: len(leaves)]
            if ends and leaves:
                through = torch.autograd.grad(
                    [s for s, _ in ends], leaves, [g for _, g in ends], allow_unused=True
                )
                sums = [_add(s, g) for s, g in zip(sums, through, strict=True)]
        return (None, *(sums if wants else [None, *sums]))


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more
