"""Thresholds from held-out ID scores: with a guarantee, with intervals, saved with provenance."""

from fastood.calibration.fitting import calibrate, conformal_rank
from fastood.calibration.threshold import Threshold

__all__ = ["Threshold", "calibrate", "conformal_rank"]
