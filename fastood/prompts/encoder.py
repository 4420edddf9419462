"""``PromptEncoder``: class prompts with learned vectors → text features, and back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastood.errors import ModelError
from fastood.prompts.bounded import Parts, bounded, direct
from fastood.prompts.full import FullPass
from fastood.prompts.layout import Ends, Position, PromptLayout, learned, start_of
from fastood.prompts.packed import INFERENCE_TOKENS, PackedPass, disagreement
from fastood.prompts.packing import Packing, pack, shared_length
from fastood.prompts.tower import TextTower, text_tower, token_embedding

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["PromptEncoder", "end_of_text"]


class PromptEncoder:
    """Text features of class prompts, differentiable in their learned vectors.

    In a causal tower the tokens before the first difference between prompts have the same keys and
    values for every class, and the tokens after the end of text change nothing. So the common
    prefix runs once, and of each class only its own tokens run, packed without padding.
    It computes what the full pass computes, to rounding.

    Three passes, the fastest that is exact being taken: ``"shared"`` as described; ``"packed"``
    where no context is common to all classes (contexts of their own, or the name in front: only the
    start token is shared); ``"full"`` through the model itself, whatever its tower. A slower pass
    than a context before the name would allow is announced by one warning.

    The tower must be causal, read its feature at the end of text, have absolute positions and no
    active dropout, and consist of known blocks; two random prompts are run both ways to see it.

    Args:
        encoder: an encoder with a text tower that shows its tokens (open_clip, Hugging Face).
            Parameters of it that require a gradient get theirs; freeze them for prompt tuning
            (``encoder.text_module().requires_grad_(False)``), or a step costs twice as much.
        layout: the prompts; see ``PromptEncoder.learned``.
        share: False runs every token of each prompt; True refuses a layout that shares no context;
            None shares where possible.
        chunk: train in bounded memory: at most that many prompts in a graph at a time, each run a
            second time in the backward pass. None keeps one graph.

    Attributes:
        path: the pass taken, ``"shared"``, ``"packed"`` or ``"full"``.
        reason: why it is not the fastest, or None.
        width: W of the learned vectors.

    The parts of the tower are looked up once: register parametrisations (low-rank updates) before
    or after, but build a new ``PromptEncoder`` after modules of the tower were replaced. There are
    no second derivatives.

    Raises:
        ModelError: if the encoder has no text tower whose prompts could be learned.
        ValueError: on a chunk below 1, a layout of another token window, or ``share=True`` where
            nothing can be shared.
    """

    def __init__(
        self,
        encoder: Encoder,
        layout: PromptLayout,
        *,
        share: bool | None = None,
        chunk: int | None = None,
    ) -> None:
        model = encoder.text_module()
        table = None if model is None else token_embedding(model)
        if model is None or table is None:
            raise ModelError(
                f"{encoder.name} has no text tower whose prompts could be learned; use an "
                f"open_clip or Hugging Face CLIP"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1 prompt, got {chunk}")
        self.layout = layout
        self._encoder, self._model, self._table, self._chunk = encoder, model, table, chunk
        weight: Any = table.weight
        self.width = int(weight.shape[-1])
        found = text_tower(model)
        self._tower = None if isinstance(found, str) else found
        self.path: Literal["shared", "packed", "full"]
        self.reason: str | None = found if isinstance(found, str) else None
        if self._tower is not None:
            self._check_window(self._tower.context_length)
            self._check_passes(self._tower)
        self._prefix = 0
        if self._tower is None:
            self.path = "full"
        else:
            self._prefix = 0 if share is False else shared_length(layout)
            self.path = "shared" if self._prefix > 1 else "packed"
            if share is not False:
                self.reason = self._unshared()
        if share and self.path != "shared":
            raise ValueError(f"share: expected a context all classes share, but {self.reason}")
        if self.reason is not None:
            how = {
                "shared": "share only a part of it and run slower",
                "packed": "share none of it and run slower",
                "full": "run through the whole token window, many times slower",
            }
            warnings.warn(
                f"{encoder.name}: {self.reason}; learned prompts {how[self.path]}, with the same "
                f"results",
                stacklevel=_caller(),
            )
        self._packings: dict[tuple[int, int], Packing] = {}

    @classmethod
    def learned(
        cls,
        encoder: Encoder,
        names: Sequence[str],
        *,
        n_ctx: int,
        position: Position = "end",
        class_specific: bool = False,
        share: bool | None = None,
        chunk: int | None = None,
    ) -> PromptEncoder:
        """Prompts ``X X X name.`` for an encoder; see ``layout.learned`` and the class."""
        layout = learned(
            encoder.tokenize,
            names,
            n_ctx=n_ctx,
            position=position,
            class_specific=class_specific,
            ends=end_of_text(encoder),
        )
        return cls(encoder, layout, share=share, chunk=chunk)

    def embed(self, text: str) -> Tensor:
        """(n, W) embeddings of the tokens of ``text``, to start a context from.

        float32, or float64 for such a tower.

        Raises:
            ValueError: if there are none.
        """
        start = start_of(self._encoder.tokenize)
        tokens = self._encoder.tokenize([text])
        assert tokens is not None  # start_of has seen some
        end = int(end_of_text(self._encoder)(tokens.long())[0])
        if end <= start:
            raise ValueError(f"text: expected at least one word, got {text!r}")
        with torch.no_grad():
            rows = self._table(tokens[0, start:end].long().to(self._device))
        return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)

    def __call__(self, context: Tensor | None = None, classes: slice | None = None) -> Tensor:
        """Text features, not normalised, in the dtype of the tower.

        Args:
            context: (n_ctx, W); class-specific (K, n_ctx, W); one per image (B, n_ctx, W); or None
                for prompts without one. float32 keeps its gradient in float32 whatever the tower.
            classes: encode only these rows of the layout, of which there may be none.
        Returns:
            (K, D), or (B, K, D) for contexts per image.
        Raises:
            ValueError: on a context that does not fit the layout.
        """
        batched = self._check_context(context)
        start, stop = self._span(classes)
        if stop <= start:
            return self._nothing(context, batched)
        packing = self._packing(start, stop)
        if context is not None and not batched and not self.layout.class_specific:
            context = context[None]
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        training = torch.is_grad_enabled() and (
            bool(parameters) or (context is not None and context.requires_grad)
        )
        images = len(context) if batched and context is not None else 1
        together, chunk = self._limits(packing, images, training)
        contexts = (context,) if context is None or not batched else context.split(together)
        found = []
        for part in contexts:
            parts = self._parts(packing, chunk)
            if training and self._chunk is not None:
                found.append(bounded(parts, part, parameters))
            else:
                found.append(direct(parts, part))
        out = torch.cat(found) if len(found) > 1 else found[0]
        if packing.back is not None:
            out = out.index_select(1, packing.back)
        return out if batched else out[0]

    def _parts(self, packing: Packing, chunk: int) -> Parts:
        if self._tower is None:
            encode = self._encoder.encode_tokens
            rows = packing.rows.cpu()
            return FullPass(encode, self._table, self.layout, rows, chunk)
        return PackedPass(self._tower, packing, chunk)

    def _limits(self, packing: Packing, images: int, training: bool) -> tuple[int, int]:
        """Images at once and prompts of one image at once."""
        count = len(packing.rows)
        window = self.layout.tokens.shape[1]
        longest = window if self._tower is None else packing.longest
        if training:
            limit = self._chunk or images * count
        else:
            limit = max(1, INFERENCE_TOKENS // longest)
        return max(1, min(images, limit // max(count, 1))), max(1, min(count, limit))

    def _span(self, classes: slice | None) -> tuple[int, int]:
        if classes is None:
            return 0, len(self.layout)
        start, stop, step = classes.indices(len(self.layout))
        if step != 1:
            raise ValueError(f"classes: expected a slice without a step, got {classes}")
        return start, stop

    def _nothing(self, context: Tensor | None, batched: bool) -> Tensor:
        """Features of no class, which still have a gradient to give: zero."""
        shape = (len(context), 0) if batched and context is not None else (0,)
        base = context if context is not None else torch.zeros(0, device=self._device)
        dtype = self._encoder.dtype if self._tower is None else self._tower.dtype
        return base.flatten()[:0].view(*shape, self._encoder.embed_dim).to(dtype)

    @property
    def _device(self) -> torch.device:
        weight: Any = self._table.weight
        return weight.device

    def _packing(self, start: int, stop: int) -> Packing:
        found = self._packings.get((start, stop))
        if found is None:
            found = pack(self.layout, self._prefix, slice(start, stop)).to(self._device)
            self._packings[start, stop] = found
        return found

    def _check_context(self, context: Tensor | None) -> bool:
        """True for one context per image."""
        layout, k = self.layout, len(self.layout)
        shape = None if context is None else tuple(context.shape)
        one = (layout.n_ctx, self.width)
        if layout.class_specific:
            wanted, fits, batched = f"({k}, {one[0]}, {one[1]})", shape == (k, *one), False
        elif not layout.n_ctx:
            wanted, fits, batched = "None (nothing is learned)", context is None, False
        else:
            wanted = f"{one} or (B, {one[0]}, {one[1]})"
            batched = shape is not None and len(shape) == 3 and shape[0] > 0
            fits = shape is not None and shape[-2:] == one and (len(shape) == 2 or batched)
        if not fits or (context is not None and not context.is_floating_point()):
            raise ValueError(
                f"context: expected {wanted} of floats, got {shape}; were the vectors learned for "
                f"another tower, prompt length or class list?"
            )
        return batched

    def _check_window(self, window: int) -> None:
        got = self.layout.tokens.shape[1]
        if got > window or int(self.layout.ends.max()) >= window:
            raise ValueError(
                f"layout: expected prompts of at most {window} tokens, got {got}; was it made "
                f"with another tokenizer?"
            )

    @torch.no_grad()
    def _check_passes(self, tower: TextTower) -> None:
        """Run two random prompts of unequal length by the fast and by the full pass."""
        layout, context = _probe(self.layout, tower)
        packing = pack(layout, shared_length(layout)).to(tower.device)
        fast = direct(PackedPass(tower, packing, 2), context)[0]
        rows = torch.arange(2)
        slow = direct(FullPass(self._encoder.encode_tokens, self._table, layout, rows, 2), context)
        if packing.back is not None:
            fast = fast.index_select(0, packing.back)
        worst = disagreement(slow[0], fast)
        if worst is not None:
            self._tower = None
            self.reason = f"its text tower changes features by {worst:.1e} when run in parts"

    def _unshared(self) -> str | None:
        layout = self.layout
        shared = int((layout.context[0, : self._prefix] >= 0).sum())
        if shared == layout.n_ctx:
            return None
        if layout.class_specific:
            return "each class has a learned context of its own"
        if shared:
            return f"the name stands inside the context, {shared} tokens of which stand before it"
        return "the name stands before the context"


def end_of_text(encoder: Encoder) -> Ends:
    """Tokens (N, L) → (N,) positions of the end of text, as the encoder's tower finds it."""
    model = encoder.text_module()
    found = text_tower(model) if model is not None else "none"
    return _before_padding if isinstance(found, str) else found.ends


