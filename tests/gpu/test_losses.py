"""Losses, predictions and heads of every method on a GPU: the numbers of the CPU.

Only the forward pass: a GPU of pretence has no backward pass.
"""

from __future__ import annotations

import pytest
import torch

from fastood.models import load_model
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.registry import build_method
from tests.tolerances import PRETENDED_GPU_ATOL, REAL_GPU_ATOL
from tests.tuning.parity import NAMES, batches

SETTINGS = {
    "zoclip": {},
    "coop": {"n_ctx": 4},
    "cocoop": {},
    "locoop": {"n_ctx": 4, "top_k": 2},
    "ebm": {"n_ctx": 4},
    "clip-adapter": {},
    "tip": {},
    "tip-f": {},
    "lora": {"rank": 4, "top_k": 2},
    "setar-ft": {"picks": [("image", "up", 1, 0.25), ("text", "up", 0, 6)], "top_k": 2},
}


def numbers(name, device):
    """The loss, its parts, predictions, and what a head says of the same images."""
    model = load_model("fastood-tiny", device=device)
    method = build_method(name, model, NAMES, **SETTINGS[name])
    batch = batches(1, b=6)[0]
    size = model.model.visual.image_size
    pixels = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(0))
    if method.needs == "pixels":
        batch = Batch(pixels, batch.labels)
    if name.startswith("tip"):
        shots = torch.arange(len(NAMES)).repeat_interleave(2)
        method.set_cache(batches(1, b=len(shots), seed=1)[0].image.to(device), shots.to(device))
    batch = Batch(*(None if x is None else x.to(device) for x in batch))
    found = []
    if method.recipe.epochs:
        terms, predicted = method.terms(batch)
        found = [total_loss(terms), *(t.numerator for t in terms), predicted]
    if method.changes_towers:
        made = method.adapted(model)
        assert made.device == torch.device(device)
        found.append(made.encode_image(pixels.to(device)).image)
    else:
        found.append(method.head().similarities(batch.image).image)
    assert all(x.device == torch.device(device) for x in found if isinstance(x, torch.Tensor))
    return [torch.as_tensor(x).detach().cpu().double() for x in found]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_method(name, gpu):
    want = numbers(name, "cpu")
    atol = REAL_GPU_ATOL if torch.cuda.is_available() else PRETENDED_GPU_ATOL
    with gpu as device:
        found = numbers(name, device)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)
