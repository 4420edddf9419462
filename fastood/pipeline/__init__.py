"""The whole way from image sets to metrics: a model, its classes, the scores asked, the results."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastood.pipeline.core import Pipeline, ScoredSet
from fastood.pipeline.evaluation import Evaluation

if TYPE_CHECKING:
    from fastood.pipeline.finetune import FineTuned, fine_tune

__all__ = ["Evaluation", "FineTuned", "Pipeline", "ScoredSet", "fine_tune"]


def __getattr__(name: str) -> Any:
    # training needs much that scoring does not: imported when asked for
    if name not in ("FineTuned", "fine_tune"):
        raise AttributeError(f"module 'fastood.pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module("fastood.pipeline.finetune"), name)
    globals()[name] = value
    return value
