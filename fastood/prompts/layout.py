"""What stands at each position of each class prompt: a word's token or a row of the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Ends", "Position", "PromptLayout", "fixed", "learned", "start_of"]

Position = Literal["end", "middle", "front"]
Ends = Callable[[Tensor], Tensor]

PLACEHOLDER = "X"


@dataclass(frozen=True)
class PromptLayout:
    """K prompts of one token window, some of whose positions are learned.

    Attributes:
        tokens: (K, L) int64 on the CPU, placeholder ids where the context stands.
        ends: (K,) int64, position of the end-of-text token, found on the placeholder ids.
        context: (K, L) int64, row of the context that replaces the embedding there; -1 keeps the
            token's own.
        n_ctx: rows of the context; every prompt holds each of them once, in order.
        class_specific: each class has a context of its own, (K, n_ctx, W).

    Raises:
        ValueError: on tensors that do not fit each other.
    """

    tokens: Tensor
    ends: Tensor
    context: Tensor
    n_ctx: int
    class_specific: bool = False

    def __post_init__(self) -> None:
        tokens, ends, context = self.tokens, self.ends, self.context
        if tokens.ndim != 2 or not len(tokens) or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens: expected (K, L) int64 with K >= 1, got {tuple(tokens.shape)} "
                f"{tokens.dtype}; one row of token ids for each prompt"
            )
        if ends.shape != tokens.shape[:1] or context.shape != tokens.shape:
            raise ValueError(
                f"ends, context: expected {tuple(tokens.shape[:1])} and {tuple(tokens.shape)} to "
                f"match tokens, got {tuple(ends.shape)} and {tuple(context.shape)}"
            )
        if bool((ends < 0).any()) or bool((ends >= tokens.shape[1]).any()):
            raise ValueError(f"ends: expected positions below {tokens.shape[1]}, got {ends}")
        learned = context >= 0
        rows = context[learned]
        wanted = torch.arange(self.n_ctx).repeat(len(tokens))
        at = torch.arange(tokens.shape[1])
        if not torch.equal(rows, wanted):
            raise ValueError(
                f"context: expected rows 0..{self.n_ctx - 1} once in every prompt, in order"
            )
        if bool((learned & (at > ends[:, None])).any()):
            raise ValueError("context: expected all of it before the end of text")

    def __len__(self) -> int:
        return len(self.tokens)


def fixed(tokens: Tensor, ends: Tensor) -> PromptLayout:
    """Ordinary prompts, nothing learned: tokens (K, L), ends (K,)."""
    tokens, ends = tokens.long().cpu(), ends.long().cpu()
    return PromptLayout(tokens, ends, torch.full_like(tokens, -1), 0)


def learned(
    tokenize: Callable[[Sequence[str]], Tensor | None],
    names: Sequence[str],
    *,
    n_ctx: int,
    position: Position = "end",
    class_specific: bool = False,
    ends: Ends | None = None,
) -> PromptLayout:
    """``X X X name.`` with n_ctx placeholders for learned vectors, as CoOp writes its prompts.

    Args:
        tokenize: prompts → (N, L) token ids, for example an encoder's ``tokenize``.
        names: K class names, as they shall be read.
        n_ctx: number of context tokens.
        position: of the name: ``"end"`` (context first), ``"middle"`` (between the halves of the
            context, the first half being the smaller) or ``"front"``. The full stop stays last.
        class_specific: a context for each class.
        ends: tokens (N, L) → positions (N,) of the end of text; default the largest id.
    Returns:
        ``PromptLayout``. The tokens are those of ``X X X name.``, moved where the name is not last.
    Raises:
        ValueError: no names; n_ctx < 1; a context or names that overflow the token window (names
            them); a tokenizer that does not make one token of each placeholder.
    Notes:
        Source: arXiv 2109.01134.
    """
    if isinstance(names, str) or not len(names):
        raise ValueError(f"names: expected a list of at least one class name, got {names!r}")
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 1:
        raise ValueError(f"n_ctx: expected at least 1 context token, got {n_ctx!r}")
    if position not in ("end", "middle", "front"):
        raise ValueError(f"position: expected 'end', 'middle' or 'front', got {position!r}")
    ends = ends or (lambda tokens: tokens.argmax(dim=-1))
    probe = _tokens(tokenize, [PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"])
    window = probe.shape[1]
    if n_ctx > window - 3:  # start, full stop and end of text need a place
        raise ValueError(
            f"n_ctx: expected a context that fits the token window of {window} beside start and "
            f"end, got {n_ctx}; use at most {window - 4} for one-token names"
        )
    one, two = ends(probe).tolist()
    start = start_of(tokenize)
    short = _tokens(tokenize, [f"{PLACEHOLDER} {name}." for name in names])
    tokens = _tokens(tokenize, [" ".join([PLACEHOLDER] * n_ctx + [f"{n}."]) for n in names])
    last = ends(short) + n_ctx - 1
    _check_lengths(names, last, window, n_ctx)
    grown = ends(tokens)
    moved = [
        torch.equal(a[start + n_ctx : e + 1], b[start + 1 : e - n_ctx + 2])
        for a, b, e in zip(tokens, short, last.tolist(), strict=True)
    ]
    if two - one != 1 or start < 0 or not torch.equal(grown, last) or not all(moved):
        raise ValueError(
            f"tokenize: expected one token for each placeholder {PLACEHOLDER!r}, got ends "
            f"{grown.tolist()[:5]} where {last.tolist()[:5]} follow from shorter prompts; this "
            "tokenizer cannot be used with learned contexts"
        )
    lengths = [0] * len(names)
    if position != "end":  # as CoOp counts: tokens of the name alone, without its full stop
        alone = ends(_tokens(tokenize, list(names))) - start
        lengths = torch.minimum(alone, last - start - n_ctx).tolist()
    half = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    context = torch.full_like(tokens, -1)
    order = torch.arange(window).repeat(len(names), 1)
    for k, length in enumerate(lengths):
        begin = start + n_ctx
        head = list(range(start, start + half))
        name = list(range(begin, begin + length))
        tail = list(range(start + half, begin))
        order[k, start : begin + length] = torch.tensor(head + name + tail)
    is_context = (order >= start) & (order < start + n_ctx)
    context[is_context] = order[is_context] - start
    return PromptLayout(tokens.gather(1, order), last, context, n_ctx, class_specific)


def start_of(tokenize: Callable[[Sequence[str]], Tensor | None]) -> int:
    """Position of a prompt's first word: 1 behind a start token, 0 without one."""
    one, two = _tokens(tokenize, [PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"])
    return int((one != two).int().argmax()) - 1


def _tokens(tokenize: Callable[[Sequence[str]], Tensor | None], prompts: Sequence[str]) -> Tensor:
    tokens = tokenize(prompts)
    if tokens is None:
        raise ValueError("tokenize: expected (N, L) token ids, got None; this encoder shows none")
    return tokens.long().cpu()


def _check_lengths(names: Sequence[str], last: Tensor, window: int, n_ctx: int) -> None:
    long = [names[i] for i in (last >= window).nonzero().flatten().tolist()]
    if long:
        raise ValueError(
            f"names: {len(long)} do not fit the token window of {window} together with {n_ctx} "
            f"context tokens: {', '.join(repr(n) for n in long[:5])}; shorten them or the context"
        )
