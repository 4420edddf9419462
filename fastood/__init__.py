"""fastood: out-of-distribution detection for vision-language models, fast.

Public names are loaded on first use, so ``import fastood`` costs nothing: it imports neither torch
nor open_clip nor matplotlib, builds nothing, and writes nothing. Subpackages (``fastood.metrics``,
``fastood.detectors``, ...) load on first use too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastood._version import __version__

if TYPE_CHECKING:  # what type checkers and editors read; _MODULES says the same at run time
    from fastood.calibration import Threshold, calibrate
    from fastood.data import load_features, load_images
    from fastood.detectors import Detector
    from fastood.errors import FastoodError
    from fastood.features import FeatureCache, encode_classes, encode_images
    from fastood.models import Encoder, list_models, load_model
    from fastood.pipeline import Evaluation, FineTuned, Pipeline, fine_tune
    from fastood.scores import (
        ClassBank,
        Head,
        ScoreKey,
        Scores,
        Similarities,
        delta_energy,
        energy,
        fit_knn,
        fit_mahalanobis,
        gl_mcm,
        knn,
        l_mcm,
        mahalanobis,
        margin,
        max_logit,
        max_similarity,
        mcm,
        msp,
        neg_entropy,
        neg_label,
        row_statistics,
        score,
        variance,
    )
    from fastood.tuning import adapt, ebm_loss, load_method, locoop_loss

__all__ = [
    "ClassBank",
    "Detector",
    "Encoder",
    "Evaluation",
    "FastoodError",
    "FeatureCache",
    "FineTuned",
    "Head",
    "Pipeline",
    "ScoreKey",
    "Scores",
    "Similarities",
    "Threshold",
    "__version__",
    "adapt",
    "calibrate",
    "delta_energy",
    "ebm_loss",
    "encode_classes",
    "encode_images",
    "energy",
    "fine_tune",
    "fit_knn",
    "fit_mahalanobis",
    "gl_mcm",
    "knn",
    "l_mcm",
    "list_models",
    "load_features",
    "load_images",
    "load_method",
    "load_model",
    "locoop_loss",
    "mahalanobis",
    "margin",
    "max_logit",
    "max_similarity",
    "mcm",
    "msp",
    "neg_entropy",
    "neg_label",
    "row_statistics",
    "score",
    "variance",
]

_MODULES: dict[str, tuple[str, ...]] = {
    "fastood.calibration": ("Threshold", "calibrate"),
    "fastood.data": ("load_features", "load_images"),
    "fastood.detectors": ("Detector",),
    "fastood.errors": ("FastoodError",),
    "fastood.features": ("FeatureCache", "encode_classes", "encode_images"),
    "fastood.models": ("Encoder", "list_models", "load_model"),
    "fastood.pipeline": ("Evaluation", "FineTuned", "Pipeline", "fine_tune"),
    "fastood.scores": (
        "ClassBank",
        "Head",
        "ScoreKey",
        "Scores",
        "Similarities",
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
        "row_statistics",
        "score",
        "variance",
    ),
    "fastood.tuning": ("adapt", "ebm_loss", "load_method", "locoop_loss"),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = (
    "calibration",
    "data",
    "demo",
    "detectors",
    "features",
    "metrics",
    "models",
    "pipeline",
    "prompts",
    "reference",
    "report",
    "scores",
    "setar",
    "tuning",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fastood.{name}")
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
