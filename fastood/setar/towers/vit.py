"""CLIP's vision transformers with a class token, of open_clip and Hugging Face.

The last block needs less than a whole one. Of the main path only the class token asks, keys and
values are those of all tokens; every patch keeps its own value (the value path of GL-MCM, its
attention matrix the identity), so with

    h_0 = attention of the class token,   h_p = v_p of each patch

what follows the heads (output layer, residual, MLP, final norm, projection) is the same for both,
and runs once for all 1 + P tokens. W_q and W_k change h_0 alone. This holds where the class token
is the image's feature; towers that pool otherwise have no patch features here and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder
from fastood.models.blocks import Block, as_block, layer_norm
from fastood.models.hf import HFEncoder
from fastood.models.matrices import Matrix
from fastood.models.openclip import OpenClipEncoder
from fastood.setar.tails import Tails
from fastood.setar.towers.base import (
    ImageTower,
    Seen,
    check_matrix,
    check_precision,
    compare,
    input_of,
)
from fastood.setar.towers.steps import Attention, Heads, step, steps

__all__ = ["VitTower"]


class VitTower(ImageTower):
    """The vision transformer of an ``OpenClipEncoder`` or ``HFEncoder``; x_i is (b, 1 + P, W).

    Raises:
        ModelError: for other towers, unknown blocks, half precision, or if the parts do not give
            the model's own features on an image of noise; with the reason.
    """

    def __init__(self, encoder: Encoder) -> None:
        if encoder.no_local is not None:
            raise ModelError(
                f"{encoder.name}: SeTAR's objective needs patch features: {encoder.no_local}"
            )
        check_precision(encoder)
        self.name = encoder.name
        modules: Any
        if isinstance(encoder, OpenClipEncoder):
            visual = encoder.model.visual
            if not hasattr(visual, "transformer"):
                raise ModelError(
                    f"{encoder.name}: SeTAR changes the weights of transformer blocks; its image "
                    f"tower is a {type(visual).__name__}"
                )
            modules, self._norm = visual.transformer.resblocks, visual.ln_post
            self._first = getattr(visual.transformer, "batch_first", True)
            self._forward: Callable[[Tensor], Any] = visual
            self._owner, self._projection = visual, "proj"
            size = visual.image_size
        elif isinstance(encoder, HFEncoder):
            model = encoder.model
            vision = model.vision_model
            vision = getattr(vision, "vision_model", vision)  # some versions wrap it once more
            modules, self._norm = vision.encoder.layers, vision.post_layernorm
            self._first = True
            self._forward = lambda pixels: model.get_image_features(pixel_values=pixels)
            self._owner, self._projection = model, "visual_projection"
            size = model.config.vision_config.image_size
        else:
            raise ModelError(
                f"{encoder.name}: SeTAR takes apart the vision transformers of open_clip and "
                f"Hugging Face CLIPs, got a {type(encoder).__name__}"
            )
        self._entry = modules[0]
        self._blocks = _known(encoder.name, modules)
        self._device, self._dtype = encoder.device, encoder.dtype
        self.depth = len(self._blocks)
        self._compare(encoder, (size, size) if isinstance(size, int) else tuple(size))

    @torch.no_grad()
    def start(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, self._dtype)
        x = input_of(self._entry, lambda: self._forward(pixels)).detach()
        return x if self._first else x.transpose(0, 1).contiguous()

    def block(self, index: int, x: Tensor) -> Tensor:
        return step(self._blocks[:-1][index], x, _EVERY_TOKEN)

    def variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Tensor]:
        check_matrix(matrix, "image", range(self.depth - 1))
        assert matrix.layer is not None
        return steps(self._blocks[matrix.layer], matrix.kind, tails, x, _EVERY_TOKEN)

    @torch.no_grad()
    def seen(self, x: Tensor) -> Seen:
        return _cut(self._read(step(self._blocks[-1], x, _CLASS_AND_VALUES)))

    def seen_variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Seen]:
        check_matrix(matrix, "image", range(self.depth - 1, self.depth), proj=True)
        return self._seen_variants(matrix, tails, x)

    @torch.no_grad()
    def _seen_variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Seen]:
        last = self._blocks[-1]
        if matrix.kind == "proj":
            before = layer_norm(self._norm, step(last, x, _CLASS_AND_VALUES))
            for y in tails.results(before, self._project(before)):
                yield _cut(y)
        elif matrix.kind in ("q", "k"):  # patches do not ask
            local = self._read(step(last, x, _VALUES))
            for y in steps(last, matrix.kind, tails, x, _CLASS):
                yield Seen(self._read(y[:, 0]), local)
        else:
            for y in steps(last, matrix.kind, tails, x, _CLASS_AND_VALUES):
                yield _cut(self._read(y))

    def _read(self, x: Tensor) -> Tensor:
        """Tokens (..., W) after the last block → (..., D)."""
        return self._project(layer_norm(self._norm, x))

    def _project(self, x: Tensor) -> Tensor:
        projection = getattr(self._owner, self._projection)
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    def _compare(self, encoder: Encoder, size: tuple[int, int]) -> None:
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        whole = encoder.encode_image(noise, local=True)
        x = self.start(noise)
        for i in range(self.depth - 1):
            x = self.block(i, x)
        parts = self.seen(x)
        assert whole.local is not None
        compare(self.name, "image features", parts.image, whole.image)
        compare(self.name, "patch features", parts.local, whole.local)


def _known(name: str, modules: Any) -> tuple[Block, ...]:
    blocks = []
    for module in modules:
        block = as_block(module)
        if isinstance(block, str):
            raise ModelError(f"{name}: the image tower cannot be taken apart: {block}")
        blocks.append(block)
    return tuple(blocks)


def _cut(y: Tensor) -> Seen:
    return Seen(y[:, 0], y[:, 1:])


def _attend(heads: Heads) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in heads[:3])
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _first(x: Tensor) -> Tensor:
    return x[:, :1]


def _rest(x: Tensor) -> Tensor:
    return x[:, 1:]


_EVERY_TOKEN = Attention(_attend)
_CLASS = Attention(_attend, _first, _first)
_VALUES = Attention(lambda heads: _rest(heads.v), _first, _rest)
_CLASS_AND_VALUES = Attention(
    lambda heads: torch.cat([_attend(heads), _rest(heads.v)], dim=1), _first
)
