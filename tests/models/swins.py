"""Tiny untrained Swin classifiers of both libraries and both versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny

IMAGE, CLASSES = 64, 7
"""A patch grid of 16 x 16, so the stages are 16, 8, 4 and 2 wide: windows of 4 shift in the first
two stages, fill the third and are cut to 2 in the last. Hugging Face's first version cannot cut
them: its windows are 2 wide."""

DEPTHS = (2, 2, 3, 2)
"""Uneven, so that a mistake in counting layers shows."""

KINDS = ("timm v1", "timm v2", "hf v1", "hf v2")


def swin(kind: str, *, image: int = IMAGE, depths: tuple[int, ...] = DEPTHS, **more: Any) -> Any:
    """One of ``KINDS``, with seven classes and shaken weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _timm(kind, image, depths, more) if "timm" in kind else hf(kind, image, depths)
    tiny.shake(model)
    return model.eval()


def _timm(kind: str, image: int, depths: tuple[int, ...], more: dict[str, Any]) -> nn.Module:
    timm = pytest.importorskip("timm")
    module = timm.models.swin_transformer_v2 if "v2" in kind else timm.models.swin_transformer
    make = module.SwinTransformerV2 if "v2" in kind else module.SwinTransformer
    return make(
        img_size=image, patch_size=4, num_classes=CLASSES, embed_dim=24, depths=depths,
        num_heads=(2,) * len(depths), window_size=4, **more,
    )  # fmt: skip


def hf(kind: str, image: int = IMAGE, depths: tuple[int, ...] = DEPTHS, **more: Any) -> Any:
    """A Hugging Face classifier as it is built, without a change to its weights."""
    transformers = pytest.importorskip("transformers")
    config, make = (
        (transformers.Swinv2Config, transformers.Swinv2ForImageClassification)
        if "v2" in kind
        else (transformers.SwinConfig, transformers.SwinForImageClassification)
    )
    return make(
        config(
            image_size=image, patch_size=4, embed_dim=24, depths=list(depths),
            num_heads=[2] * len(depths), window_size=4 if "v2" in kind else 2, num_labels=CLASSES,
            **more,
        )
    )  # fmt: skip
