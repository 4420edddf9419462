"""Networks of encoders, and encoders with weights of their own, for whoever changes weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fastood.errors import ModelError
from fastood.models.base import Encoder

__all__ = ["copy_encoder", "network_of"]


def copy_encoder(encoder: Encoder, *, name: str | None = None) -> Encoder:
    """An encoder of its own weights, equal to ``encoder`` now.

    Raises:
        ModelError: for anything but open_clip, Hugging Face and timm models.
    """
    from fastood.models.classifier import ClassifierEncoder
    from fastood.models.hf import HFEncoder
    from fastood.models.openclip import OpenClipEncoder

    options: dict[str, Any] = {
        "name": encoder.name if name is None else name,
        "preprocess_id": encoder.preprocess_id,
    }
    # not a deep copy of the encoder: functions it holds would keep the first model's weights
    if isinstance(encoder, OpenClipEncoder):
        model = copy.deepcopy(encoder.model)
        return OpenClipEncoder(
            model, encoder.preprocess, encoder.tokenizer, warn=encoder._warn, **options
        )
    if isinstance(encoder, HFEncoder):
        model = copy.deepcopy(encoder.model)
        return HFEncoder(model, encoder.preprocess, encoder.tokenizer, **options)
    if isinstance(encoder, ClassifierEncoder):
        kind: Any = type(encoder)
        model = copy.deepcopy(encoder.model)
        return kind(model, encoder.preprocess, class_names=encoder.class_names, **options)
    raise ModelError(
        f"{encoder.name}: LoRA and SeTAR change open_clip and Hugging Face CLIPs, SeTAR also "
        f"classifiers of timm and Hugging Face; got a {type(encoder).__name__}"
    )


def network_of(encoder: Encoder) -> nn.Module:
    """The network of an encoder.

    Raises:
        ModelError: if it shows none.
    """
    found = getattr(encoder, "model", None)
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{encoder.name}: expected a model whose weights can be changed, got a "
            f"{type(encoder).__name__}"
        )
    return found
