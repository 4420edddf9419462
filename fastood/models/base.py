"""The one interface between a network and the rest of fastood: image in, features out.

Everything behind it (open_clip, Hugging Face, timm, a callable, features on disk) differs only in
how it fills these members. Nothing here knows about scores, files or caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.common import check_pixels

__all__ = ["Encoder", "ImageFeatures", "TextSupport"]


class ImageFeatures(NamedTuple):
    """What an image tower returns for a batch: not normalised, in the dtype it computed in."""

    image: Tensor
    """(B, D) global features."""
    local: Tensor | None = None
    """(B, P, D) patch features in the joint space, or None when not asked for."""


@dataclass(frozen=True)
class TextSupport:
    """How a text tower may be run (filled by encoders that have one)."""

    context_length: int
    croppable: bool
    """True if positions behind an end-of-text token cannot influence the features: only a prompt's
    own tokens are run, and what several prompts begin with is run once."""


class Encoder(ABC):
    """A frozen network with fixed preprocessing.

    Attributes:
        name: what a user typed to get it, for example ``"ViT-B-16/openai"``.
        embed_dim: D of the joint space.
        logit_scale: γ = exp(the model's learned logit scale); 1.0 for unimodal classifiers.
        logit_bias: additive logit bias (SigLIP); 0.0 otherwise.
        preprocess: ``PIL.Image`` (RGB) → ``(3, H, W)`` float tensor.
        preprocess_id: text that changes whenever ``preprocess`` computes something else.
        fingerprint: hex digest of architecture and weights, computed lazily and remembered.
        device, dtype: where and in which precision the towers run.
        num_patches: P of the local features, or None without them.
        no_local: None if local features exist, else the reason they do not, for the user.
        text: None without a text tower.

    The network is put into evaluation mode and never differentiated through, except by
    ``encode_tokens``; features come back detached, on ``device``, in the dtype the towers computed
    in.
    """

    name: str
    embed_dim: int
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    preprocess: Callable[[Any], Tensor]
    preprocess_id: str
    device: torch.device
    dtype: torch.dtype
    num_patches: int | None = None
    no_local: str | None = "this encoder offers no patch features"
    text: TextSupport | None = None

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        """Features of ``pixels (B, 3, H, W)``, moved to the encoder's device and dtype.

        Raises:
            ModelError: if ``local=True`` and the tower defines no local features (says which).
        """

    def _checked(self, pixels: Tensor, *, local: bool) -> Tensor:
        """``pixels`` where the towers want them, if they have what is asked for."""
        if local and self.no_local is not None:
            raise ModelError(f"{self.name} has no local features: {self.no_local}")
        return check_pixels(pixels, self.device, self.dtype)

    def _nothing(self, *, local: bool = False) -> ImageFeatures:
        """Features of no image, or in ``image`` of no prompt."""
        empty = torch.zeros(0, self.embed_dim, device=self.device, dtype=self.dtype)
        patches = empty.new_zeros(0, self.num_patches or 0, self.embed_dim)
        return ImageFeatures(empty, patches if local else None)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, D) global features: an encoder also is the plain function other toolkits ask for."""
        return self.encode_image(pixels).image

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) unnormalised features of N prompts."""
        raise ModelError(f"{self.name} has no text tower; it scores its own classes only")

    def tokenize(self, prompts: Sequence[str]) -> Tensor | None:
        """(N, L) token ids on the CPU, or None where a text tower shows no tokens.

        Two prompts with equal rows have equal features: the model cannot tell them apart.
        """
        del prompts
        return None

    def text_module(self) -> nn.Module | None:
        """The network that holds the text tower, for prompt learning; None if there is none."""
        return None

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(N, D) unnormalised features of token ids (N, L), by the whole tower, with gradient.

        Raises:
            ModelError: without a ``text_module``.
        """
        raise ModelError(f"{self.name} has no text tower that takes tokens")

    def head(self) -> Any:
        """A classifier's own head (``similarities(features, local=None)``), or None.

        None means that classes come from prompts: build a ``ClassBank`` from text features.
        """
        return None

    def warn_prompts(self, prompts: Sequence[str]) -> list[str]:
        """What a user should know about these prompts before trusting them (may be empty)."""
        del prompts
        return []
