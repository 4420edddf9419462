"""One transformer block at a time, with the block's own weights or with those of candidates.

A candidate changes one matrix of a block, and what comes before that matrix is computed once for
all of them: W_up and W_down start after attention, W_o after the heads, W_q, W_k and W_v at the
block's input.

A search spends nearly all its time here, so nothing is kept for a backward pass: residuals are
added by the products (they start from x + b instead of b), activations are made in place, and work
goes in slices whose temporaries stay below what the C library hands back to the system at once.
Memory that comes back has to be cleared page by page; for the MLP of ViT-B/16 and 16 images that
took a fifth of the block's time.

Letters: B sequences of N tokens, width W, H heads of E = W/H, M tokens that ask, R that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.models.blocks import Affine, Block, layer_norm, linear
from fastood.models.matrices import Kind
from fastood.setar.tails import Tails

__all__ = ["Attention", "Heads", "step", "steps"]

_SLICE_BYTES = 22 << 20
"""Of a temporary on the CPU. glibc keeps freed blocks of up to 32 MB, so that larger ones are new
memory each time; smaller slices cost the products more than they save (8 MB: 5 to 10 %)."""

_QUICK_GELU = ("QuickGELU", "QuickGELUActivation")  # open_clip, transformers: y sigmoid(1.702 y)
_QUICK = 1.702


def _all(x: Tensor) -> Tensor:
    return x


class Heads(NamedTuple):
    """What attention works on."""

    q: Tensor
    """(B, M, H, E)"""
    k: Tensor
    """(B, N, H, E)"""
    v: Tensor
    together: Tensor | None = None
    """q, k and v as they lie in one tensor (B, N, 3, H, E), or k and v (B, N, 2, H, E) if other
    tokens ask; None if one of them is a candidate's."""


@dataclass(frozen=True)
class Attention:
    """Which tokens of a block ask, what they get, and which go on."""

    attend: Callable[[Heads], Tensor]
    """→ (B, R, H, E)"""
    asking: Callable[[Tensor], Tensor] = _all
    """(B, N, W) → (B, M, W)."""
    going: Callable[[Tensor], Tensor] = _all
    """(B, N, W) → (B, R, W)."""


@torch.no_grad()
def step(block: Block, x: Tensor, attention: Attention) -> Tensor:
    """Tokens (B, R, W) after the block, from those before it (B, N, W)."""
    going = attention.going(x)
    result = torch.empty(going.shape, dtype=x.dtype, device=x.device)
    joint = block.joint()  # Hugging Face's is put together
    some = _slice(x, x.shape[1] * block.fc.weight.shape[0])
    for own, base, into in zip(x.split(some), going.split(some), result.split(some), strict=True):
        normed = layer_norm(block.norm_1, own)
        heads = attention.attend(_project(block, joint, normed, attention))
        _feed(block, _join(block, base, heads.flatten(-2)), into)
    return result


@torch.no_grad()
def steps(
    block: Block, kind: Kind, tails: Tails, x: Tensor, attention: Attention
) -> Iterator[Tensor]:
    """The same with each candidate's weight in place of the block's matrix ``kind``.

    Results are tensors of their own.
    """
    normed = layer_norm(block.norm_1, x)
    parts = _project(block, block.joint(), normed, attention)
    x = attention.going(x)
    if kind in ("q", "k", "v"):
        source = attention.asking(normed) if kind == "q" else normed
        for y in tails.results(source, getattr(parts, kind).flatten(-2)):
            one = {kind: y.unflatten(-1, (block.heads, -1))}
            heads = attention.attend(parts._replace(together=None, **one))
            yield _feed(block, _join(block, x, heads.flatten(-2)))
        return
    heads = attention.attend(parts).flatten(-2)
    if kind == "o":
        mixed = linear(heads, block.out.weight, block.out.bias)
        for y in tails.results(heads, mixed):
            yield _feed(block, block.join(x, y))
        return
    x = _join(block, x, heads)
    normed = layer_norm(block.norm_2, x)
    y = linear(normed, block.fc.weight, block.fc.bias)
    if kind == "up":
        for z in tails.results(normed, y):
            yield _down(block, x, z)
        return
    inside = block.activate(y)
    for z in tails.results(inside, linear(inside, block.proj.weight, block.proj.bias)):
        yield block.leave(x, z)


