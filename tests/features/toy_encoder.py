"""A small deterministic image tower with patch features, and image files to feed it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastood.models.base import Encoder, ImageFeatures


class ToyEncoder(Encoder):
    """8x8 patches of a 32x32 picture, a linear map, a mean over patches."""

    name = "toy"
    embed_dim = 16
    num_patches = 16
    no_local = None
    preprocess_id = "toy-32-bilinear"
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, *, seed: int = 0, seconds: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tower = nn.Linear(8 * 8 * 3, self.embed_dim)
        with torch.no_grad():
            for parameter in self.tower.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        self.seconds = seconds
        self.batches: list[int] = []

    @property
    def fingerprint(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        for parameter in self.tower.parameters():
            state.update(parameter.detach().numpy().tobytes())
        return state.hexdigest()

    @staticmethod
    def preprocess(image: Any) -> Tensor:
        assert image.mode == "RGB"
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()

    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        time.sleep(self.seconds)
        self.batches.append(len(pixels))
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
        tokens = self.tower(patches.flatten(1, 2))
        return ImageFeatures(tokens.mean(dim=1), tokens if local else None)


def write_images(folder: Path, count: int, *, seed: int = 0, size: int = 24) -> list[Path]:
    """``count`` different PNG files named 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    files = []
    for i in range(count):
        files.append(folder / f"{i:03d}.png")
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(files[-1])
    return files
