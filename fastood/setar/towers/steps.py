"""One transformer block at a time, with the block's own weights or with those of candidates.

A candidate changes one matrix of a block, and what comes before that matrix is computed once for
all of them: W_up and W_down start after attention, W_o after the heads, W_q, W_k and W_v at the
block's input.

Letters: B sequences of N tokens, width W, H heads of E = W/H, M tokens that ask, R that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastood.models.blocks import Block, layer_norm, linear
from fastood.models.matrices import Kind
from fastood.setar.tails import Tails

__all__ = ["Attention", "step", "steps"]


def _all(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Attention:
    """Which tokens of a block ask, what they get, and which go on."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Queries (B, M, H, E), keys and values (B, N, H, E) → (B, R, H, E)."""
    asking: Callable[[Tensor], Tensor] = _all
    """(B, N, W) → (B, M, W)."""
    going: Callable[[Tensor], Tensor] = _all
    """(B, N, W) → (B, R, W)."""


@torch.no_grad()
def step(block: Block, x: Tensor, attention: Attention) -> Tensor:
    """Tokens (B, R, W) after the block, from those before it (B, N, W)."""
    heads = attention.attend(*_project(block, layer_norm(block.norm_1, x), attention))
    return _feed(block, _join(block, attention.going(x), _mix(block, heads)))


@torch.no_grad()
def steps(
    block: Block, kind: Kind, tails: Tails, x: Tensor, attention: Attention
) -> Iterator[Tensor]:
    """The same with each candidate's weight in place of the block's matrix ``kind``."""
    normed = layer_norm(block.norm_1, x)
    parts = _project(block, normed, attention)
    if kind in ("q", "k", "v"):
        place = "qkv".index(kind)
        source = attention.asking(normed) if kind == "q" else normed
        for y in tails.results(source, parts[place].flatten(-2)):
            changed = list(parts)
            changed[place] = y.unflatten(-1, (block.heads, -1))
            mixed = _mix(block, attention.attend(*changed))
            yield _feed(block, _join(block, attention.going(x), mixed))
        return
    heads, x = attention.attend(*parts).flatten(-2), attention.going(x)
    mixed = linear(heads, block.out.weight, block.out.bias)
    if kind == "o":
        for y in tails.results(heads, mixed):
            yield _feed(block, _join(block, x, y))
        return
    x = _join(block, x, mixed)
    normed = layer_norm(block.norm_2, x)
    y = linear(normed, block.fc.weight, block.fc.bias)
    if kind == "up":
        for z in tails.results(normed, y):
            yield block.leave(x, _down(block, z))
        return
    inside = block.activate(y)
    for z in tails.results(inside, linear(inside, block.proj.weight, block.proj.bias)):
        yield block.leave(x, z)


def _project(block: Block, normed: Tensor, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, M, H, E), keys and values (B, N, H, E) of normed tokens (B, N, W)."""
    weight, bias = block.joint()
    width = weight.shape[0] // 3
    asking = attention.asking(normed)
    if asking is normed:
        q, k, v = linear(normed, weight, bias).unflatten(-1, (3, block.heads, -1)).unbind(-3)
        return q, k, v
    own, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = linear(asking, weight[:width], own).unflatten(-1, (block.heads, -1))
    k, v = linear(normed, weight[width:], rest).unflatten(-1, (2, block.heads, -1)).unbind(-3)
    return q, k, v


def _mix(block: Block, heads: Tensor) -> Tensor:
    return block.mix(heads)


def _join(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    return block.join(x, mixed)


def _feed(block: Block, x: Tensor) -> Tensor:
    return block.feed(x)


def _down(block: Block, y: Tensor) -> Tensor:
    return linear(block.activate(y), block.proj.weight, block.proj.bias)
