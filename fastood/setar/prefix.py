"""Inputs of blocks of the accepted model, kept so that candidates need not start from pixels.

What enters a block depends only on the weights below it. So the kept inputs are exact in any order
of visits: accepting a change in block l makes what enters the blocks above l stale, nothing else.
Only every s-th input is kept, s as memory allows; the others are run again from the nearest one
below, once for all candidates of a visit. With nothing kept every visit starts from the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastood.room import free_memory

__all__ = ["Prefix", "Stack", "bytes_of", "default_memory", "spacing"]


class Stack(Protocol):
    """Blocks one above the other."""

    depth: int

    def block(self, index: int, state: Any) -> Any:
        """Input of block ``index + 1`` from that of ``index``."""
        ...


class Prefix:
    """Inputs of the blocks of one tower, for data in chunks.

    Args:
        tower: the blocks, with the weights accepted so far.
        start: number of a chunk → input of block 0.
        every: s, keep the inputs of blocks 0, s, 2s, ...; 0 keeps none.
    """

    def __init__(self, tower: Stack, start: Callable[[int], Any], every: int) -> None:
        self.every = every
        self._tower, self._start = tower, start
        self._kept: dict[tuple[int, int], Any] = {}

    def input(self, layer: int, chunk: int) -> Any:
        """What enters block ``layer`` of the model as accepted; not to be written to."""
        below = range(layer, -1, -1)
        at = next((i for i in below if (i, chunk) in self._kept), None)
        if at is None:
            at = 0
            state = self._keep(0, chunk, self._start(chunk))
        else:
            state = self._kept[at, chunk]
        for i in range(at, layer):
            state = self._keep(i + 1, chunk, self._tower.block(i, state))
        return state

    def changed(self, layer: int) -> None:
        """Weights of block ``layer`` changed: inputs of the blocks above are not kept any more."""
        self._kept = {at: x for at, x in self._kept.items() if at[0] <= layer}

    def space(self, every: int) -> None:
        """Keep the inputs of blocks 0, s, 2s, ... from now on, and none of the others."""
        self.every = every
        self._kept = {at: x for at, x in self._kept.items() if every and at[0] % every == 0}

    def drop(self, chunk: int) -> None:
        """Keep nothing of one chunk."""
        self._kept = {at: x for at, x in self._kept.items() if at[1] != chunk}

    def _keep(self, layer: int, chunk: int, state: Any) -> Any:
        if self.every and layer % self.every == 0:
            self._kept[layer, chunk] = state
        return state


def spacing(sizes: Sequence[int], budget: int) -> int:
    """Keep which inputs? Every s-th, the smallest s within ``budget`` bytes; 0: none.

    Args:
        sizes: bytes of what enters each block.

    >>> spacing([605] * 12, 10_000), spacing([605] * 12, 2_000), spacing([605] * 12, 700)
    (1, 4, 12)
    >>> spacing([605] * 12, 600)
    0
    """
    fitting = (s for s in range(1, len(sizes) + 1) if sum(sizes[::s]) <= budget)
    return next(fitting, 0)


def bytes_of(state: Any) -> int:
    """Of all tensors in a state (a tensor, or nested tuples, lists, dataclasses of them)."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    if hasattr(state, "__dict__"):
        return bytes_of(vars(state))
    if isinstance(state, Iterable) and not isinstance(state, (str, bytes)):
        return sum(map(bytes_of, state))
    return 0


def default_memory(device: torch.device) -> int:
    """A quarter of what is free where ``device`` computes; 4 GB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    free = free_memory()
    return 4_000_000_000 if free is None else free // 4
