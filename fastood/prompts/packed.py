"""Packed prompts of one tower, in parts: what ``PromptEncoder`` and ``encode_text`` run."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.prompts.forest import common_beginnings, forest_pass
from fastood.prompts.packing import Packing
from fastood.prompts.shared import prefix_pass, suffix_pass
from fastood.prompts.tower import TextTower, text_tower

__all__ = ["INFERENCE_TOKENS", "PackedPass", "TextPass", "disagreement"]

INFERENCE_TOKENS = 1 << 15
"""Tokens run at once where nothing is differentiated: 0.3 GB at width 512 in float32."""

# Normalised features; a tower that does look behind the end of text differs by 0.01 and more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class PackedPass:
    """Prefix once, packed suffixes in parts of at most ``chunk`` prompts."""

    def __init__(self, tower: TextTower, packing: Packing, chunk: int) -> None:
        self._tower = tower
        count = len(packing.rows)
        whole = chunk >= count
        cuts = (
            []
            if whole
            else [packing.part(a, min(a + chunk, count)) for a in range(0, count, chunk)]
        )
        self._parts = [packing] if whole else cuts

    @property
    def sizes(self) -> list[int]:
        """Prompts in each part."""
        return [len(p.rows) for p in self._parts]

    def shared(self, context: Tensor | None) -> list[Tensor]:
        """Keys and values of the prefix, block by block."""
        packing = self._parts[0]
        used = context if packing.prefix_rows else None
        state = prefix_pass(self._tower, packing, used)
        return [] if state is None else [x for pair in state for x in pair]

    def part(self, index: int, context: Tensor | None, shared: list[Tensor]) -> Tensor:
        """Features (B, U_i, D) of one part."""
        state = list(zip(shared[::2], shared[1::2], strict=True)) or None
        return suffix_pass(self._tower, self._parts[index], context, state)


def disagreement(one: Tensor, other: Tensor) -> float | None:
    """By how much features (N, D) of two passes differ, if by more than their precision does."""
    gap = F.normalize(one.double(), dim=-1) - F.normalize(other.double(), dim=-1)
    worst = float(gap.abs().max())
    return None if worst <= _TOLERANCE.get(one.dtype, 1e-4) else worst


class TextPass:
    """Features of ordinary prompts by the cheapest exact pass.

    Args:
        model: an open_clip or Hugging Face model.
        full: tokens (N, L) → features (N, D) by the model itself.
        probe: two prompts of unequal length as tokens; both passes must agree on them.
    """

    def __init__(
        self, model: nn.Module, full: Callable[[Tensor], Tensor], probe: Callable[[], Tensor]
    ) -> None:
        self._model = model
        self._full = full
        self._probe = probe
        self._agrees: bool | None = None

    @property
    def usable(self) -> bool:
        """False where every position has to be run."""
        return self._tower() is not None

    def _tower(self) -> TextTower | None:
        """Looked up anew for every call: adapter libraries replace modules of a loaded model."""
        found = text_tower(self._model) if self._agrees is not False else "passes disagree"
        return None if isinstance(found, str) else found

    def __call__(self, tokens: Tensor) -> Tensor:
        """(N, D) features of tokens (N, L); equal rows give equal bits."""
        tower = self._tower()
        if tower is not None and self._agrees is None:
            probe = self._probe()
            worst = disagreement(self._full(probe), self._packed(tower, probe))
            self._agrees = worst is None
            if worst is not None:
                tower = None
                warnings.warn(
                    f"the text tower changes its features by {worst:.1e} when run only up to the "
                    f"end of text; running the full context instead (slower, same results as the "
                    f"model)",
                    stacklevel=3,
                )
        return self._full(tokens) if tower is None else self._packed(tower, tokens)

    def _packed(self, tower: TextTower, tokens: Tensor) -> Tensor:
        ends = tower.ends(tokens).cpu()
        tokens = tokens.cpu()
        rows = zip(tokens.tolist(), ends.tolist(), strict=True)
        prompts = [tuple(row[: end + 1]) for row, end in rows]
        index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        distinct = list(index)
        where = {p: i for i, p in reversed(list(enumerate(prompts)))}
        first = torch.tensor([where[p] for p in distinct])
        step = max(1, INFERENCE_TOKENS // max(map(len, distinct)))
        found = []
        for some in first.split(step):
            groups = common_beginnings([prompts[i] for i in some.tolist()])
            found.append(forest_pass(tower, tokens[some], ends[some], groups))
        features = torch.cat(found) if len(found) > 1 else found[0]
        if len(distinct) == len(prompts):
            return features
        return features.index_select(0, torch.tensor([index[p] for p in prompts]).to(tower.device))
