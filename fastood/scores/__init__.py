"""Features to one number per image; higher = more in-distribution, everywhere.

``row`` (global), ``local`` (patches), ``grouped`` (negative labels), ``fitted`` (training
features), ``many`` (all at once), ``bank`` (prepared classes), ``registry`` (by name), ``result``
(scores that know their orientation), ``statistics`` (what global scores are computed from). The
arithmetic is in ``fastood.reference``.
"""

from fastood.scores.bank import ClassBank, Head, Similarities
from fastood.scores.fitted import (
    GaussianBank,
    NeighbourBank,
    fit_knn,
    fit_mahalanobis,
    knn,
    mahalanobis,
)
from fastood.scores.grouped import neg_label
from fastood.scores.local import gl_mcm, l_mcm
from fastood.scores.many import score
from fastood.scores.registry import SCORES, ScoreSpec
from fastood.scores.result import ScoreKey, Scores
from fastood.scores.row import (
    delta_energy,
    energy,
    margin,
    max_logit,
    max_similarity,
    mcm,
    msp,
    neg_entropy,
    variance,
)
from fastood.scores.statistics import RowStatistics, row_statistics

__all__ = [
    "SCORES",
    "ClassBank",
    "GaussianBank",
    "Head",
    "NeighbourBank",
    "RowStatistics",
    "ScoreKey",
    "ScoreSpec",
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
]
