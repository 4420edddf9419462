"""Scores as objects, for people who come from pytorch-ood or OpenOOD.

``Detector("mcm", encoder, text)`` and its named constructors have ``fit``, ``predict`` (higher =
OOD), ``confidence`` (higher = ID) and ``scores`` (with orientation and origin, for calibration).
pytorch-ood's metrics, benchmarks and grid search take them as they are;
``as_openood_postprocessor`` gives the view OpenOOD's evaluator wants. Neither is imported here.
"""

from fastood.detectors.detector import Detector, NotFittedError
from fastood.detectors.heads import LogitsHead
from fastood.detectors.named import (
    GLMCM,
    KNN,
    LMCM,
    MCM,
    MSP,
    DeltaEnergy,
    Energy,
    EnergyBased,
    Mahalanobis,
    MaxLogit,
    MaxSimilarity,
    NegEntropy,
    NegLabel,
)
from fastood.detectors.openood import OpenOODPostprocessor, as_openood_postprocessor

__all__ = [
    "GLMCM",
    "KNN",
    "LMCM",
    "MCM",
    "MSP",
    "DeltaEnergy",
    "Detector",
    "Energy",
    "EnergyBased",
    "LogitsHead",
    "Mahalanobis",
    "MaxLogit",
    "MaxSimilarity",
    "NegEntropy",
    "NegLabel",
    "NotFittedError",
    "OpenOODPostprocessor",
    "as_openood_postprocessor",
]
