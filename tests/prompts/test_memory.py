"""Bytes saved for the backward pass: they are the same in every run, so a test may count them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import peers_tuning
from tests.prompts.towers import context_of, learned, open_clip_encoder

NAMES = [
    f"{a} {b}"
    for a in ("cat", "dog", "long-haired hen", "fox")
    for b in ("in snow", "outside", "of wood", "here")
]


def saved_bytes(model: Any, call: Callable[[], Any]) -> int:
    """Of distinct storages kept by the graph of ``call``, weights and buffers left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    assert result.requires_grad
    return sum(s.nbytes() for s in kept.values())


def test_a_shared_prefix_keeps_a_tenth_of_the_full_pass():
    encoder = open_clip_encoder({"width": 64, "heads": 1, "layers": 4}, dtype=torch.float32)
    prompts = learned(encoder, NAMES, n_ctx=16)
    context, layout = context_of(prompts, dtype=torch.float32), prompts.layout

    def plain() -> torch.Tensor:
        vectors = peers_tuning.plain_prompts(encoder.model, layout.tokens, layout.context, context)
        return peers_tuning.plain_text_features(encoder.model, vectors, layout.ends)

    ours = saved_bytes(encoder.model, lambda: prompts(context))
    theirs = saved_bytes(encoder.model, plain)
    tokens = prompts._packing(0, len(NAMES))
    fewer = 77 * len(NAMES) / (tokens.prefix + len(tokens.ids))
    assert theirs / ours > 0.9 * fewer > 10


def test_quick_gelu_keeps_one_tensor():
    sizes = []
    for quick in (False, True):
        encoder = open_clip_encoder(dtype=torch.float32, quick_gelu=quick)
        prompts = learned(encoder, NAMES, n_ctx=4)
        context = context_of(prompts, dtype=torch.float32)
        sizes.append(saved_bytes(encoder.model, lambda p=prompts, c=context: p(c)))
    assert sizes[0] == sizes[1]


def test_bounded_training_keeps_nothing_but_its_input():
    encoder = open_clip_encoder(dtype=torch.float32)
    bounded = learned(encoder, NAMES, n_ctx=4, chunk=2)
    context = context_of(bounded, dtype=torch.float32)
    assert saved_bytes(encoder.model, lambda: bounded(context)) <= 2 * context.numel() * 4


def test_bounded_training_keeps_one_part_at_a_time():
    encoder = open_clip_encoder(dtype=torch.float32)

    def largest(chunk: int) -> int:
        prompts = learned(encoder, NAMES, n_ctx=4, chunk=chunk)
        context = context_of(prompts, dtype=torch.float32)
        features = prompts(context)
        weights = {p.data_ptr() for p in encoder.model.parameters()}
        alive = peak = 0

        class Kept:
            def __init__(self, x: torch.Tensor) -> None:
                nonlocal alive, peak
                self.x, self.size = x, 0 if x.data_ptr() in weights else x.numel()
                alive += self.size
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            features.sum().backward()
        return peak

    assert largest(2) < 0.4 * largest(16)


def test_the_prefix_is_not_copied_for_each_class():
    """What a class adds is what its own tokens need, whatever the length of the context."""
    encoder = open_clip_encoder(dtype=torch.float32)

    def per_class(n_ctx: int) -> float:
        sizes = []
        for names in (NAMES[:8], NAMES):
            prompts = learned(encoder, names, n_ctx=n_ctx)
            context = context_of(prompts, dtype=torch.float32)
            sizes.append(saved_bytes(encoder.model, lambda p=prompts, c=context: p(c)))
        return (sizes[1] - sizes[0]) / 8

    assert per_class(64) == per_class(4)
