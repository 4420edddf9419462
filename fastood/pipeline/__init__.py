"""The whole way from image sets to metrics: a model, its classes, the scores asked, the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastood.lazy import lazy_names
from fastood.pipeline.core import Pipeline, ScoredSet
from fastood.pipeline.evaluation import Evaluation

if TYPE_CHECKING:
    from fastood.pipeline.finetune import FineTuned, fine_tune

__all__ = ["Evaluation", "FineTuned", "Pipeline", "ScoredSet", "fine_tune"]

# training needs much that scoring does not: imported when asked for
__getattr__ = lazy_names(__name__, {"finetune": ("FineTuned", "fine_tune")})
