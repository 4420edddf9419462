"""The full-length pass: the model itself, with learned vectors put in behind its embedding.

Works for any text tower, costs the whole token window for each prompt, and is what the faster
passes are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastood.prompts.layout import PromptLayout

__all__ = ["FullPass"]


class FullPass:
    """Features of prompts by the model's own forward pass.

    Args:
        encode: tokens (N, L) → features (N, D), with gradient.
        embedding: the module that turns token ids into vectors.
        layout: the prompts.
        rows: which of them, (U,) int64.
        chunk: prompts run at once.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        embedding: nn.Module,
        layout: PromptLayout,
        rows: Tensor,
        chunk: int,
    ) -> None:
        self._encode = encode
        self._embedding = embedding
        self._layout = layout
        self._chunks = rows.split(chunk)

    @property
    def sizes(self) -> list[int]:
        """Prompts in each part."""
        return [len(c) for c in self._chunks]

    def shared(self, context: Tensor | None) -> list[Tensor]:
        """Nothing is shared."""
        del context
        return []

    def part(self, index: int, context: Tensor | None, shared: list[Tensor]) -> Tensor:
        """Features (B, U_i, D) of one part."""
        del shared
        rows, layout = self._chunks[index], self._layout
        device = next(self._embedding.parameters()).device
        tokens = layout.tokens[rows].to(device)
        if context is None or not layout.n_ctx:
            return self._encode(tokens)[None]
        slots = (layout.context[rows] >= 0).flatten().nonzero().flatten().to(device)
        if layout.class_specific:
            each = [context.index_select(0, rows.to(context.device))]
        else:
            each = [c.expand(len(rows), -1, -1) for c in context]
        return torch.stack([self._with(tokens, slots, c.flatten(0, 1)) for c in each])

    def _with(self, tokens: Tensor, slots: Tensor, own: Tensor) -> Tensor:
        def put(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            flat = output.flatten(0, 1)
            return flat.index_copy(0, slots, own.to(flat.dtype)).view_as(output)

        handle = self._embedding.register_forward_hook(put)
        try:
            return self._encode(tokens)
        finally:
            handle.remove()
