"""Ordinary prompts: what they begin with runs once for each template, padding never."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastood.data.openai_templates import IMAGENET_80
from fastood.data.prompts import fill
from fastood.features.text import clear_text_memory, encode_classes
from tests.models import tiny
from tests.prompts.towers import hf_encoder, open_clip_encoder, relative
from tests.tolerances import FEATURE_ATOL, PROMPT_F64_RTOL

NAMES = ["cat", "ice cream", "golden retriever", "hen"]


@pytest.fixture(autouse=True)
def _forget():
    clear_text_memory()
    yield
    clear_text_memory()


def tokens_run(encoder) -> list[int]:
    seen: list[int] = []
    act = encoder.model.transformer.resblocks[0].mlp.gelu
    act.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("make", [open_clip_encoder, hf_encoder])
def test_an_ensemble_equals_the_full_pass(make):
    encoder = make()
    templates = IMAGENET_80[::10]
    found = encode_classes(encoder, NAMES, templates=templates).features
    rows = []
    for template in templates:
        tokens = encoder.tokenize([fill(template, n) for n in NAMES])
        with torch.no_grad():
            rows.append(F.normalize(encoder.encode_tokens(tokens), dim=-1))
    wanted = F.normalize(torch.stack(rows).mean(0), dim=-1)
    torch.testing.assert_close(found.double(), wanted, atol=FEATURE_ATOL, rtol=0)


def test_each_template_runs_its_beginning_once():
    encoder = open_clip_encoder(dtype=torch.float32)
    encoder.encode_text(["a", "b"])  # the check of the two passes
    seen = tokens_run(encoder)
    encode_classes(encoder, NAMES, templates=["a photo of a {}.", "{} in the snow"])
    names = sum(len(tiny.TOKENIZER.encode(n)) for n in NAMES)
    # start and "a photo of a"; name, full stop, end. Then: start; name, "in the snow", end
    assert seen == [5 + names + 2 * 4 + 1 + names + 4 * 4]


def test_prompts_of_any_batch_agree():
    encoder = open_clip_encoder()
    prompts = [fill(t, n) for t in IMAGENET_80[:6] for n in NAMES]
    whole = encoder.encode_text(prompts)
    alone = torch.cat([encoder.encode_text([p]) for p in prompts])
    assert relative(alone, whole) < PROMPT_F64_RTOL
    twice = encoder.encode_text(prompts + prompts[::-1])
    assert torch.equal(twice[: len(prompts)], twice[len(prompts) :].flip(0))


def test_long_lists_run_in_parts(monkeypatch):
    from fastood.prompts import packed

    encoder = open_clip_encoder()
    prompts = [fill(t, n) for t in IMAGENET_80[:6] for n in NAMES]
    whole = encoder.encode_text(prompts)
    monkeypatch.setattr(packed, "INFERENCE_TOKENS", 40)
    assert relative(encoder.encode_text(prompts), whole) < PROMPT_F64_RTOL
