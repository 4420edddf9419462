"""The whole way from image sets to metrics: a model, its classes, the scores asked, the results."""

from fastood.pipeline.core import Pipeline, ScoredSet
from fastood.pipeline.evaluation import Evaluation

__all__ = ["Evaluation", "Pipeline", "ScoredSet"]
