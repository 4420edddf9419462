"""PromptEncoder against the full pass of the model: features and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench import peers_tuning
from fastood.errors import ModelError
from fastood.models import CallableEncoder, load_model
from fastood.prompts import PromptEncoder, fixed
from tests.models import tiny
from tests.prompts.towers import (
    NAMES,
    both,
    context_of,
    full,
    hf_encoder,
    learned,
    open_clip_encoder,
    relative,
)
from tests.tolerances import PROMPT_F64_RTOL, PROMPT_RTOL

POSITIONS = ("end", "middle", "front")
TOWERS = {
    "open_clip": lambda: open_clip_encoder(),
    "quick gelu": lambda: open_clip_encoder(quick_gelu=True),
    "layer scale": lambda: open_clip_encoder({"ls_init_value": 0.3}),
    "sequence first": lambda: open_clip_encoder(batch_first=False),
    "custom text": lambda: open_clip_encoder(custom=True),
    "first end of text": lambda: open_clip_encoder(
        {"pool_type": "eos", "eos_id": 49407}, custom=True
    ),
    "linear projection": lambda: open_clip_encoder({"proj_bias": True}, custom=True),
    "no projection": lambda: open_clip_encoder(
        {"proj_type": "none", "width": tiny.DIM}, custom=True
    ),
    "one block": lambda: open_clip_encoder({"layers": 1}),
    "hugging face": lambda: hf_encoder(),
    "hugging face, old end": lambda: hf_encoder(2),
    "hugging face, padded with its end": lambda: hf_encoder(pad=49407),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_features_and_gradients_of_every_tower(tower):
    encoder = TOWERS[tower]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = PromptEncoder.learned(encoder, NAMES, n_ctx=5)
    assert prompts.path == "shared" and prompts.reason is None
    for images in (0, 2):
        context = context_of(prompts, images)
        found = both(prompts(context), context)
        wanted = both(full(encoder, prompts.layout, context), context)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and relative(a, b) < PROMPT_F64_RTOL


@pytest.mark.filterwarnings("ignore:.*learned prompts")
@pytest.mark.parametrize("make", [open_clip_encoder, hf_encoder])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_every_layout(make, position, class_specific):
    encoder = make()
    prompts = learned(encoder, n_ctx=5, position=position, class_specific=class_specific)
    for images in (0,) if class_specific else (0, 3):
        context = context_of(prompts, images)
        wanted = both(full(encoder, prompts.layout, context), context)
        for chunk in (None, 1, 2, 4, 100):
            own = PromptEncoder(encoder, prompts.layout, chunk=chunk) if chunk else prompts
            found = both(own(context), context)
            for a, b in zip(found, wanted, strict=True):
                assert relative(a, b) < PROMPT_F64_RTOL


@pytest.mark.filterwarnings("ignore:.*learned prompts")
@pytest.mark.parametrize("position", POSITIONS)
def test_the_peer_written_from_the_paper_agrees(position):
    encoder = open_clip_encoder()
    prompts = PromptEncoder.learned(encoder, NAMES, n_ctx=6, position=position)
    context, layout = context_of(prompts), prompts.layout
    vectors = peers_tuning.plain_prompts(encoder.model, layout.tokens, layout.context, context)
    wanted = both(peers_tuning.plain_text_features(encoder.model, vectors, layout.ends), context)
    for a, b in zip(both(prompts(context), context), wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL


@pytest.mark.parametrize("make", [open_clip_encoder, hf_encoder])
def test_float32(make):
    encoder = make(dtype=torch.float32)
    # not every transformers runs in float64
    exact = open_clip_encoder() if make is open_clip_encoder else encoder
    for position in POSITIONS:
        prompts = learned(encoder, n_ctx=16, position=position)
        context = context_of(prompts, dtype=torch.float32)
        found = both(prompts(context), context)
        assert found[0].dtype == found[1].dtype == torch.float32
        wide = context.detach().to(exact.dtype).requires_grad_()
        wanted = both(full(exact, prompts.layout, wide), wide)
        for a, b in zip(found, wanted, strict=True):
            assert relative(a, b) < PROMPT_RTOL


@pytest.mark.parametrize("names", [["cat"], ["cat", "cat"], ["hen", "cat"]])
@pytest.mark.parametrize("position", POSITIONS)
def test_few_names(names, position):
    encoder = open_clip_encoder()
    for class_specific in (False, True):
        prompts = learned(encoder, names, n_ctx=3, position=position, class_specific=class_specific)
        context = context_of(prompts)
        wanted = both(full(encoder, prompts.layout, context), context)
        for a, b in zip(both(prompts(context), context), wanted, strict=True):
            assert relative(a, b) < PROMPT_F64_RTOL


def test_equal_names_tie_to_the_last_bit():
    prompts = learned(open_clip_encoder(dtype=torch.float32), n_ctx=4)
    features = prompts(context_of(prompts, dtype=torch.float32))
    assert torch.equal(features[0], features[4]) and NAMES[0] == NAMES[4]
    assert not torch.equal(features[0], features[2])


def test_the_longest_names_fill_the_window():
    encoder = open_clip_encoder()
    names = ["cat", "very " * 68 + "big cat"]  # start, 4, 70, full stop, end
    prompts = learned(encoder, names, n_ctx=4)
    assert int(prompts.layout.ends.max()) == 76
    context = context_of(prompts)
    wanted = both(full(encoder, prompts.layout, context), context)
    for a, b in zip(both(prompts(context), context), wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL


@pytest.mark.parametrize("position", POSITIONS)
def test_a_part_of_the_classes(position):
    encoder = open_clip_encoder()
    for class_specific in (False, True):
        prompts = learned(encoder, n_ctx=4, position=position, class_specific=class_specific)
        context = context_of(prompts)
        whole = both(prompts(context), context, seed=1)[0]
        total = torch.zeros_like(context)
        for part in (slice(0, 1), slice(1, 5), slice(5, None)):
            features = prompts(context, classes=part)
            assert relative(features, whole[part]) < PROMPT_F64_RTOL
            total += torch.autograd.grad(features.sum(), context)[0]
        (wanted,) = torch.autograd.grad(prompts(context).sum(), context)
        assert relative(total, wanted) < PROMPT_F64_RTOL
    with pytest.raises(ValueError, match="slice without a step"):
        prompts(context, classes=slice(0, 6, 2))


def test_no_classes_have_a_gradient_of_zero():
    """A process of many may have no class of a short list."""
    encoder = open_clip_encoder()
    for class_specific in (False, True):
        prompts = learned(encoder, n_ctx=4, class_specific=class_specific)
        context = context_of(prompts)
        features = prompts(context, classes=slice(6, 6))
        assert features.shape == (0, tiny.DIM) and features.dtype == torch.float64
        (gradient,) = torch.autograd.grad(features.sum(), context)
        assert not gradient.any()
    prompts = learned(encoder, n_ctx=4)
    assert prompts(context_of(prompts, 3), classes=slice(2, 2)).shape == (3, 0, tiny.DIM)


def test_without_sharing():
    encoder = open_clip_encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was asked for
        prompts = PromptEncoder.learned(encoder, NAMES, n_ctx=5, share=False)
    assert prompts.path == "packed" and prompts.reason is None
    context = context_of(prompts)
    wanted = both(full(encoder, prompts.layout, context), context)
    for chunk in (None, 2):
        own = PromptEncoder(encoder, prompts.layout, share=False, chunk=chunk)
        for a, b in zip(both(own(context), context), wanted, strict=True):
            assert relative(a, b) < PROMPT_F64_RTOL


def test_ordinary_prompts():
    encoder = open_clip_encoder()
    tokens = encoder.tokenize([f"a photo of a {n}." for n in NAMES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = PromptEncoder(encoder, fixed(tokens, tokens.argmax(-1)))
    assert prompts.path == "shared"
    assert relative(prompts(), full(encoder, prompts.layout, None)) < PROMPT_F64_RTOL
    assert not prompts().requires_grad


def test_nothing_is_kept_where_nothing_is_differentiated():
    prompts = learned(open_clip_encoder(), n_ctx=4)
    context = context_of(prompts, 3)
    wanted = prompts(context).detach()
    with torch.no_grad():
        assert not prompts(context).requires_grad
    with torch.inference_mode():
        assert relative(prompts(context), wanted) < PROMPT_F64_RTOL
    assert not prompts(context.detach()).requires_grad


def test_inference_in_pieces(monkeypatch):
    """Long enough lists run in parts: of the classes, and of the images."""
    from fastood.prompts import encoder as module

    prompts = learned(open_clip_encoder(), n_ctx=4)
    context = context_of(prompts, 5).detach()
    wanted = prompts(context)
    for tokens in (1, 40, 200):
        monkeypatch.setattr(module, "INFERENCE_TOKENS", tokens)
        assert relative(prompts(context), wanted) < PROMPT_F64_RTOL


class LowRank(nn.Module):
    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rows, columns = weight.shape
        self.b = nn.Parameter(0.1 * torch.randn(rows, 2, generator=g).to(weight))
        self.a = nn.Parameter(0.1 * torch.randn(2, columns, generator=g).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("make", [open_clip_encoder, hf_encoder])
def test_weights_that_are_trained_or_parametrised(make, chunk):
    encoder = make()
    model = encoder.text_module()
    if make is open_clip_encoder:
        block = model.transformer.resblocks[0]
        parametrize.register_parametrization(
            block.attn, "in_proj_weight", LowRank(block.attn.in_proj_weight, 1)
        )
        layers = [block.attn.out_proj, block.mlp.c_fc, model.transformer.resblocks[1].mlp.c_proj]
        norm, embedding = model.ln_final, model.token_embedding
    else:
        block = model.text_model.encoder.layers[0]
        layers = [block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.fc1, block.mlp.fc2]
        norm, embedding = block.layer_norm1, model.text_model.embeddings.token_embedding
    for i, layer in enumerate(layers):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, i))
    trained = [p for n, p in model.named_parameters() if n.endswith((".a", ".b"))]
    trained += [norm.weight.requires_grad_(), embedding.weight.requires_grad_()]
    prompts = learned(encoder, n_ctx=4, chunk=chunk)
    assert prompts.path == "shared"
    context = context_of(prompts)
    found = both(prompts(context), context, *trained)
    wanted = both(full(encoder, prompts.layout, context), context, *trained)
    assert len(found) == len(wanted) == 2 + len(trained)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL
    # the tower alone, as LoRA trains it under fixed prompts
    constant = context.detach()
    for a, b in zip(
        both(prompts(constant), *trained),
        both(full(encoder, prompts.layout, constant), *trained),
        strict=True,
    ):
        assert relative(a, b) < PROMPT_F64_RTOL


def test_a_gradient_reaches_what_made_the_context():
    """CoCoOp's meta-net and a prompt with the loss of the whole."""
    encoder = open_clip_encoder()
    prompts = learned(encoder, n_ctx=3)
    own = context_of(prompts)
    image = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    meta = nn.Linear(7, prompts.width).double()

    def loss(run):
        text = F.normalize(run(own + meta(image)[:, None]), dim=-1)
        return F.cross_entropy(10 * text.mean(-1), torch.arange(4))

    leaves = [own, *meta.parameters()]
    found = torch.autograd.grad(loss(prompts), leaves)
    wanted = torch.autograd.grad(loss(lambda c: full(encoder, prompts.layout, c)), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL


def test_gradcheck():
    encoder = open_clip_encoder({"layers": 2, "width": 8})
    prompts = learned(encoder, ["cat", "ice cream", "hen"], n_ctx=2, position="middle")
    assert torch.autograd.gradcheck(prompts, (context_of(prompts),))


def test_embed_gives_the_vectors_of_words():
    encoder = open_clip_encoder(dtype=torch.float32)
    prompts = learned(encoder, n_ctx=4)
    start = prompts.embed("a photo of a")
    assert start.shape == (4, prompts.width) and start.dtype == torch.float32
    tokens = encoder.tokenize([f"a photo of a {n}." for n in NAMES])
    with torch.no_grad():
        wanted = encoder.model.encode_text(tokens)
    assert relative(prompts(start), wanted) < PROMPT_RTOL
    start.fill_(0)  # a copy
    assert float(prompts.embed("a photo of a").abs().sum()) > 0
    with pytest.raises(ValueError, match="at least one word"):
        prompts.embed(" ")


def test_contexts_that_do_not_fit():
    encoder = open_clip_encoder()
    prompts = learned(encoder, n_ctx=4)
    good = context_of(prompts)
    for bad in (good[:3], good[:, :5], good[None, None], None, good[None][:0], good.long()):
        with pytest.raises(ValueError, match=r"context: expected \(4, 32\) or \(B, 4, 32\)"):
            prompts(bad)
    own = learned(encoder, n_ctx=4, class_specific=True)
    with pytest.raises(ValueError, match=r"expected \(6, 4, 32\)"):
        own(good)
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        PromptEncoder(encoder, prompts.layout, chunk=0)


def test_encoders_without_tokens_are_refused():
    encoder = CallableEncoder(
        lambda x: x.mean((2, 3)), tiny.blank, embed_dim=3, fingerprint="a", preprocess_id="b",
        text=lambda prompts: torch.ones(len(prompts), 3),
    )  # fmt: skip
    layout = learned(open_clip_encoder(), n_ctx=4).layout
    with pytest.raises(ModelError, match="no text tower whose prompts could be learned"):
        PromptEncoder(encoder, layout)


def test_a_layout_of_another_window_is_refused():
    layout = learned(open_clip_encoder(), n_ctx=4).layout
    encoder = load_model("fastood-tiny")
    with pytest.raises(ValueError, match="at most 32 tokens, got 77"):
        PromptEncoder(encoder, layout)


def test_the_shipped_tiny_model():
    encoder = load_model("fastood-tiny")
    prompts = learned(encoder, n_ctx=16)
    assert prompts.path == "shared"
    context = context_of(prompts, dtype=torch.float32)
    encoder.text_module().requires_grad_(False)
    wanted = both(full(encoder, prompts.layout, context), context)
    for a, b in zip(both(prompts(context), context), wanted, strict=True):
        assert relative(a, b) < PROMPT_RTOL


@pytest.mark.slow
def test_compiled():
    prompts = learned(open_clip_encoder(), n_ctx=4)
    context = context_of(prompts)
    wanted = both(prompts(context), context)
    torch.compiler.reset()
    compiled = torch.compile(lambda c: prompts(c), backend="aot_eager", fullgraph=True)
    for a, b in zip(both(compiled(context), context), wanted, strict=True):
        assert relative(a, b) < PROMPT_F64_RTOL
