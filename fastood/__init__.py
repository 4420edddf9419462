"""fastood: out-of-distribution detection for vision-language models, fast.

Public names are loaded on first use, so ``import fastood`` costs nothing: it imports neither torch
nor open_clip nor matplotlib, builds nothing, and writes nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastood._version import __version__

_PUBLIC: dict[str, str] = {
    # name: module that defines it
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
