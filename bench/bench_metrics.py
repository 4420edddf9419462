"""All metrics of one ID/OOD pair: AUROC, both AUPR, both FPR95.

    pytest bench/bench_metrics.py --benchmark-only

scikit-learn computes the same five numbers the way the field's scripts do; ``OODMetrics`` of
pytorch-ood has trapezoidal AUPRs and AUTC in place of one FPR95.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import peers
from bench.shapes import SCORES
from bench.suite import Goal, Work
from fastood.metrics import evaluate

NAMES = ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95-ID", "FPR95-OOD")
IMPLEMENTATIONS = ["scikit-learn", "pytorch-ood", "fastood"]


def metrics_of_scores() -> Work:
    n_id, n_ood = SCORES
    g = np.random.default_rng(0)
    pair = (
        g.normal(1.2e-3, 4e-5, n_id).astype(np.float32),
        g.normal(1.14e-3, 4e-5, n_ood).astype(np.float32),
    )

    calls = {"fastood": lambda: evaluate(*pair)}
    tolerance = {"": (0.0, 1e-12)}
    if peers.HAVE_SCIKIT_LEARN:
        calls["scikit-learn"] = lambda: peers.scikit_learn_metrics(*pair)
        tolerance["scikit-learn"] = (0.0, 5 / n_ood)  # among equal recalls it takes the lowest FPR
    if peers.HAVE_PYTORCH_OOD:
        calls["pytorch-ood"] = lambda: peers.pytorch_ood_metrics(*pair)
        tolerance["pytorch-ood"] = (0.0, 10 / n_ood)  # the trapezoid

    exact = by_definition(*pair)

    def result(found: dict[str, float]) -> tuple[Tensor, ...]:
        """What an implementation lacks (one FPR95 of pytorch-ood) is not held against it."""
        return tuple(
            torch.tensor(float(found.get(name, value)), dtype=torch.float64)
            for name, value in zip(NAMES, exact, strict=True)
        )

    return Work(
        name=f"metrics of {n_id} + {n_ood} scores",
        calls=calls,
        truth=lambda: exact,
        result=result,
        flops=0.0,
        moved=4.0 * (n_id + n_ood),
        tolerance=tolerance,
        goals={
            "fastood": (
                Goal("speedup", 10.0, against="scikit-learn"),
                Goal("speedup", 20.0, against="pytorch-ood"),
            )
        },
        precision="float32 in",
    )


def by_definition(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[Tensor, ...]:
    """The five numbers from their definitions: one threshold at each score, counted in full."""
    a, b = np.sort(id_scores), np.sort(ood_scores)
    n, m = len(a), len(b)
    below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
    auroc = below.sum() / (2 * n * m)

    def precision_recall(positive: np.ndarray, other: np.ndarray) -> float:
        """Σ (recall step) x precision; both sorted so that positives are higher."""
        thresholds = np.unique(positive)[::-1]
        hits = len(positive) - np.searchsorted(positive, thresholds, "left")
        false = len(other) - np.searchsorted(other, thresholds, "left")
        steps = np.diff(np.r_[0, hits]) / len(positive)
        return float((steps * hits / (hits + false)).sum())

    thresholds = np.unique(np.r_[a, b])[::-1]
    tpr = (n - np.searchsorted(a, thresholds, "left")) / n
    fpr = (m - np.searchsorted(b, thresholds, "left")) / m
    nearest = np.abs(tpr - 0.95)
    at = np.flatnonzero(nearest == nearest.min())[-1]  # the lowest threshold of equal recall
    lowest = np.unique(np.r_[a, b])
    caught = np.searchsorted(b, lowest, "right") / m
    lost = np.searchsorted(a, lowest, "right") / n
    numbers = (
        auroc,
        precision_recall(a, b),
        precision_recall(np.sort(-b), np.sort(-a)),
        fpr[at],
        lost[np.argmax(caught >= 0.95)],
    )
    return tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_all_metrics(run, impl):
    run(metrics_of_scores, impl)
