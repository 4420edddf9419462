"""fastood: out-of-distribution detection for vision-language models, fast.

Public names are loaded on first use, so ``import fastood`` costs nothing: it imports neither torch
nor open_clip nor matplotlib, builds nothing, and writes nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastood._version import __version__

_MODULES: dict[str, tuple[str, ...]] = {
    "fastood.scores": (
        "ClassBank",
        "Head",
        "Similarities",
        "Scores",
        "ScoreKey",
        "delta_energy",
        "energy",
        "fit_knn",
        "fit_mahalanobis",
        "gl_mcm",
        "knn",
        "l_mcm",
        "mahalanobis",
        "margin",
        "max_logit",
        "max_similarity",
        "mcm",
        "msp",
        "neg_entropy",
        "neg_label",
        "score",
        "variance",
    ),
    "fastood.tuning": (
        "ebm_loss",
        "locoop_loss",
    ),
    "fastood.calibration": (
        "Threshold",
        "calibrate",
    ),
    "fastood.models": (
        "Encoder",
        "list_models",
        "load_model",
    ),
    "fastood.data": (
        "load_features",
        "load_images",
    ),
    "fastood.features": (
        "FeatureCache",
        "encode_classes",
        "encode_images",
    ),
    "fastood.errors": ("FastoodError",),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

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