def _project(block: Block, joint: Affine, normed: Tensor, attention: Attention) -> Heads:
    """Queries, keys and values of normed tokens (B, N, W)."""
    weight, bias = joint
    width = weight.shape[0] // 3
    asking = attention.asking(normed)
    if asking is normed:
        together = linear(normed, weight, bias).unflatten(-1, (3, block.heads, -1))
        q, k, v = together.unbind(-3)
        return Heads(q, k, v, together)
    own, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = linear(asking, weight[:width], own).unflatten(-1, (block.heads, -1))
    together = linear(normed, weight[width:], rest).unflatten(-1, (2, block.heads, -1))
    k, v = together.unbind(-3)
    return Heads(q, k, v, together)


def _join(block: Block, x: Tensor, heads: Tensor) -> Tensor:
    """Tokens between attention and MLP, from what their heads (B, R, W) attended to."""
    if block.gain_1 is not None:
        return block.join(x, linear(heads, block.out.weight, block.out.bias))
    found = _start(x, block.out.bias)
    _rows(found).addmm_(_rows(heads), block.out.weight.mT)
    return found


def _feed(block: Block, x: Tensor, into: Tensor | None = None) -> Tensor:
    """Tokens after the MLP, from those before it."""
    into = torch.empty_like(x) if into is None else into
    up, bias = block.fc.weight, block.fc.bias
    down, quick = block.proj.weight.mT, _quick(block)
    normed = _rows(layer_norm(block.norm_2, x))
    some = _slice(normed, up.shape[0])
    for own, base, out in zip(
        normed.split(some), _rows(x).split(some), _rows(into).split(some), strict=True
    ):
        if quick:  # silu(1.702 y) / 1.702, both factors in the products
            if bias is None:
                y = torch.mm(own, up.mT).mul_(_QUICK)
            else:
                y = torch.addmm(bias, own, up.mT, beta=_QUICK, alpha=_QUICK)
            y = F.silu(y, inplace=True)
        else:
            y = _activated(block, linear(own, up, bias))
        _leave(block, base, y, down, 1 / _QUICK if quick else 1.0, out)
    return into


def _down(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """Tokens after the MLP, from what its first matrix gave, which stays as it is."""
    into = torch.empty_like(x)
    down, quick = block.proj.weight.mT, _quick(block)
    some = _slice(_rows(y), y.shape[-1])
    for own, base, out in zip(
        _rows(y).split(some), _rows(x).split(some), _rows(into).split(some), strict=True
    ):
        if quick:
            inside = F.silu(own * _QUICK, inplace=True)
        else:
            inside = block.activate(own)
        _leave(block, base, inside, down, 1 / _QUICK if quick else 1.0, out)
    return into


def _leave(block: Block, x: Tensor, y: Tensor, down: Tensor, factor: float, into: Tensor) -> None:
    """x + s2 · (factor y W + b) for rows of tokens."""
    bias = block.proj.bias
    if block.gain_2 is None:
        _start(x, bias, into).addmm_(y, down, alpha=factor)
        return
    torch.mm(y, down, out=into)
    into.mul_(factor)
    if bias is not None:
        into.add_(bias)
    into.mul_(block.gain_2()).add_(x)


def _activated(block: Block, y: Tensor) -> Tensor:
    """The activation of y, which is overwritten where that is known to work."""
    if type(block.act) is nn.GELU:
        return torch.ops.aten.gelu_(y, approximate=block.act.approximate)
    return block.activate(y)


def _quick(block: Block) -> bool:
    return type(block.act).__name__ in _QUICK_GELU


def _start(x: Tensor, bias: Tensor | None, into: Tensor | None = None) -> Tensor:
    """x + b, to which a product is added; never x itself."""
    if into is None:
        into = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return into.copy_(x) if bias is None else torch.add(x, bias, out=into)


def _rows(x: Tensor) -> Tensor:
    """(..., W) → (n, W); a view of what is contiguous."""
    return x.reshape(-1, x.shape[-1])


def _slice(x: Tensor, numbers: int) -> int:
    """How many of the first dimension to work on at a time, ``numbers`` temporaries for each.

    Slices of nearly equal size. A GPU gets everything at once.
    """
    most = max(1, _SLICE_BYTES // (numbers * x.element_size()))
    if x.device.type != "cpu" or len(x) <= most:
        return max(1, len(x))
    return -(-len(x) // -(-len(x) // most))
