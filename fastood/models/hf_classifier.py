"""Hugging Face image classifiers, ``...ForImageClassification`` (extra ``hf``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models import files
from fastood.models.classifier import ClassifierEncoder
from fastood.models.common import module_device, module_dtype, seeded
from fastood.models.fingerprint import Fingerprint, describe_callable
from fastood.models.hf import ProcessorTransform, _reach, _weights
from fastood.models.local import capture_input

__all__ = ["HFClassifierEncoder", "is_classifier", "load_hf_classifier"]

_UNSEEN = (
    "image_size",
    "patch_size",
    "depths",
    "num_heads",
    "num_attention_heads",
    "window_size",
    "pretrained_window_sizes",
    "hidden_act",
    "layer_norm_eps",
)
"""Settings that change features and that the weights do not tell; a fixed list, so that a new
transformers changes nothing."""


class HFClassifierEncoder(ClassifierEncoder):
    """A Hugging Face image classifier: Swin, Swinv2, ViT, ConvNeXt, ResNet and others.

    The features (B, D) are what its ``classifier`` is given.

    Args:
        model: a ``...ForImageClassification`` model; it is set to evaluation mode.
        preprocess: ``PIL.Image`` → ``(3, H, W)``, for example ``ProcessorTransform(processor)``.
        class_names: names of its classes; default: those of its configuration, if it has any.
        name, preprocess_id, device, dtype: as in ``OpenClipEncoder``.
    Raises:
        ModelError: if the model has no single last layer that makes its logits.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        *,
        name: str = "Hugging Face classifier",
        class_names: Sequence[str] | None = None,
        preprocess_id: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config: Any = getattr(model, "config", None)
        if config is None or not type(model).__name__.endswith("ForImageClassification"):
            raise ModelError(
                f"{name}: expected a Hugging Face ...ForImageClassification model, got "
                f"{type(model).__name__}; other networks fit in CallableEncoder"
            )
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self.model = cast(Any, model.eval())
        self.name = name
        self.preprocess = preprocess
        self.preprocess_id = preprocess_id or describe_callable(preprocess)
        self.device, self.dtype = module_device(model), module_dtype(model)
        names = _class_names(config) if class_names is None else class_names
        self.class_names = None if names is None else tuple(names)
        self.input_size = (3, *_size(config))
        self._find_head()
        self._fingerprint = Fingerprint(
            model,
            {
                "library": "transformers",
                "kind": type(model).__name__,
                "image": {n: getattr(config, n) for n in _UNSEEN if hasattr(config, n)},
            },
        )

    def classifier(self) -> nn.Module:
        layer = getattr(self.model, "classifier", None)
        if isinstance(layer, nn.Sequential) and len(layer):  # ResNet: flatten, then the layer
            layer = layer[-1]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{self.name}: expected a linear layer called classifier, got "
                f"{type(layer).__name__}; use CallableEncoder for its features"
            )
        return layer

    def _features(self, pixels: Tensor) -> Tensor:
        with capture_input(self.classifier()) as given:
            self._logits(pixels)
        return given()

    def _logits(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def is_classifier(source: str, *, cache_dir: str | None) -> bool:
    """Whether the configuration of a folder or Hub repository names an image classifier.

    Raises:
        WeightsUnavailable: if the repository is neither here nor reachable.
    """
    if Path(source).is_dir():
        path = Path(source) / "config.json"
    else:
        path = Path(files.hub_file(source, ["config.json"], cache_dir=cache_dir))
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return False  # whoever reads it next says what is wrong with it
    return isinstance(named, list) and any(
        isinstance(n, str) and n.endswith("ForImageClassification") for n in named
    )


def load_hf_classifier(
    source: str,
    *,
    name: str,
    random: bool,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    preprocess: Any,
    cache_dir: str | None,
    seed: int,
) -> HFClassifierEncoder:
    """A classifier from a local folder or the Hub; see ``load_model``."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{name} needs transformers: pip install 'fastood[hf]' ({error})"
        ) from error
    config = _reach(name, transformers.AutoConfig.from_pretrained, source, cache_dir=cache_dir)
    kind = transformers.AutoModelForImageClassification
    if random:
        with seeded(seed):
            model = kind.from_config(config)
    else:
        model = _weights(kind, source, name, allow_pickle, cache_dir)
    if preprocess is None:
        auto = transformers.AutoImageProcessor
        preprocess = ProcessorTransform(
            _reach(name, auto.from_pretrained, source, cache_dir=cache_dir)
        )
    return HFClassifierEncoder(model, preprocess, name=name, device=device, dtype=dtype)


def _size(config: Any) -> tuple[int, int]:
    """(H, W) of an image the model takes."""
    config = getattr(config, "vision_config", config)  # of a CLIP with a classifier
    size = getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _class_names(config: Any) -> list[str] | None:
    """Names of the classes in order; None if the configuration only numbers them."""
    names = getattr(config, "id2label", None) or {}
    if sorted(names) != list(range(len(names))):
        return None
    found = [str(names[i]) for i in range(len(names))]
    return None if found == [f"LABEL_{i}" for i in range(len(found))] else found
