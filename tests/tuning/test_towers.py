"""Prompt methods on text towers of other kinds, fast path or full one."""

from __future__ import annotations

import pytest
import torch

from fastood.tuning.method import Batch, total_loss
from fastood.tuning.registry import build_method
from fastood.tuning.state import load_method, save_method
from tests.prompts.towers import hf_encoder, open_clip_encoder

NAMES = ("cat", "a_very_long-haired dachshund", "ice cream")
TOWERS = {
    "open_clip": open_clip_encoder,
    "open_clip, own text class": lambda: open_clip_encoder(custom=True),
    "open_clip, not causal": lambda: open_clip_encoder({"no_causal_mask": True}, custom=True),
    "hugging face": hf_encoder,
    "hugging face, old end": lambda: hf_encoder(2),
}


def images(encoder) -> Batch:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(4, encoder.embed_dim, generator=g, dtype=torch.float64)
    return Batch(image, torch.tensor([0, 1, 2, 1]))


@pytest.mark.filterwarnings("ignore:.*learned prompts")
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", ["coop", "cocoop"])
def test_words_as_context_are_zero_shot_then_learn(kind, name, tmp_path):
    if kind.startswith("hugging"):
        pytest.importorskip("transformers")
    encoder = TOWERS[kind]()
    batch, text = images(encoder), "a photo of a"
    method = build_method(name, encoder, NAMES, ctx_init=text)
    if name == "cocoop":
        for p in method.meta.parameters():
            p.data.zero_()
    zero_shot = build_method("zoclip", encoder, NAMES, templates=f"{text} {{}}.")
    got, want = (m.head().similarities(batch.image).image for m in (method, zero_shot))
    # zero-shot text is kept in float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)

    losses = []
    optimizer = torch.optim.SGD(method.parameters(), 1e-3)
    for _ in range(3):
        loss = total_loss(method.terms(batch)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]

    again = load_method(save_method(tmp_path / "m.safetensors", method), encoder)
    a, b = (m.head().similarities(batch.image).image for m in (method, again))
    assert torch.equal(a, b)
