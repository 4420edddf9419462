"""Images and prompts to features: encoded once, kept in a content-addressed cache."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC: dict[str, str] = {
    "FeatureCache": "fastood.features.cache",
    "FeatureChunk": "fastood.features.featureset",
    "FeatureSet": "fastood.features.featureset",
    "Skipped": "fastood.features.featureset",
    "encode_classes": "fastood.features.text",
    "encode_images": "fastood.features.encode",
    "prompts_digest": "fastood.features.text",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood.features' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
