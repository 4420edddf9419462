"""What tests of searches share: pictures of noise in five classes, and random towers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastood.data import load_images
from fastood.data.imageset import ImageSet
from fastood.models import OpenClipEncoder
from tests.models import tiny
from tests.tuning.towers import open_clip_encoder

NAMES = ["apple", "boat", "cat", "door", "egg"]
SIZE = 24
OPTIONS = {"top_k": 2, "weight": 0.5, "batch_size": 4, "ratios": (0, 0.1, 0.25, 0.4)}


def preprocess(image: Image.Image) -> Tensor:
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return (x.permute(2, 0, 1) - 0.45) * 4


def encoder_of(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> OpenClipEncoder:
    """Random towers of four and three blocks whose weights have weak directions."""
    found = open_clip_encoder(
        dtype, image=tiny.vision(layers=4), text={"layers": 3}, custom=False, **options
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in found.model.named_parameters():
            if p.ndim == 2 and "embedding" not in name:
                u, s, v = torch.linalg.svd(
                    torch.randn(p.shape, generator=g, dtype=torch.float64), full_matrices=False
                )
                s = s * torch.linspace(1, 0, len(s), dtype=torch.float64) ** 2
                p.copy_((u * s) @ v * 0.7)
        found.model.logit_scale.fill_(2.0)
    return OpenClipEncoder(found.model, preprocess, tiny.TOKENIZER, preprocess_id="plain")


def noise_images(folder: Path) -> ImageSet:
    """Two of each class of ``NAMES``, in a folder each."""
    g = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(2):
            noise = g.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((SIZE, SIZE)).save(folder / name / f"{i}.png")
    return load_images(folder)
