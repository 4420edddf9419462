"""What the image classifiers of every library have in common: features, then one last layer."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastood.data.classes import plain_name
from fastood.errors import ModelError
from fastood.models.base import Encoder, ImageFeatures
from fastood.models.local import capture_input
from fastood.models.swin import Swin, swin

if TYPE_CHECKING:
    from fastood.scores.bank import Similarities

__all__ = ["ClassifierEncoder", "ClassifierHead", "class_order"]


class ClassifierHead:
    """The last layer of a classifier as a head: its logits stand where cosines stand for CLIP.

    ``logit_scale`` is 1, so at tau = 1 ``mcm`` and ``msp`` are both the maximum softmax
    probability and ``energy`` is the log-sum-exp of the logits.

    Args:
        layer: (..., D) → (..., K); it is copied.
        patches: whether local features make sense to it.
    """

    logit_scale = 1.0

    def __init__(self, layer: nn.Module, *, patches: bool = False) -> None:
        self.layer = copy.deepcopy(layer).float().eval()
        self.patches = patches

    @torch.no_grad()
    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Logits (B, K) in float32 of features (B, D), and (B, P, K) of local ones (B, P, D).

        Raises:
            ValueError: if local features are given, and the classifier has none.
        """
        from fastood.scores.bank import Similarities

        if local is not None and not self.patches:
            raise ValueError("local: this classifier has no local features, got a tensor")
        weight = next(self.layer.parameters())
        if weight.device != features.device:
            self.layer = self.layer.to(features.device)
        patches = None if local is None else self.layer(local.float())
        return Similarities(image=self.layer(features.float()), local=patches)


class ClassifierEncoder(Encoder):
    """An image classifier: the features before its last layer, and that layer as a head.

    There is no text: classes are the head's own. Of classifiers only Swins have local features,
    those of the value path (``fastood.models.swin``), to which the head is applied as it is.
    Classes below this one are built from ``(model, preprocess, *, name, class_names,
    preprocess_id)``, which is how they are copied.

    Attributes:
        model: the classifier, in evaluation mode.
        class_names: names of the head's classes, or None where they are not known.
        input_size: (3, H, W) of the images it was made for.
    """

    model: Any
    class_names: tuple[str, ...] | None = None
    input_size: tuple[int, int, int]
    no_local: str | None = "classifiers have no joint space for their patches"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, local: bool = False) -> ImageFeatures:
        pixels = self._checked(pixels, local=local)
        if not len(pixels):
            return self._nothing(local=local)
        if not local:
            return ImageFeatures(self._features(pixels))
        parts = swin(self.model)
        if isinstance(parts, str):  # it was known when this was made
            raise ModelError(f"{self.name} has no local features any more: {parts}")
        last = parts.blocks[-1]
        with capture_input(last.module) as given:
            image = self._features(pixels)
        patches = parts.norm(last.value_path(given()))
        return ImageFeatures(image, patches.reshape(len(pixels), -1, patches.shape[-1]))

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
        """Fill ``embed_dim`` and the head, once the last layer is seen to make the model's logits,
        and what concerns local features.

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
        self.embed_dim = int(features.shape[-1])
        if isinstance(swin(self.model), Swin):
            self.no_local = None
            local = self.encode_image(pixels, local=True).local
            assert local is not None
            self.num_patches = local.shape[1]
        self._head = ClassifierHead(layer, patches=self.no_local is None)


def class_order(encoder: Encoder, class_names: Sequence[str]) -> list[int]:
    """Which of a classifier's logits belongs to each of ``class_names``.

    Found by name if the classifier names the same classes, whatever their order; otherwise the
    i-th name is taken for its i-th class.

    Raises:
        ValueError: another number of classes.
    Warns:
        RuntimeWarning: the classifier names its classes, and otherwise.
    """
    own = getattr(encoder, "class_names", None) or ()
    head: Any = encoder.head()
    size = len(next(head.layer.parameters()))
    if len(class_names) != size:
        raise ValueError(
            f"class_names: expected the {size} classes of {encoder.name}, got {len(class_names)}"
        )
    place = {plain_name(name): k for k, name in enumerate(own)}
    order = [place.get(plain_name(name), -1) for name in class_names]
    if -1 not in order and len(set(order)) == size:
        return order
    if own:
        warnings.warn(
            f"class_names: not spelled as those of {encoder.name}, whose order is taken: "
            f"{class_names[0]!r} for {own[0]!r}, ..., {class_names[-1]!r} for {own[-1]!r}",
            RuntimeWarning,
            stacklevel=3,
        )
    return list(range(size))
