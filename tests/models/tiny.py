"""Tiny untrained networks of every supported kind, and transforms for them."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

SIZE, PATCH, WIDTH, HEADS, DIM = 24, 8, 32, 4, 16
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOKENIZER = open_clip.SimpleTokenizer()


def blank(image: Any) -> Tensor:
    """A transform for tests that never look at a picture."""
    del image
    return torch.zeros(3, SIZE, SIZE)


def vision(**changes: Any) -> dict[str, Any]:
    return {
        "layers": 2,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": PATCH,
        "image_size": SIZE,
        **changes,
    }


RESNET = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 16, "image_size": 64}


def shake(module: nn.Module, seed: int = 0) -> None:
    """Move every weight, so that zero biases and unit gains cannot hide a missing term."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def clip(
    image: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    *,
    custom: bool = False,
    quick_gelu: bool = False,
    **options: Any,
) -> Any:
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = kind(DIM, image or vision(), {**TEXT, **(text or {})}, quick_gelu, **options)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            pytest.skip(f"the installed open_clip cannot build this network: {error}")
    shake(model)
    return model.eval()


def pixels(n: int = 2, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
