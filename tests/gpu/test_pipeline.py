"""From pictures to scores and a threshold on a GPU: the numbers of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastood
from fastood.demo import ID_CLASSES, photo_folder
from tests.tolerances import PRETENDED_GPU_ATOL, REAL_GPU_ATOL

METHODS = (
    "max_similarity", "mcm", "msp", "energy", "delta_energy", "max_logit", "neg_entropy",
    "variance", "margin", "l_mcm", "gl_mcm",
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    named = (("id", "clothes"), ("far-omniglot", "letters"), ("calibration", "held out"))
    return [fastood.load_images(photo_folder(f), name=n) for f, n in named]


def run(device, images):
    model = fastood.load_model("fastood-tiny", device=device)
    pipeline = fastood.Pipeline(model, ID_CLASSES, methods=METHODS, cache=None)
    known, other, held_out = images
    found = pipeline.evaluate(known, [other])
    threshold = pipeline.calibrate(held_out, score="energy")
    return model, found, pipeline.score(other).scores, threshold


def test_the_whole_pipeline(gpu, images):
    ours, want, scores, threshold = run("cpu", images)
    with gpu as device, torch.no_grad():
        theirs, found, theirs_scores, theirs_threshold = run(device, images)
        assert theirs.fingerprint == ours.fingerprint
    assert set(theirs_scores) == set(METHODS)
    atol = REAL_GPU_ATOL if torch.cuda.is_available() else PRETENDED_GPU_ATOL
    for name in METHODS:
        np.testing.assert_allclose(
            theirs_scores[name].values, scores[name].values, rtol=0, atol=atol
        )
        for metric in ("AUROC", "FPR95-ID"):
            assert found.metric("letters", name, metric) == pytest.approx(
                want.metric("letters", name, metric), abs=0.02
            )
    assert theirs_threshold.threshold == pytest.approx(threshold.threshold, abs=atol)
