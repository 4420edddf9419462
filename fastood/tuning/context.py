"""Learned contexts: how long they are and where they start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastood.data.prompts import clean_name
from fastood.errors import ModelError
from fastood.prompts.encoder import PromptEncoder, end_of_text
from fastood.scores.inputs import check_count

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["initial_context", "prompt_encoder"]

_STD = 0.02


def prompt_encoder(
    encoder: Encoder,
    words: Sequence[str],
    *,
    n_ctx: int | None,
    ctx_init: str | None,
    default: int,
    position: Literal["end", "middle", "front"] = "end",
    class_specific: bool = False,
    chunk: int | None = None,
) -> PromptEncoder:
    """The encoder of ``[v1 .. vM] [name].`` for K names.

    Args:
        n_ctx: M; None means the tokens of ``ctx_init``, without it ``default``.
        ctx_init: text whose tokens the context starts from.
        chunk: classes in memory for a backward pass at a time, None for all.
    Returns:
        ``PromptEncoder``. The text module of the encoder is frozen (``requires_grad_(False)``).
    Raises:
        ValueError: ``n_ctx`` and ``ctx_init`` that disagree; a context or names that overflow
            the token window.
        ModelError: an encoder without a text tower that shows its tokens.
    """
    if encoder.text is None or encoder.tokenize(["X"]) is None:
        raise ModelError(
            f"{encoder.name} has no text tower whose tokens are known; prompts cannot be learned"
        )
    if chunk is not None:
        chunk = check_count("chunk", chunk, 1, None)
    if ctx_init is not None:
        tokens = _count(encoder, ctx_init)
        if n_ctx is not None and n_ctx != tokens:
            raise ValueError(
                f"n_ctx: expected {tokens}, the number of tokens of ctx_init {ctx_init!r}, got "
                f"{n_ctx}; give only one of them (ctx_init=None starts from random vectors)"
            )
        n_ctx = tokens
    module = encoder.text_module()
    if module is not None:
        module.requires_grad_(False)  # or every step computes the gradients of the whole tower
    return PromptEncoder.learned(
        encoder,
        words,
        n_ctx=default if n_ctx is None else n_ctx,
        position=position,
        class_specific=class_specific,
        chunk=chunk,
    )


def initial_context(prompts: PromptEncoder, *, ctx_init: str | None, seed: int) -> Tensor:
    """(M, W) vectors to start from, at least float32, (K, M, W) if class-specific.

    The embeddings of ``ctx_init``, the same for every class, or N(0, 0.02) from a private
    generator: the same numbers on every machine and device.
    """
    layout = prompts.layout
    shape: tuple[int, ...] = (layout.n_ctx, prompts.width)
    if layout.class_specific:
        shape = (len(layout), *shape)
    seed = check_count("seed", seed, 0, 2**63 - 1)
    if ctx_init is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator) * _STD
    # a tower whose end of text is not known may count it among the words
    rows = prompts.embed(clean_name(ctx_init))[: layout.n_ctx]
    return rows.expand(shape).clone()


def _count(encoder: Encoder, text: str) -> int:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"ctx_init: expected text such as 'a photo of a', got {text!r}")
    tokens = encoder.tokenize([clean_name(text), ""])
    assert tokens is not None  # asked before
    one, none = end_of_text(encoder)(tokens.long().cpu()).tolist()
    return int(one - none)
