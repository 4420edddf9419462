"""Training augmentation whose randomness is a hash, so that order, workers and resuming are free.

A random crop, resized bicubically, and a flip: what CLIP's fine-tuning papers train with. Where
the crop lies is decided by a hash of the seed, the view (or epoch) and the content of the file.
The same picture therefore gives the same pixels in any order, with any number of threads or
processes, from any folder, and after a resumed run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastood.errors import ModelError

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["CLIP_TRAIN", "TIP_VIEWS", "Augmentation", "Augmenter", "Crop"]

_VERSION = 1
"""Raised when the same picture, seed and view would give other pixels."""

_ATTEMPTS = 10
_COLOURS = ((10, 200, 77), (255, 0, 128))


class Crop(NamedTuple):
    """A box in pixels of the picture, and whether its content is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """A random resized crop and a horizontal flip, as torchvision defines them.

    Attributes:
        scale: share of the picture's area, drawn uniformly.
        ratio: width to height, drawn uniformly on a logarithmic scale.
        flip: probability.
    Raises:
        ValueError: numbers that describe no crop.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < least <= most <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio: expected 0 < least <= most, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")

    def __str__(self) -> str:
        s, r = self.scale, self.ratio
        return (
            f"crop of {s[0]:.4g} to {s[1]:.4g} of the area, ratio {r[0]:.4g} to {r[1]:.4g}, "
            f"bicubic, flip {self.flip:.4g}"
        )

    def crop(self, size: tuple[int, int], content: bytes, *, seed: int, view: int) -> Crop:
        """The crop of one picture.

        Ten times an area and a ratio are drawn; the first box that fits is placed at random. If
        none fits, it is the largest central box within ``ratio``.

        Args:
            size: width and height.
            content: digest of the file.
            seed: of the run.
            view: epoch, or number of the cached view.
        """
        width, height = size
        draw = _uniform(f"fastood augment {_VERSION} {seed} {view} ".encode() + content)
        flip = next(draw) < self.flip
        low, high = map(math.log, self.ratio)
        for _ in range(_ATTEMPTS):
            area = width * height * (self.scale[0] + next(draw) * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + next(draw) * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(next(draw) * (width - w + 1)), int(next(draw) * (height - h + 1))
                return Crop(left, top, w, h, flip)
        w, h = width, height
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return Crop((width - w) // 2, (height - h) // 2, w, h, flip)


CLIP_TRAIN = Augmentation()
"""CoOp, CoCoOp, LoCoOp, CLIP-Adapter: crop (.08, 1), flip."""

TIP_VIEWS = Augmentation(scale=(0.5, 1.0))
"""Views whose mean is a Tip-Adapter key, Tip-Adapter-F's training images: crop (.5, 1), flip."""


class Augmenter:
    """Pictures to augmented pixels as the encoder wants them.

    A crop handed to the encoder's own preprocessing would be resized a second time and lose its
    sides to the centre crop. So the crop is resized once, to the size the preprocessing gives
    out, and then gets the values that it gives pixels: these are read off it with pictures of a
    single colour, which no resize or crop changes. Mean, deviation, channel range and any other
    function of single values are thereby exactly the encoder's own.

    Args:
        encoder: whose preprocessing decides about size and values.
        augmentation: the crop.
        seed: of the run.

    Raises:
        ModelError: if the preprocessing is not a resize or crop followed by a function of each
            value (it mixes channels, is random, or depends on the place in the picture).
    """

    def __init__(self, encoder: Encoder, augmentation: Augmentation = CLIP_TRAIN, *, seed: int = 1):
        self.augmentation, self.seed = augmentation, int(seed)
        self.table, self.size = _values(encoder.preprocess, encoder.name)
        self._base = encoder.preprocess_id

    def id(self, view: int) -> str:
        """Text that changes with the pixels of a view; part of the features' cache key."""
        return (
            f"{self._base}; instead of its resize and crop: {self.augmentation} to {self.size}, "
            f"version {_VERSION}, seed {self.seed}, view {view}"
        )

    def view(self, number: int) -> View:
        """The transform of one view, as ``encode_images`` takes it."""
        return View(self, number)

    def __call__(self, image: Any, content: bytes, view: int) -> Tensor:
        """(3, H, W) pixels of an RGB ``PIL.Image`` whose file has the digest ``content``."""
        import numpy as np
        from PIL import Image

        crop = self.augmentation.crop(image.size, content, seed=self.seed, view=view)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        height, width = self.size
        small = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
        if crop.flip:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(small)).permute(2, 0, 1).to(torch.int64)
        return torch.stack([self.table[c][values[c]] for c in range(3)])


@dataclass(frozen=True)
class View:
    """One view: ``transform(image, content) -> pixels`` with an ``id``."""

    augmenter: Augmenter
    number: int

    @property
    def id(self) -> str:
        return self.augmenter.id(self.number)

    def __call__(self, image: Any, content: bytes) -> Tensor:
        return self.augmenter(image, content, self.number)


def _uniform(key: bytes) -> Iterator[float]:
    """Numbers in [0, 1) with 53 random bits, from a hash in counter mode."""
    count = 0
    while True:
        block = hashlib.blake2b(key + count.to_bytes(4, "little")).digest()
        for i in range(0, len(block), 8):
            yield (int.from_bytes(block[i : i + 8], "little") >> 11) * 2.0**-53
        count += 1


def _values(preprocess: Callable[[Any], Tensor], name: str) -> tuple[Tensor, tuple[int, int]]:
    """(3, 256) what the preprocessing makes of each value of each channel, and its (H, W)."""
    from PIL import Image

    def pixels(colour: tuple[int, int, int], size: tuple[int, int]) -> Tensor:
        return torch.as_tensor(preprocess(Image.new("RGB", size, colour)))

    first = pixels((0, 0, 0), (64, 64))
    if first.ndim != 3 or first.shape[0] != 3 or not first.is_floating_point():
        raise ModelError(
            f"{name}: expected preprocess to give (3, H, W) floats, got {tuple(first.shape)} "
            f"{first.dtype}"
        )
    height, width = int(first.shape[1]), int(first.shape[2])
    table = torch.empty(3, 256, dtype=first.dtype)
    for value in range(256):
        flat = pixels((value, value, value), (width, height))
        table[:, value] = flat[:, height // 2, width // 2]
        if value in (0, 255) and not torch.allclose(flat, table[:, value, None, None], atol=1e-4):
            raise ModelError(_unusable(name, "it treats places of the picture differently"))
    for colour in _COLOURS:
        flat = pixels(colour, (width + 13, height + 7))
        want = torch.stack([table[c, colour[c]] for c in range(3)])[:, None, None]
        if flat.shape != first.shape or not torch.allclose(flat, want.expand_as(flat), atol=1e-4):
            raise ModelError(
                _unusable(name, "it mixes channels, is random, or keeps no fixed size")
            )
    return table, (height, width)


def _unusable(name: str, why: str) -> str:
    return (
        f"{name}: training augmentation needs a preprocessing that resizes or crops and then maps "
        f"single values, but {why}; train on unaugmented features (views=1)"
    )
