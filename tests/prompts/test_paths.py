"""Which pass is taken, what is said about it, and that every pass is right."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from fastood.models import HFEncoder, OpenClipEncoder
from fastood.prompts import PromptEncoder, text_tower
from tests.models import tiny
from tests.prompts.towers import (
    NAMES,
    both,
    context_of,
    full,
    hf_encoder,
    open_clip_encoder,
    relative,
)
from tests.tolerances import PROMPT_F64_RTOL


def announced(encoder: Any, **options: Any) -> tuple[PromptEncoder, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = PromptEncoder.learned(encoder, NAMES, **{"n_ctx": 4, **options})
        context = context_of(prompts)
        found = both(prompts(context), context)
        prompts(context)
    assert len(caught) == 1 and caught[0].filename == __file__
    wanted = both(full(encoder, prompts.layout, context), context)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL
    assert prompts.reason is not None and prompts.reason in str(caught[0].message)
    return prompts, str(caught[0].message)


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"class_specific": True}, "packed", "each class has a learned context of its own"),
        ({"position": "front"}, "packed", "the name stands before the context"),
        ({"position": "middle"}, "shared", "inside the context, 2 tokens of which stand before"),
    ],
)
def test_layouts_that_share_less(options, path, message):
    prompts, said = announced(open_clip_encoder(), **options)
    assert prompts.path == path and message in said


def custom_blocks() -> Any:
    return open_clip_encoder({"qk_norm": True}, custom=True)


def changed(change: Any) -> Any:
    def make() -> Any:
        encoder = open_clip_encoder()
        change(encoder.model)
        return encoder

    return make


def masked_padding() -> Any:
    encoder = open_clip_encoder(custom=True)
    if not hasattr(encoder.model.text, "use_pad_mask"):
        pytest.skip("the installed open_clip knows no such tower")
    encoder.model.text.use_pad_mask = True
    return encoder


def not_causal(model: Any) -> None:
    model.attn_mask.zero_()


def wrapped_linear(model: Any) -> None:
    """As adapter libraries do: a module in place of a linear layer, with its ``weight``."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        weight = property(lambda self: self.base.weight)
        bias = property(lambda self: self.base.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    mlp = model.transformer.resblocks[0].mlp
    mlp.c_fc = Wrapped(mlp.c_fc)


def looks_behind(model: Any) -> None:
    model.transformer.resblocks[0].register_forward_hook(
        lambda m, a, out: out + out.mean(dim=1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: open_clip_encoder({"no_causal_mask": True}, custom=True), "not causal"),
        (lambda: open_clip_encoder({"embed_cls": True}, custom=True), "class embedding"),
        (lambda: open_clip_encoder({"pool_type": "last"}, custom=True), "read at 'last'"),
        (masked_padding, "padding is masked"),
        (custom_blocks, "CustomResidualAttentionBlock"),
        (changed(not_causal), "not causal"),
        (changed(wrapped_linear), "a linear layer is a Wrapped"),
        (changed(looks_behind), "changes features by"),
    ],
)  # fmt: skip
def test_other_towers_run_in_full(make, message):
    encoder = make()
    prompts, said = announced(encoder)
    assert prompts.path == "full" and message in said and "whole token window" in said
    chunked = PromptEncoder.__new__(PromptEncoder)
    chunked.__dict__.update(prompts.__dict__, _chunk=2)
    context = context_of(prompts, 2)
    wanted = both(full(encoder, prompts.layout, context), context)
    for own in (prompts, chunked):
        for a, b in zip(both(own(context), context), wanted, strict=True):
            assert relative(a, b) < PROMPT_F64_RTOL


def test_coca():
    model = open_clip.CoCa(
        tiny.DIM,
        {**tiny.TEXT, "attn_pooler_heads": 2, "heads": 2},
        {**tiny.TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        tiny.vision(attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=76)
    encoder = OpenClipEncoder(
        model.eval().requires_grad_(False), tiny.blank, tokenizer, dtype=torch.float64
    )
    prompts, said = announced(encoder)
    assert prompts.path == "full" and "CoCa" in said


def test_siglip():
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64}  # fmt: skip
    config = transformers.SiglipConfig(
        text_config={**shared, "vocab_size": 100, "max_position_embeddings": 16,
                     "projection_size": 32},
        vision_config={**shared, "image_size": tiny.SIZE, "patch_size": tiny.PATCH},
    )  # fmt: skip
    model = transformers.SiglipModel(config)
    tiny.shake(model)

    def words(texts, *, max_length, **options):
        rows = [[2 + sum(map(ord, w)) % 90 for w in t.split()][:max_length] for t in texts]
        return {"input_ids": torch.tensor([r + [1] * (max_length - len(r)) for r in rows])}

    encoder = HFEncoder(model.eval().requires_grad_(False), tiny.blank, words, dtype=torch.float64)
    prompts, said = announced(encoder)
    assert prompts.path == "full" and "not one of CLIP's" in said


def test_a_hugging_face_tower_inside_open_clip():
    """Roberta: other tokens, another tower, no end of text."""
    transformers = pytest.importorskip("transformers")
    hf_model = pytest.importorskip("open_clip.hf_model")
    config = transformers.RobertaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tower = transformers.RobertaModel(config, add_pooling_layer=False).eval()

    class Text(nn.Module):
        """As open_clip's own, which loads its configuration from the Hub."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = tower
            self.proj = nn.Linear(32, tiny.DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.transformer(input_ids=x, attention_mask=(x != config.pad_token_id).long())
            return self.proj(out.last_hidden_state.mean(dim=1))

    del hf_model
    model = tiny.clip(custom=True)
    model.text = Text()

    def tokenize(prompts, **options):
        rows = [[0, *(3 + sum(map(ord, w)) % 190 for w in p.split()), 2] for p in prompts]
        return torch.tensor([r + [1] * (32 - len(r)) for r in rows])

    encoder = OpenClipEncoder(
        model.eval().requires_grad_(False), tiny.blank, tokenize, dtype=torch.float64
    )
    prompts, said = announced(encoder)
    assert prompts.path == "full" and "its text tower is a Text" in said


def test_active_dropout_runs_in_full():
    encoder = hf_encoder(attention_dropout=0.5)
    assert not isinstance(text_tower(encoder.model), str)
    encoder.model.train()
    with pytest.warns(UserWarning, match="at random"):
        prompts = PromptEncoder.learned(encoder, NAMES, n_ctx=4)
    assert prompts.path == "full"


def test_sharing_that_is_insisted_on():
    with pytest.raises(ValueError, match=r"share: .* the name stands before the context"):
        PromptEncoder.learned(open_clip_encoder(), NAMES, n_ctx=4, position="front", share=True)
    assert PromptEncoder.learned(open_clip_encoder(), NAMES, n_ctx=4, share=True).path == "shared"
