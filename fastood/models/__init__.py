"""Networks behind one small interface: image in, features out.

    >>> from fastood.models import load_model                              # doctest: +SKIP
    >>> encoder = load_model("ViT-B-16/openai")                            # doctest: +SKIP

``load_model`` reads open_clip names, local checkpoints, Hugging Face and timm models and the tiny
model that ships with the package. A network you built yourself becomes an encoder with
``OpenClipEncoder``, ``HFEncoder``, ``HFClassifierEncoder``, ``TimmEncoder`` or, for anything else,
``CallableEncoder``.

Features you already have need no encoder: hand the tensors to ``fastood.scores`` (or keep them in
a ``fastood.features.FeatureSet``), with the text features as a ``ClassBank``.

Names are loaded on first use; importing this module imports none of open_clip, transformers and
timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastood.lazy import lazy_names

if TYPE_CHECKING:  # what type checkers and editors read; _MODULES says the same at run time
    from fastood.models.base import Encoder, ImageFeatures, TextSupport
    from fastood.models.catalogue import ModelInfo, list_models
    from fastood.models.custom import CallableEncoder
    from fastood.models.hf import HFEncoder
    from fastood.models.hf_classifier import HFClassifierEncoder
    from fastood.models.load import load_model
    from fastood.models.openclip import OpenClipEncoder
    from fastood.models.timm_classifier import TimmEncoder

__all__ = [
    "CallableEncoder",
    "Encoder",
    "HFClassifierEncoder",
    "HFEncoder",
    "ImageFeatures",
    "ModelInfo",
    "OpenClipEncoder",
    "TextSupport",
    "TimmEncoder",
    "list_models",
    "load_model",
]

_MODULES = {
    "base": ("Encoder", "ImageFeatures", "TextSupport"),
    "catalogue": ("ModelInfo", "list_models"),
    "custom": ("CallableEncoder",),
    "hf": ("HFEncoder",),
    "hf_classifier": ("HFClassifierEncoder",),
    "load": ("load_model",),
    "openclip": ("OpenClipEncoder",),
    "timm_classifier": ("TimmEncoder",),
}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
