"""Tiny untrained CLIPs of both libraries, of the same weights, and updates with numbers in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastood.models import HFEncoder, OpenClipEncoder
from fastood.models.base import Encoder
from fastood.tuning.lora import LoRA
from tests.models import tiny

NAMES = ["cat", "long-haired_dachshund", "dog", "red car"]
WORDS = ["cat", "long-haired dachshund", "dog", "red car"]
LABELS = torch.tensor([0, 3, 1, 2, 0])


def open_clip_encoder(dtype: torch.dtype = torch.float64, **options) -> OpenClipEncoder:
    model = tiny.clip(quick_gelu=True, **options).to(dtype)
    return OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER)


def hf_encoder(dtype: torch.dtype = torch.float64) -> HFEncoder:
    """The same weights as ``open_clip_encoder`` has."""
    pytest.importorskip("transformers")
    from tests.models import test_hf

    names = test_hf.hugging_face_names(tiny.clip(quick_gelu=True))
    model = test_hf.transformers.CLIPModel(test_hf.clip_config())
    model.load_state_dict({k: v.contiguous() for k, v in names.items()}, strict=True)
    model = model.to(dtype)
    try:
        model.get_text_features(input_ids=tiny.TOKENIZER(["a"]))
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        pytest.skip(f"the installed transformers has no {dtype} masks: {error}")
    return HFEncoder(model, tiny.blank, test_hf.ClipTokens())


ENCODERS = {
    "open_clip": open_clip_encoder,
    "custom text": lambda **o: open_clip_encoder(custom=True, **o),
    "hugging face": hf_encoder,
}


def moved(method: LoRA, seed: int = 0) -> LoRA:
    """``method`` with numbers in B, as after some training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in method.B.values():
            b.copy_(torch.randn(b.shape, generator=g, dtype=b.dtype) * 0.3)
    return method


def pixels(encoder: Encoder) -> Tensor:
    return tiny.pixels(5).to(encoder.dtype)
