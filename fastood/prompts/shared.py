"""The pass through a text tower that runs what all prompts share once.

First the prefix, whose keys and values every layer keeps (at least in float32: their gradients are
sums over all prompts); then the packed suffixes, each seeing the prefix and itself. In the last
block only end-of-text tokens ask, and of the prefix nothing but keys and values is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastood.prompts.attention import attend, attend_last, causal
from fastood.prompts.packing import Packing
from fastood.prompts.tower import TextTower

__all__ = ["PrefixState", "prefix_pass", "suffix_pass"]

PrefixState = list[tuple[Tensor, Tensor]]
"""For each block keys and values (B, H, P, E)."""


def prefix_pass(tower: TextTower, packing: Packing, context: Tensor | None) -> PrefixState | None:
    """Keys and values of the shared tokens in every block, or None without shared tokens.

    Args:
        context: (B, n_ctx, W), or None if none of it stands in the prefix.
    """
    count = packing.prefix
    if not count:
        return None
    with torch.autocast(tower.device.type, enabled=False):
        dtype = torch.promote_types(tower.dtype, torch.float32)
        x = tower.vectors(packing.prefix_ids).to(dtype)[None]
        rows = packing.prefix_rows
        if rows and context is not None:
            x = x.expand(len(context), -1, -1)
            x = x.index_copy(1, packing.prefix_slots, context[:, :rows].to(dtype))
        x = x + tower.positions()[:count].to(dtype)
        state: PrefixState = []
        for block in tower.blocks[:-1]:
            q, k, v = (y.transpose(1, 2) for y in block.project(x).unbind(2))
            state.append((k, v))
            x = block.finish(x, causal(q, k, v).transpose(1, 2))
        _, kv = tower.blocks[-1].project_last(x, None)
        k, v = (y.transpose(1, 2) for y in kv.unbind(2))
        state.append((k, v))
    return state


def suffix_pass(
    tower: TextTower, packing: Packing, context: Tensor | None, state: PrefixState | None
) -> Tensor:
    """Features (B, U, D) of the packed suffixes.

    Args:
        context: (B, n_ctx, W); class-specific (K, n_ctx, W); or None.
        state: of ``prefix_pass``, for B prompts sets or for one.
    """
    x = _tokens(tower, packing, context, 1 if state is None else len(state[0][0]))
    for i, block in enumerate(tower.blocks[:-1]):
        qkv = block.project(x)
        x = block.finish(x, attend(qkv, None if state is None else state[i], packing.buckets))
    last = tower.blocks[-1]
    query, kv = last.project_last(x, packing.ends)
    assert query is not None
    attended = attend_last(query, kv, None if state is None else state[-1], packing.buckets)
    return tower.read(last.finish(x.index_select(1, packing.ends), attended))


def _tokens(tower: TextTower, packing: Packing, context: Tensor | None, sets: int) -> Tensor:
    """(B, N, W) suffix tokens with their context and positions."""
    dtype, rows = tower.dtype, packing.prefix_rows
    x = tower.vectors(packing.ids).to(dtype)[None]
    if context is not None and rows < packing.n_ctx:
        if packing.class_specific:
            own = context.index_select(0, packing.rows)[None]
        else:
            # expanded before it is rounded, so that its gradient sums over prompts in float32
            own = context[:, None].expand(-1, len(packing.rows), -1, -1)
        own = own[:, :, rows:].flatten(1, 2).to(dtype)
        x = x.expand(len(own), -1, -1).index_copy(1, packing.slots, own)
    elif sets > 1:
        x = x.expand(sets, -1, -1)
    return x + tower.positions().index_select(0, packing.positions).to(dtype)
