"""What is on disk: image folders, lists, archives, class names, feature files. Nothing decoded."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC: dict[str, str] = {
    "ImageItem": "fastood.data.imageset",
    "ImageSet": "fastood.data.imageset",
    "Layout": "fastood.data.layouts",
    "SubSet": "fastood.data.layouts",
    "decode": "fastood.data.decode",
    "load_features": "fastood.data.feature_files",
    "load_images": "fastood.data.load",
    "recognise": "fastood.data.layouts",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
