"""What the image classifiers of every library have in common: features, then one last layer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder, ImageFeatures

if TYPE_CHECKING:
    from fastood.scores.bank import Similarities

__all__ = ["ClassifierEncoder", "ClassifierHead"]


class ClassifierHead:
    """The last layer of a classifier as a head: its logits stand where cosines stand for CLIP.

    ``logit_scale`` is 1, so at tau = 1 ``mcm`` and ``msp`` are both the maximum softmax
    probability and ``energy`` is the log-sum-exp of the logits.
    """

    logit_scale = 1.0

    def __init__(self, layer: nn.Module) -> None:
        self.layer = copy.deepcopy(layer).float().eval()

    @torch.no_grad()
    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Logits (B, K) in float32 of features (B, D).

        Raises:
            ValueError: if local features are given; a classifier has none.
        """
        from fastood.scores.bank import Similarities

        if local is not None:
            raise ValueError("local: a classifier head has no local features, got a tensor")
        weight = next(self.layer.parameters())
        if weight.device != features.device:
            self.layer = self.layer.to(features.device)
        return Similarities(image=self.layer(features.float()))


class ClassifierEncoder(Encoder):
    """An image classifier: the features before its last layer, and that layer as a head.

    There are no text and no local features: classes are the head's own. Classes below this one are
    built from ``(model, preprocess, *, name, class_names, preprocess_id)``, which is how they are
    copied.

    Attributes:
        model: the classifier, in evaluation mode.
        class_names: names of the head's classes, or None where they are not known.
        input_size: (3, H, W) of the images it was made for.
    """

    model: Any
    class_names: tuple[str, ...] | None = None
    input_size: tuple[int, int, int]
    no_local = "classifiers have no joint space for their patches"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        pixels = self._checked(pixels, local=local)
        if not len(pixels):
            return self._nothing(local=local)
        return ImageFeatures(self._features(pixels))

    def head(self) -> ClassifierHead:
        """The classifier's own head."""
        return self._head

    @abstractmethod
    def classifier(self) -> nn.Module:
        """The last layer: features (B, D) to logits (B, K)."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(B, D) what the last layer is given."""

    @abstractmethod
    def _logits(self, pixels: Tensor) -> Tensor:
        """(B, K) of the whole model."""

    _fingerprint: Any
    _head: ClassifierHead

    @torch.no_grad()
    def _find_head(self) -> None:
        """Fill ``embed_dim`` and the head, once the last layer is seen to make the model's logits.

        Raises:
            ModelError: if it makes other logits.
        """
        layer = self.classifier()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pixels = torch.randn(1, *self.input_size).to(self.device, self.dtype)
        features = self._features(pixels)
        logits = self._logits(pixels)
        again = layer(features)
        tolerance = 1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2
        if again.shape != logits.shape or not torch.allclose(
            again.float(), logits.float(), rtol=tolerance, atol=tolerance
        ):
            raise ModelError(
                f"{self.name}: its last layer does not map the pre-logits to the logits "
                f"(a distilled or multi-head classifier?); wrap its logits in CallableEncoder"
            )
        self._head, self.embed_dim = ClassifierHead(layer), int(features.shape[-1])
