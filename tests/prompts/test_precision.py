"""Half precision: no worse than the tower alone, and sums over classes that do not overflow."""

from __future__ import annotations

import pytest
import torch

from tests.prompts.towers import (
    both,
    context_of,
    full,
    hf_encoder,
    learned,
    open_clip_encoder,
    relative,
)
from tests.tolerances import PROMPT_F64_RTOL, PROMPT_HALF_LUCK, PROMPT_RTOL

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("dtype", HALF)
def test_errors_are_not_larger_than_those_of_the_full_pass(dtype, position):
    exact, half = open_clip_encoder(), open_clip_encoder(dtype=dtype)
    exact.model.load_state_dict({k: v.double() for k, v in half.model.state_dict().items()})
    prompts = learned(half, n_ctx=8, position=position)
    context = context_of(prompts, dtype=torch.float32)
    wide = context.detach().double().requires_grad_()
    wanted = both(full(exact, prompts.layout, wide), wide)
    ours = both(prompts(context), context)
    theirs = both(full(half, prompts.layout, context), context)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert relative(a, c) <= PROMPT_HALF_LUCK * relative(b, c)


@pytest.mark.parametrize("dtype", HALF)
def test_towers_of_two_precisions(dtype):
    """Weights in half precision, norms and embeddings in float32, as open_clip loads them."""
    from open_clip.model import convert_weights_to_lp

    exact, half = open_clip_encoder(), open_clip_encoder(dtype=torch.float32, cast_dtype=dtype)
    convert_weights_to_lp(half.model, dtype)
    exact.model.load_state_dict({k: v.double() for k, v in half.model.state_dict().items()})
    prompts = learned(half, n_ctx=8)
    assert prompts.path == "shared"
    context = context_of(prompts, dtype=torch.float32)
    wide = context.detach().double().requires_grad_()
    wanted = both(full(exact, prompts.layout, wide), wide)
    theirs = both(full(half, prompts.layout, context), context)
    for a, b, c in zip(both(prompts(context), context), theirs, wanted, strict=True):
        assert a.dtype == b.dtype and relative(a, c) <= PROMPT_HALF_LUCK * relative(b, c)


@pytest.mark.parametrize("dtype", HALF)
def test_hugging_face_in_half_precision(dtype):
    exact, half = hf_encoder(), hf_encoder(dtype=dtype)
    exact.model.load_state_dict({k: v.double() for k, v in half.model.state_dict().items()})
    prompts = learned(half, n_ctx=8)
    context = context_of(prompts, dtype=torch.float32)
    wide = context.detach().double().requires_grad_()
    wanted = both(full(exact, prompts.layout, wide), wide)
    theirs = both(full(half, prompts.layout, context), context)
    for a, b, c in zip(both(prompts(context), context), theirs, wanted, strict=True):
        assert a.dtype == b.dtype and relative(a, c) <= PROMPT_HALF_LUCK * relative(b, c)


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_sum_over_many_classes_under_loss_scaling(position, chunk):
    """Each class's gradient fits float16 at a scale of 65536, their sum does not."""
    names = [f"{a} {b}" for a in ("cat", "dog", "hen", "fox", "cow") for b in range(100)]
    exact, half = open_clip_encoder(), open_clip_encoder(dtype=torch.float16)
    exact.model.load_state_dict({k: v.double() for k, v in half.model.state_dict().items()})
    prompts = learned(half, names, n_ctx=4, position=position, chunk=chunk)
    context = context_of(prompts, dtype=torch.float32)
    scale = 65536.0
    loss = prompts(context).float().sum() / 64  # one direction, so that classes add up
    (found,) = torch.autograd.grad(scale * loss, context)
    wide = context.detach().double().requires_grad_()
    truth = learned(exact, names, n_ctx=4, position=position)
    (wanted,) = torch.autograd.grad(truth(wide).sum() / 64, wide)
    assert float(scale * wanted.abs().max()) > torch.finfo(torch.float16).max
    assert bool(found.isfinite().all())
    assert relative(found / scale, wanted) < 1e-2


@pytest.mark.parametrize("chunk", [None, 2])
def test_autocast(chunk):
    """The recomputation of bounded training sees the autocast of its forward pass."""
    encoder = open_clip_encoder(dtype=torch.float32)
    prompts = learned(encoder, n_ctx=4, chunk=chunk)
    context = context_of(prompts, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        features = prompts(context)
        slow = full(encoder, prompts.layout, context)
    assert features.dtype == slow.dtype
    found, theirs = both(features, context), both(slow, context)  # backward outside, as it should
    plain = learned(encoder, n_ctx=4)
    wanted = both(plain(context), context)
    for a, b, c in zip(found, theirs, wanted, strict=True):
        error = relative(a, c)
        assert PROMPT_RTOL < error <= PROMPT_HALF_LUCK * relative(b, c)
    if chunk is not None:
        with torch.autocast("cpu", torch.bfloat16):
            one_graph = plain(context)
        # the same arithmetic; parts of other sizes may be summed in another order
        assert relative(features, one_graph) < 1e-2
        assert relative(found[1], both(one_graph, context)[1]) < 2e-2


def test_chunks_agree_in_float32():
    encoder = open_clip_encoder(dtype=torch.float32)
    for position in ("end", "middle", "front"):
        prompts = learned(encoder, n_ctx=8, position=position)
        context = context_of(prompts, dtype=torch.float32)
        wanted = both(prompts(context), context)
        for chunk in (1, 2, 3, 5, 6):
            own = learned(encoder, n_ctx=8, position=position, chunk=chunk)
            for a, b in zip(both(own(context), context), wanted, strict=True):
                assert relative(a, b) < 1e-6


def test_float64_contexts_of_narrower_towers():
    encoder = open_clip_encoder(dtype=torch.float32)
    prompts = learned(encoder, n_ctx=4)
    context = context_of(prompts)
    features, gradient = both(prompts(context), context)
    assert features.dtype == torch.float32 and gradient.dtype == torch.float64
    narrow = context.detach().float().requires_grad_()
    assert relative(features, prompts(narrow)) < PROMPT_F64_RTOL
