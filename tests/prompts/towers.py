"""Small random text towers of every kind, and the full pass they are compared with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastood.models import HFEncoder, OpenClipEncoder
from fastood.prompts import PromptEncoder, PromptLayout
from fastood.prompts.full import FullPass
from fastood.prompts.tower import token_embedding
from tests.models import tiny

NAMES = [
    "cat",
    "a very long-haired dachshund with seventeen small spots",
    "dog",
    "ice cream",
    "cat",  # twice
    "hen",
]


def open_clip_encoder(
    text: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    batch_first: bool = True,
    **options: Any,
) -> OpenClipEncoder:
    """A random open_clip model, its weights frozen."""
    model = tiny.clip(text=text, **options)
    if not batch_first:
        owner = model if hasattr(model, "transformer") else model.text
        owner.transformer.batch_first = False
        for block in owner.transformer.resblocks:
            block.attn.batch_first = False
    model.requires_grad_(False)
    return OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER, dtype=dtype)


class ClipTokens:
    """open_clip's tokens through the interface of a Hugging Face tokenizer."""

    def __init__(self, pad: int = 0) -> None:
        self.pad = pad

    def __call__(self, texts: list[str], *, max_length: int, **options: Any) -> dict[str, Tensor]:
        del options
        tokens = tiny.TOKENIZER(texts, context_length=max_length)
        return {"input_ids": tokens.masked_fill(tokens == 0, self.pad)}


def hf_encoder(
    eos: int = 49407, *, pad: int = 0, dtype: torch.dtype = torch.float64, **text: Any
) -> HFEncoder:
    """A random CLIPModel, its weights frozen."""
    import transformers

    shared = {"num_hidden_layers": 2, "intermediate_size": 64, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(
        text_config={**shared, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 49408,
                     "max_position_embeddings": 77, "eos_token_id": eos, **text},
        vision_config={**shared, "hidden_size": 32, "num_attention_heads": 2, "image_size": 24,
                       "patch_size": 8},
        projection_dim=tiny.DIM,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
    tiny.shake(model)
    model.requires_grad_(False)
    encoder = HFEncoder(model, tiny.blank, ClipTokens(pad), dtype=dtype)
    try:
        with torch.no_grad():
            encoder.encode_tokens(encoder.tokenize(["a"]))
    except RuntimeError as error:  # transformers 4 fills float64 masks with what torch refuses
        if "without overflow" not in str(error):
            raise
        pytest.skip(f"the installed transformers cannot run {dtype}: {error}")
    return encoder


def learned(encoder: Any, names: list[str] | None = None, **options: Any) -> PromptEncoder:
    """A prompt encoder whose warning, if it has one, is looked at elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PromptEncoder.learned(encoder, names or NAMES, **options)


def context_of(prompts: PromptEncoder, images: int = 0, *, seed: int = 0, **options: Any) -> Tensor:
    """A random context of the layout's shape, one per image if ``images``."""
    layout = prompts.layout
    shape: tuple[int, ...] = (layout.n_ctx, prompts.width)
    if layout.class_specific:
        shape = (len(layout), *shape)
    if images:
        shape = (images, *shape)
    g = torch.Generator().manual_seed(seed)
    values = 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    return values.to(options.pop("dtype", torch.float64)).requires_grad_()


def full(encoder: Any, layout: PromptLayout, context: Tensor | None) -> Tensor:
    """(K, D) or (B, K, D): every position of every prompt, by the model itself."""
    table = token_embedding(encoder.text_module())
    rows = torch.arange(len(layout))
    passes = FullPass(encoder.encode_tokens, table, layout, rows, len(layout))
    if context is None or layout.class_specific:
        return passes.part(0, context, [])[0]
    if context.ndim == 3:
        return passes.part(0, context, [])
    return passes.part(0, context[None], [])[0]


def both(features: Tensor, *leaves: Tensor, seed: int = 5) -> tuple[Tensor, ...]:
    """Features and the gradients of a random weighting of them."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(features.shape, generator=g, dtype=torch.float64).to(features)
    found = torch.autograd.grad((features * weight).sum(), leaves, allow_unused=True)
    return (features.detach(), *(x for x in found if x is not None))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest number."""
    gap = (found.detach().double() - wanted.detach().double()).abs().max()
    return float(gap / wanted.detach().double().abs().max())