def _caller() -> int:
    """Stack level of the first frame outside this package, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fastood."):
        level, frame = level + 1, frame.f_back
    return level


def _before_padding(tokens: Tensor) -> Tensor:
    """(N,) where the repeats of the last id begin, for towers whose end of text is not known."""
    differs = tokens != tokens[:, -1:]
    at = torch.arange(1, tokens.shape[1] + 1)
    return (differs * at).amax(dim=-1).clamp_max(tokens.shape[1] - 1)


def _probe(layout: PromptLayout, tower: TextTower) -> tuple[PromptLayout, Tensor | None]:
    """Two prompts of random words of unequal length, with a random context before them."""
    g = torch.Generator().manual_seed(0)
    row, end = layout.tokens[0], int(layout.ends[0])
    window = len(row)
    eot, count = int(row[end]), max(1, min(layout.n_ctx, window - 6))
    # words below the end-of-text id, so that it stays the largest and the first
    size = len(next(tower.embedding.parameters()))
    below = min(1000, size, eot) if eot > 3 else min(1000, size)
    words = torch.randint(3, max(4, below), (2, window), generator=g)
    tokens = torch.full((2, window), int(row[-1]) if end < window - 1 else 0)
    context = torch.full_like(tokens, -1)
    ends = torch.tensor([min(window - 1, 1 + count + n) for n in (1, 4)])
    for k, e in enumerate(ends.tolist()):
        tokens[k, :e] = words[k, :e]
        tokens[k, 0], tokens[k, e] = row[0], eot
        tokens[k, 1 : 1 + count] = words[0, 0]
        context[k, 1 : 1 + count] = torch.arange(count)
    vectors = torch.randn(1, count, tower.width, generator=g)
    scale = float(next(tower.embedding.parameters()).detach().float().std())
    made = PromptLayout(tokens, ends, context, count)
    return made, (vectors * scale).to(tower.device)
