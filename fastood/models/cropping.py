"""Text towers run only as far as their longest prompt.

A causal text tower that reads its feature at the end-of-text token never looks behind it, so the
positions after the longest end of text in a batch are padding that costs time (a class prompt has
about 8 of 77 tokens) and changes nothing. The blocks run with the positional embedding and the
causal mask cut to that length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CausalText", "ContextCrop"]

_PROBE = ("a", "a photo of a small brown dog, a type of pet.")

# Normalised features; a tower that does look behind the end of text differs by 0.01 and more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class ContextCrop:
    """Chooses between the cropped and the full pass of one text tower.

    Args:
        full: tokens (N, L) → features (N, D).
        cropped: the same over as many positions as needed, or None where that is undefined.
        tokenize: prompts → tokens.
    """

    def __init__(
        self,
        full: Callable[[Tensor], Tensor],
        cropped: Callable[[Tensor], Tensor] | None,
        tokenize: Callable[[tuple[str, ...]], Tensor],
    ) -> None:
        self._full = full
        self._cropped = cropped
        self._tokenize = tokenize
        self._checked = False

    @property
    def usable(self) -> bool:
        """False once the towers' own check has failed, or without a cropped pass."""
        return self._cropped is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._cropped is not None and not self._checked:
            self._check(self._cropped, tokens.device)
        run = self._full if self._cropped is None else self._cropped
        return run(tokens)

    def _check(self, cropped: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Compare both passes once, on two prompts of different length."""
        self._checked = True
        tokens = self._tokenize(_PROBE).to(device)
        full = self._full(tokens)
        part = cropped(tokens)
        gap = F.normalize(full.double(), dim=-1) - F.normalize(part.double(), dim=-1)
        worst = float(gap.abs().max())
        if not worst <= _TOLERANCE.get(full.dtype, 1e-4):
            self._cropped = None
            warnings.warn(
                f"the text tower changes its features by {worst:.1e} when run only up to the end "
                f"of text; running the full context instead (slower, same results as the model)",
                stacklevel=4,
            )


@dataclass(frozen=True)
class CausalText:
    """The parts of an open_clip text tower whose feature is read at the end of text."""

    owner: Any
    """The module holding embedding, transformer, mask and projection."""
    pool_type: str
    eos_id: int

    @classmethod
    def of(cls, model: nn.Module) -> CausalText | None:
        """The parts of an open_clip model, or None if its text tower cannot be cropped."""
        from open_clip import CLIP
        from open_clip.transformer import TextTransformer

        owner: Any
        if isinstance(model, CLIP):
            owner, pool = model, getattr(model, "text_pool_type", "argmax")
            eos = getattr(model, "text_eos_id", 2)
        elif isinstance(getattr(model, "text", None), TextTransformer):
            owner = model.text
            pool, eos = owner.pool_type, getattr(owner, "eos_id", 2)
            if owner.cls_emb is not None or getattr(owner, "use_pad_mask", False):
                return None
        else:
            return None
        mask = getattr(owner, "attn_mask", None)
        if pool not in ("argmax", "eos") or not isinstance(mask, Tensor) or not _causal(mask):
            return None
        return cls(owner, pool, eos)

    def ends(self, tokens: Tensor) -> Tensor:
        """(N,) position of the end of text."""
        if self.pool_type == "eos":
            return torch.eq(tokens, self.eos_id).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)

    def __call__(self, tokens: Tensor) -> Tensor:
        owner = self.owner
        ends = self.ends(tokens)
        length = int(ends.max()) + 1
        tokens = tokens[:, :length]
        dtype = owner.transformer.get_cast_dtype()
        x = owner.token_embedding(tokens).to(dtype) + owner.positional_embedding[:length].to(dtype)
        x = owner.transformer(x, attn_mask=owner.attn_mask[:length, :length])
        x = owner.ln_final(x)[torch.arange(len(x), device=x.device), ends]
        projection = owner.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _causal(mask: Tensor) -> bool:
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((torch.isneginf(mask) == later).all()) and bool((mask[~later] == 0).all())
