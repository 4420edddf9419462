"""Prompts cut into a part all share and packed parts of their own, sorted by length.

Everything a pass needs to know is in index tensors made here, once: a pass neither synchronises
with the host nor has shapes that depend on data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastood.prompts.layout import PromptLayout

__all__ = ["Bucket", "Packing", "pack", "shared_length"]


class Bucket(NamedTuple):
    """Prompts with equally long suffixes, one after the other."""

    prompts: int
    length: int


@dataclass(frozen=True)
class Packing:
    """K prompts as one prefix of P tokens and U <= K suffixes of N tokens together.

    Attributes:
        prefix_ids: (P,) token ids shared by all prompts.
        prefix_slots: (R,) their positions that hold context, rows 0..R-1.
        ids, positions: (N,) of the suffix tokens, suffixes in order of length.
        slots: (U·S,) packed positions that hold context rows R..n_ctx-1, by suffix.
        rows: (U,) which prompt each suffix was made of (the first of equal ones).
        ends: (U,) packed position of each end of text.
        back: (K,) suffix of each prompt; None if they are the prompts in order.
        buckets: the suffixes, sum of prompts = U, sum of prompts · length = N.
        n_ctx, class_specific: as in the layout.
    """

    prefix_ids: Tensor
    prefix_slots: Tensor
    ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    ends: Tensor
    back: Tensor | None
    buckets: tuple[Bucket, ...]
    n_ctx: int
    class_specific: bool

    @property
    def prefix(self) -> int:
        """P"""
        return len(self.prefix_ids)

    @property
    def prefix_rows(self) -> int:
        """R: rows of the context that stand in the prefix."""
        return len(self.prefix_slots)

    @property
    def longest(self) -> int:
        """Tokens of the longest suffix."""
        return self.buckets[-1].length

    def to(self, device: torch.device) -> Packing:
        if device.type == "cpu":
            return self
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def part(self, start: int, stop: int) -> Packing:
        """Suffixes ``start:stop`` alone, without a way back to the prompts."""
        buckets, token, first = [], 0, None
        seen = 0
        for count, length in self.buckets:
            low, high = max(start, seen), min(stop, seen + count)
            if low < high:
                if first is None:
                    first = token + (low - seen) * length
                buckets.append(Bucket(high - low, length))
            seen, token = seen + count, token + count * length
        first = first or 0
        size = sum(b.prompts * b.length for b in buckets)
        each = len(self.slots) // len(self.rows)
        return Packing(
            self.prefix_ids,
            self.prefix_slots,
            self.ids[first : first + size],
            self.positions[first : first + size],
            self.slots[start * each : stop * each] - first,
            self.rows[start:stop],
            self.ends[start:stop] - first,
            None,
            tuple(buckets),
            self.n_ctx,
            self.class_specific,
        )


def shared_length(layout: PromptLayout) -> int:
    """P: leading positions that are the same in all prompts, ends of text left out."""
    tokens, context = layout.tokens, layout.context
    same = (tokens == tokens[:1]).all(0) & (context == context[:1]).all(0)
    if layout.class_specific:
        same &= context[0] < 0
    differ = (~same).nonzero()
    first = int(differ[0]) if len(differ) else tokens.shape[1]
    return min(first, int(layout.ends.min()))


def pack(layout: PromptLayout, prefix: int, classes: slice | None = None) -> Packing:
    """``layout`` with its first ``prefix`` tokens shared; only the prompts of ``classes``.

    Equal prompts become one suffix, so that their features are the same to the last bit.
    """
    chosen = torch.arange(len(layout))[classes if classes is not None else slice(None)]
    ends = layout.ends[chosen].tolist()
    tokens, context = layout.tokens[chosen], layout.context[chosen]
    keys: dict[tuple[int, ...], int] = {}
    index = []
    for i, (row, at, end) in enumerate(zip(tokens.tolist(), context.tolist(), ends, strict=True)):
        # a class's own context makes it differ from all others
        own = (i,) if layout.class_specific else ()
        key = (*own, *row[prefix : end + 1], *at[prefix : end + 1])
        index.append(keys.setdefault(key, i))
    distinct = sorted(keys.values(), key=lambda i: (ends[i], i))
    rank = {i: r for r, i in enumerate(distinct)}
    back = [rank[i] for i in index]

    lengths = [ends[i] + 1 - prefix for i in distinct]
    buckets: list[Bucket] = []
    for length in lengths:
        if buckets and buckets[-1].length == length:
            buckets[-1] = Bucket(buckets[-1].prompts + 1, length)
        else:
            buckets.append(Bucket(1, length))
    spans = [(i, torch.arange(prefix, ends[i] + 1)) for i in distinct]
    held = torch.cat([context[i, span] for i, span in spans]) if spans else chosen[:0]
    empty = torch.zeros(0, dtype=torch.int64)
    return Packing(
        prefix_ids=layout.tokens[0, :prefix],
        prefix_slots=(layout.context[0, :prefix] >= 0).nonzero().flatten(),
        ids=torch.cat([tokens[i, span] for i, span in spans]) if spans else empty,
        positions=torch.cat([span for _, span in spans]) if spans else empty,
        slots=(held >= 0).nonzero().flatten(),
        rows=chosen[torch.tensor(distinct, dtype=torch.int64)],
        ends=torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1,
        back=None if back == list(range(len(distinct))) else torch.tensor(back),
        buckets=tuple(buckets),
        n_ctx=layout.n_ctx,
        class_specific=layout.class_specific,
    )
