"""The parts of a causal text tower that reads its feature at the end of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastood.models.blocks import Block, as_block, layer_norm, linear

__all__ = ["TextTower", "text_tower", "token_embedding"]


@dataclass(frozen=True)
class TextTower:
    """What a token meets on its way to a feature.

    The feature of a prompt is read at its end-of-text token, and no token sees what stands behind
    it. So the tokens after the end of text change nothing and need not be run.
    """

    owner: Any
    """The module that holds the parts, named as messages name it."""
    width: int
    context_length: int
    blocks: tuple[Block, ...]
    embedding: nn.Module
    positions: Callable[[], Tensor]
    """(L, W) absolute positional embedding."""
    norm: nn.LayerNorm
    projection: Callable[[], Tensor | nn.Module | None]
    """(W, D), a linear layer, or nothing."""
    ends: Callable[[Tensor], Tensor]
    """Tokens (N, L) → (N,) positions of the end of text."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the token vectors between blocks."""
        return self.blocks[0].fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def vectors(self, ids: Tensor) -> Tensor:
        """(..., W) embeddings of token ids, without positions."""
        return self.embedding(ids)

    def read(self, x: Tensor) -> Tensor:
        """(..., D) features from the last block's end-of-text tokens (..., W)."""
        x = layer_norm(self.norm, x)
        projection = self.projection()
        if projection is None:
            return x
        if isinstance(projection, nn.Linear):
            return linear(x, projection.weight, projection.bias)
        assert isinstance(projection, Tensor)
        return x @ projection.to(x.dtype)


def text_tower(model: nn.Module) -> TextTower | str:
    """The causal text tower of an open_clip or Hugging Face CLIP, or why it cannot be used.

    It can if: the mask is causal; no class embedding is appended (CoCa); the feature is read at
    the largest or the first end-of-text id; positions are absolute; dropout is off; and every
    block is on the list of ``blocks.py``.
    """
    kind = type(model).__module__.split(".")[0]
    if kind == "open_clip" or hasattr(model, "token_embedding") or hasattr(model, "text"):
        return _open_clip(model)
    if getattr(getattr(model, "config", None), "model_type", None) == "clip":
        return _hugging_face(model)
    return f"the text tower of {type(model).__name__} is not one of CLIP's"


def token_embedding(model: Any) -> nn.Module | None:
    """The module that turns token ids into vectors, of any tower that has one."""
    text = getattr(model, "text", None)
    for owner in (model, text):
        if owner is not None and hasattr(owner, "token_embedding"):
            return owner.token_embedding
    inner = getattr(text, "transformer", None) or getattr(model, "text_model", None)
    found = getattr(inner, "get_input_embeddings", lambda: None)() if inner is not None else None
    if found is None and inner is not None:
        found = getattr(getattr(inner, "embeddings", None), "token_embedding", None)
    return found


def _open_clip(model: Any) -> TextTower | str:
    if hasattr(model, "token_embedding"):
        owner, pool = model, getattr(model, "text_pool_type", "argmax")
        eos = getattr(model, "text_eos_id", None)
    else:
        owner = getattr(model, "text", None)
        if not hasattr(owner, "token_embedding"):
            return f"its text tower is a {type(owner).__name__}"
        pool, eos = getattr(owner, "pool_type", "argmax"), getattr(owner, "eos_id", None)
    if getattr(owner, "cls_emb", None) is not None:
        return "a class embedding is appended to the text (CoCa)"
    if getattr(owner, "use_pad_mask", False):
        return "padding is masked out"
    if pool not in ("argmax", "eos"):
        return f"the feature is read at {pool!r}, not at the end of text"
    if pool == "eos" and not isinstance(eos, int):
        return "its end-of-text id is not known"
    mask = getattr(owner, "attn_mask", None)
    if not isinstance(mask, Tensor) or not _causal(mask):
        return "its attention is not causal"
    blocks = _blocks(owner.transformer.resblocks)
    if isinstance(blocks, str):
        return blocks
    return TextTower(
        owner=owner,
        width=owner.positional_embedding.shape[1],
        context_length=owner.positional_embedding.shape[0],
        blocks=blocks,
        embedding=owner.token_embedding,
        positions=lambda: owner.positional_embedding,
        norm=owner.ln_final,
        projection=lambda: owner.text_projection,
        ends=_first_id(int(eos or 0)) if pool == "eos" else _largest_id,
    )


def _hugging_face(model: Any) -> TextTower | str:
    owner = model.text_model
    owner = getattr(owner, "text_model", owner)  # some versions wrap it once more
    eos = getattr(model.config.text_config, "eos_token_id", None)
    if not isinstance(eos, int):
        return "its end-of-text id is not known"
    blocks = _blocks(owner.encoder.layers)
    if isinstance(blocks, str):
        return blocks
    table = owner.embeddings.position_embedding
    return TextTower(
        owner=owner,
        width=table.weight.shape[1],
        context_length=table.weight.shape[0],
        blocks=blocks,
        embedding=owner.embeddings.token_embedding,
        positions=lambda: table.weight,
        norm=owner.final_layer_norm,
        projection=lambda: model.text_projection,
        # 2 marks old configurations, where the model itself takes the largest id
        ends=_largest_id if eos == 2 else _first_id(eos),
    )


def _blocks(modules: Any) -> tuple[Block, ...] | str:
    found = [as_block(m) for m in modules]
    for block in found:
        if isinstance(block, str):
            return block
    return tuple(found) or "it has no blocks"  # type: ignore[arg-type]


def _largest_id(tokens: Tensor) -> Tensor:
    return tokens.argmax(dim=-1)


def _first_id(eos: int) -> Callable[[Tensor], Tensor]:
    return lambda tokens: torch.eq(tokens, eos).int().argmax(dim=-1)


def _causal(mask: Tensor) -> bool:
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((torch.isneginf(mask) == later).all()) and bool((mask[~later] == 0).all())
