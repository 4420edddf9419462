"""Swin classifiers of timm and Hugging Face, versions 1 and 2.

All tokens are pooled for the image, so unlike in a CLIP the last block runs whole. Patches take its
value path (``fastood.models.swin``), which behind attention runs as one batch with the main path.

Between stages the map is halved. Here that belongs to the last block of a stage in both libraries,
so that what is kept between blocks is the smaller map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.classifier import ClassifierEncoder
from fastood.models.matrices import Matrix
from fastood.models.swin import SwinBlock, swin
from fastood.setar.tails import Tails
from fastood.setar.towers.base import (
    ImageTower,
    Seen,
    check_matrix,
    check_precision,
    compare,
    input_of,
)

__all__ = ["SwinTower"]


class SwinTower(ImageTower):
    """The Swin of a classifier; x_i is a map (b, H, W, C), smaller and wider with every stage.

    W_up, W_down and W_o candidates start after the heads, W_q, W_k and W_v run the attention of
    their block once each, with the weight in the module meanwhile: nothing else may use the model
    at that time.

    Raises:
        ModelError: for other networks, half precision, or if the parts do not give the model's
            own features on an image of noise; with the reason.
    """

    def __init__(self, encoder: ClassifierEncoder) -> None:
        self.name, self._model = encoder.name, encoder.model
        self._device, self._dtype = encoder.device, encoder.dtype
        check_precision(encoder)
        parts = swin(self._model)
        if isinstance(parts, str):
            raise self._unknown(parts)
        classifier = encoder.classifier()
        if not isinstance(classifier, nn.Linear):
            raise self._unknown(f"its classifier is a {type(classifier).__name__}")
        self._classifier = classifier
        self._parts, self._blocks = parts, parts.blocks
        self.depth = len(self._blocks)
        self._check(encoder)

    @torch.no_grad()
    def start(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, self._dtype)
        x = input_of(self._blocks[0].module, lambda: self._model(pixels)).detach()
        return self._parts.to_map(x, pixels)

    @torch.no_grad()
    def block(self, index: int, x: Tensor) -> Tensor:
        return self._next(index, self._blocks[:-1][index].forward(x))

    def variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Tensor]:
        check_matrix(matrix, "image", range(self.depth - 1))
        return self._variants(matrix, tails, x)

    @torch.no_grad()
    def _variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Tensor]:
        assert matrix.layer is not None
        for y in self._candidates(matrix, tails, x, both=False):
            yield self._next(matrix.layer, y)

    @torch.no_grad()
    def seen(self, x: Tensor) -> Seen:
        last = self._blocks[-1]
        return self._cut(last.feed(_after(last, x, both=True)))

    def seen_variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Seen]:
        check_matrix(matrix, "image", range(self.depth - 1, self.depth))
        return self._seen_variants(matrix, tails, x)

    @torch.no_grad()
    def _seen_variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Seen]:
        if matrix.kind in ("q", "k"):  # patches do not ask
            parts = self._parts
            local = parts.norm(self._blocks[-1].value_path(x)).flatten(1, 2)
            for y in self._candidates(matrix, tails, x, both=False):
                yield Seen(parts.pool(parts.norm(y)), local)
            return
        for y in self._candidates(matrix, tails, x, both=True):
            yield self._cut(y)

    def head(self) -> tuple[Tensor, Tensor | None]:
        bias = self._classifier.bias
        return self._classifier.weight.detach(), None if bias is None else bias.detach()

    def _candidates(
        self, matrix: Matrix, tails: Tails, x: Tensor, *, both: bool
    ) -> Iterator[Tensor]:
        """Maps after the block of ``matrix``; ``both`` has those of the value path behind."""
        assert matrix.layer is not None
        block, kind = self._blocks[matrix.layer], matrix.kind
        if kind in ("q", "k", "v"):
            for weight in _weights(tails, matrix.weight(self._model)):
                with self._replaced(matrix, weight):
                    a = _after(block, x, both=both)
                yield block.feed(a)
        elif kind == "o":
            heads = _heads(block, x)
            heads = torch.cat([heads, block.values(x)]) if both else heads
            x = torch.cat([x, x]) if both else x
            for mixed in tails.results(heads, block.out(heads)):
                yield block.feed(block.join(x, mixed))
        else:
            a = _after(block, x, both=both)
            given = block.enter(a)
            y = block.fc(given)
            if kind == "up":
                for z in tails.results(given, y):
                    yield block.leave(a, block.proj(block.act(z)))
                return
            inside = block.act(y)
            for z in tails.results(inside, block.proj(inside)):
                yield block.leave(a, z)

    def _next(self, index: int, y: Tensor) -> Tensor:
        halve = self._parts.halve.get(index)
        return y if halve is None else halve(y)

    def _cut(self, both: Tensor) -> Seen:
        """From maps of the main and of the value path."""
        main, value = self._parts.norm(both).chunk(2)
        return Seen(self._parts.pool(main), value.flatten(1, 2))

    @contextmanager
    def _replaced(self, matrix: Matrix, weight: Tensor) -> Iterator[None]:
        """The module has ``weight`` in place of the matrix."""
        owner = self._model.get_submodule(matrix.module)
        own = matrix.stored(self._model)
        other = own.detach().clone()
        matrix.of(other).copy_(weight)
        owner._parameters[matrix.parameter] = nn.Parameter(other, requires_grad=False)
        try:
            yield
        finally:
            owner._parameters[matrix.parameter] = own

    def _unknown(self, why: str) -> ModelError:
        return ModelError(f"{self.name}: the image tower cannot be taken apart: {why}")

    @torch.no_grad()
    def _check(self, encoder: ClassifierEncoder) -> None:
        noise = torch.randn(1, *encoder.input_size, generator=torch.Generator().manual_seed(0))
        x = self.start(noise)
        for i in range(self.depth - 1):
            x = self.block(i, x)
        whole, seen = encoder.encode_image(noise, local=True), self.seen(x)
        assert whole.local is not None
        compare(self.name, "image features", seen.image, whole.image)
        compare(self.name, "patch features", seen.local, whole.local)
        # tokens that are all alike get their own value whatever they attend to
        last = self._blocks[-1]
        if all(
            size % window == 0 for size, window in zip(x.shape[1:3], last.window(), strict=True)
        ):
            alike = x[:, :1, :1].expand_as(x).contiguous()
            main, value = _after(last, alike, both=True).chunk(2)
            compare(self.name, "patch features", value, main)


def _mixed(block: SwinBlock, x: Tensor) -> Tensor:
    """m of a map as the module computes it, in the order of the map."""
    return input_of(block.over, lambda: block.forward(x)).reshape(x.shape)


def _heads(block: SwinBlock, x: Tensor) -> Tensor:
    """What the output layer is given, in the order of the map.

    Cutting a map into windows and putting it together again only moves tokens, so the output layer
    can come behind that as well as before.
    """
    handle = block.out.register_forward_hook(lambda _, args, result: args[0])
    try:
        return _mixed(block, x)
    finally:
        handle.remove()


def _after(block: SwinBlock, x: Tensor, *, both: bool) -> Tensor:
    """The map after attention; ``both`` has that of the value path behind it."""
    mixed = _mixed(block, x)
    if not both:
        return block.join(x, mixed)
    return block.join(torch.cat([x, x]), torch.cat([mixed, block.out(block.values(x))]))


def _weights(tails: Tails, weight: Tensor) -> Iterator[Tensor]:
    """The candidates' weights themselves: what they make of the unit vectors."""
    units = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    for made in tails.results(units, weight.T):
        yield made.T
