"""What a search needs of an image tower: to be run block by block, with candidates' weights too.

Letters: b images, L blocks, P patches, D joint width. ``x_i`` is what enters block i, of any shape
that starts with b: chunks of images can be cut and joined along it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder
from fastood.models.matrices import Matrix
from fastood.setar.tails import Tails

__all__ = [
    "ImageTower",
    "Seen",
    "check_matrix",
    "check_precision",
    "compare",
    "image_tower",
    "input_of",
]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative to the largest number. Float32 leaves room for TF32 and for kernels that differ between
a model's own pass and the one in parts, float64 for Hugging Face's "eager" attention, whose softmax
is taken in float32; a forgotten term is larger than that."""


class Seen(NamedTuple):
    """Features of one chunk of images, not normalised."""

    image: Tensor
    """(b, D) of the whole images; of a unimodal tower what enters its classifier."""
    local: Tensor
    """(b, P, D) of their patches."""


class ImageTower(ABC):
    """The image tower of an encoder in parts.

    Weights are read from the modules at every call, so a changed weight is seen at once. Nothing
    is differentiated.

    Attributes:
        depth: L, its number of blocks.
    """

    depth: int

    @abstractmethod
    def start(self, pixels: Tensor) -> Tensor:
        """x_0 of pixels (b, 3, H, W): what the model itself feeds its first block."""

    @abstractmethod
    def block(self, index: int, x: Tensor) -> Tensor:
        """x_{index+1} from x_index, 0 <= index < L - 1; ``x`` is left as it is."""

    @abstractmethod
    def variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Tensor]:
        """x_{i+1} from x_i with each candidate's weight for a matrix of block i < L - 1.

        In the order of ``tails.counts``. A result is valid until the next one is asked for.
        """

    @abstractmethod
    def seen(self, x: Tensor) -> Seen:
        """Features from x_{L-1}, through the last block and what follows."""

    @abstractmethod
    def seen_variants(self, matrix: Matrix, tails: Tails, x: Tensor) -> Iterator[Seen]:
        """The same with each candidate's weight for a matrix of the last block, or ``proj``."""

    def head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (K, C) and bias (K,) of a unimodal tower's classifier; None for a CLIP."""
        return None


def image_tower(encoder: Encoder) -> ImageTower:
    """The image tower of an encoder in parts: a CLIP's vision transformer, or a Swin classifier.

    Raises:
        ModelError: if it cannot be taken apart, with the reason.
    """
    from fastood.models.classifier import ClassifierEncoder

    if isinstance(encoder, ClassifierEncoder):
        from fastood.setar.towers.swin import SwinTower

        return SwinTower(encoder)
    from fastood.setar.towers.vit import VitTower

    return VitTower(encoder)


class _Stop(Exception):
    """Ends a forward pass whose input to some block is all that was wanted."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


@contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def input_of(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The first argument ``module`` is called with in ``forward()``, which ends there.

    Raises:
        RuntimeError: if it is not called.
    """
    try:
        with _stopping(module):
            forward()
    except _Stop as stop:
        return stop.x
    raise RuntimeError(f"the forward pass never reached its {type(module).__name__}")


def check_matrix(matrix: Matrix, tower: str, layers: range, *, proj: bool = False) -> None:
    """
    Raises:
        ValueError: for a matrix of another tower or of other layers than ``layers``.
    """
    fits = proj if matrix.layer is None else matrix.layer in layers
    if matrix.tower != tower or not fits:
        where = f"layers {layers.start}..{layers.stop - 1}" + (", or proj" if proj else "")
        raise ValueError(
            f"matrix: expected one of the {tower} tower, {where}, got {matrix.address}"
        )


def check_precision(encoder: Encoder) -> None:
    """
    Raises:
        ModelError: for weights in half precision.
    """
    if encoder.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{encoder.name}: SeTAR compares losses that differ in the sixth digit and needs "
            f"float32 or float64 weights, got {encoder.dtype}; load it with dtype='fp32'"
        )


def compare(name: str, what: str, ours: Tensor, theirs: Tensor) -> None:
    """
    Raises:
        ModelError: if features by parts differ from the model's own by more than rounding.
    """
    if ours.shape != theirs.shape:
        raise ModelError(
            f"{name}: taken apart, its {what} have the shape {tuple(ours.shape)}, not "
            f"{tuple(theirs.shape)}; the tower computes something else than its kind usually does"
        )
    gap = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    if not bool(gap <= _TOLERANCE[ours.dtype]):
        raise ModelError(
            f"{name}: taken apart, its {what} differ from the model's own by {float(gap):.1e} of "
            f"the largest; the tower computes something else than its kind usually does"
        )
