"""Ordinary prompts: what they begin with runs once for each template, padding never."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastood.data.openai_templates import IMAGENET_80
from fastood.data.prompts import fill
from fastood.features.text import clear_text_memory, encode_classes
from fastood.prompts.forest import common_beginnings
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


def run_tokens(prompts, groups) -> int:
    total = 0
    for rows in groups:
        some = [prompts[i] for i in rows]
        shortest = min(map(len, some)) - 1
        alike = [all(p[j] == some[0][j] for p in some) for j in range(shortest)]
        shared = alike.index(False) if False in alike else shortest
        total += shared + sum(len(p) - shared for p in some)
    return total


def test_prompts_are_grouped_by_what_they_begin_with():
    lists = {
        "ensemble": [fill(t, n) for t in IMAGENET_80 for n in NAMES],
        "two templates": [fill(t, n) for n in NAMES for t in ("a photo of a {}.", "{} in snow")],
        "one": ["a photo of a cat"],
        "nothing in common": ["cat", "dog", "hen"],
    }
    for what, texts in lists.items():
        tokens = tiny.TOKENIZER(texts)
        prompts = [tuple(r[: r.index(49407) + 1]) for r in tokens.tolist()]
        groups = common_beginnings(prompts)
        assert sorted(i for rows in groups for i in rows) == list(range(len(prompts))), what
        together = run_tokens(prompts, groups)
        assert together <= run_tokens(prompts, [list(range(len(prompts)))]), what
        if what == "ensemble":
            by_template = [list(range(i, i + 4)) for i in range(0, len(texts), 4)]
            assert together <= run_tokens(prompts, by_template) + 8 * 80
        if what == "two templates":
            assert sorted(map(sorted, groups)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
