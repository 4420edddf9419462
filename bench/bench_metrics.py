"""All metrics of one ID/OOD pair (AUROC, both AUPR, both FPR95) against scikit-learn.

    pytest bench/bench_metrics.py --benchmark-only

Sizes are those of ImageNet-1k against one far-OOD set: 50,000 and 10,000 scores. The peer computes
the same five numbers the way the field's evaluation scripts do.
"""

from __future__ import annotations

import numpy as np
import pytest

from bench.conftest import SMOKE
from fastood.metrics import evaluate

N_ID, N_OOD = (500, 100) if SMOKE else (50_000, 10_000)


def scores() -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    id_scores = g.normal(1.2e-3, 4e-5, N_ID).astype(np.float32)
    return id_scores, g.normal(1.14e-3, 4e-5, N_OOD).astype(np.float32)


def with_scikit_learn(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    metrics = pytest.importorskip("sklearn.metrics")
    y = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]
    s = np.r_[id_scores, ood_scores]
    fpr, tpr, _ = metrics.roc_curve(y, s, drop_intermediate=False)
    fpr_ood, tpr_ood, _ = metrics.roc_curve(1 - y, -s, drop_intermediate=False)
    return {
        "AUROC": metrics.roc_auc_score(y, s),
        "AUPR-IN": metrics.average_precision_score(y, s),
        "AUPR-OUT": metrics.average_precision_score(1 - y, -s),
        "FPR95-ID": fpr[np.argmin(np.abs(tpr - 0.95))],
        "FPR95-OOD": fpr_ood[np.argmax(tpr_ood >= 0.95)],
    }


IMPLEMENTATIONS = {"fastood": evaluate, "scikit-learn": with_scikit_learn}


@pytest.mark.benchmark(group=f"metrics {N_ID} x {N_OOD}")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_all_metrics(benchmark, impl):
    pair = scores()
    ours, peer = evaluate(*pair), with_scikit_learn(*pair)
    for name, value in peer.items():
        # the two FPR rules may take neighbouring thresholds
        assert ours[name] == pytest.approx(value, abs=1e-12 if "FPR" not in name else 2 / N_OOD)
    benchmark.extra_info["scores"] = N_ID + N_OOD
    benchmark(IMPLEMENTATIONS[impl], *pair)
