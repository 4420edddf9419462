"""Metrics from scores: AUROC, AUPR, FPR in both readings, intervals, paired tests, accuracy.

Plain numpy on integer counts; a tensor is copied to the host. All results are fractions.
"""

from fastood.metrics.accuracy import Accuracy, accuracy
from fastood.metrics.evaluation import evaluate
from fastood.metrics.normal import wilson
from fastood.metrics.paired import Difference, compare
from fastood.metrics.ranks import aupr, auroc, autc, fpr, fpr95, roc
from fastood.metrics.result import Metrics, average

__all__ = [
    "Accuracy",
    "Difference",
    "Metrics",
    "accuracy",
    "aupr",
    "auroc",
    "autc",
    "average",
    "compare",
    "evaluate",
    "fpr",
    "fpr95",
    "roc",
    "wilson",
]
