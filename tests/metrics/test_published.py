"""The published MCM and GL-MCM tables from the authors' per-image scores (ImageNet, CLIP B/16)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastood.metrics import average, evaluate, fpr95

pytestmark = pytest.mark.data

SETS = ("iNaturalist", "Sun", "Places", "Texture")
# FPR95 with OOD positive at the first recall of at least .95, in percent.
OOD_POSITIVE = {
    "mcm": (21.37, 30.68, 44.32, 52.49, 37.22),
    "gl_mcm": (16.57, 33.87, 50.32, 64.05, 41.20),
}
AUPR_OUT = {"mcm": 65.41, "gl_mcm": 71.45}
# Where the at-least rule on ID recall would miss the printed table.
AT_LEAST = {("mcm", "Places"): 43.72, ("gl_mcm", "Texture"): 57.39}


@pytest.fixture(scope="module")
def dump(data_root):
    with np.load(data_root / "scores" / "clip_base_imagenet1k_vanilla.npz") as found:
        return dict(found)


@pytest.mark.parametrize("method", ["mcm", "gl_mcm"])
def test_table_to_two_decimals(dump, data_root, method):
    # The dump is negated: higher means OOD.
    id_scores = dump[f"{method}_ID_ImageNet1K"]
    results = [
        evaluate(id_scores, dump[f"{method}_OOD_{name}"], higher="ood", tpr=0.95) for name in SETS
    ]
    results.append(average(results))
    for found, printed in zip(results, dump[f"{method}_published_values"], strict=True):
        percent = [round(100 * found[key], 2) for key in ("FPR95-ID", "AUROC", "AUPR-IN")]
        assert percent == pytest.approx(list(printed), abs=1e-9)
    got = [round(100 * found["FPR95-OOD"], 2) for found in results]
    assert got == pytest.approx(OOD_POSITIVE[method], abs=1e-9)
    assert round(100 * results[-1]["AUPR-OUT"], 2) == AUPR_OUT[method]

    reference = json.loads((data_root / "reference.json").read_text())
    columns = reference["scores_clip_base_imagenet1k"][method]
    for name, found in zip(SETS, results, strict=False):
        row = columns[f"OOD_{name}"]["recomputed"]
        assert found["AUROC"] == pytest.approx(row["auroc"], rel=1e-12)
        assert found["AUPR-IN"] == pytest.approx(row["aupr_id"], rel=1e-12)
        assert found["FPR95-ID"] == pytest.approx(row["fpr95_id_positive"], rel=1e-12)


@pytest.mark.parametrize("method", ["mcm", "gl_mcm"])
@pytest.mark.parametrize("name", SETS)
def test_other_rules(dump, data_root, method, name):
    a, b = dump[f"{method}_ID_ImageNet1K"], dump[f"{method}_OOD_{name}"]
    reference = json.loads((data_root / "reference.json").read_text())
    row = reference["scores_clip_base_imagenet1k"][method][f"OOD_{name}"]["recomputed"]
    nearest = fpr95(a, b, positive="ood", rule="nearest", higher="ood")
    assert nearest == pytest.approx(row["fpr95_ood_positive_nearest"], rel=1e-12)
    at_least = fpr95(a, b, positive="id", rule="at_least", higher="ood")
    printed = round(100 * fpr95(a, b, positive="id", higher="ood"), 2)
    assert round(100 * at_least, 2) == AT_LEAST.get((method, name), printed)


def test_gl_mcm_gains_in_one_reading_and_loses_in_the_other(dump):
    found = {
        method: average(
            evaluate(dump[f"{method}_ID_ImageNet1K"], dump[f"{method}_OOD_{name}"], higher="ood")
            for name in SETS
        )
        for method in ("mcm", "gl_mcm")
    }
    assert found["gl_mcm"]["FPR95-ID"] < found["mcm"]["FPR95-ID"]
    assert found["gl_mcm"]["FPR95-OOD"] > found["mcm"]["FPR95-OOD"]


def test_half_precision_collapses_these_scores(dump):
    a = -dump["mcm_ID_ImageNet1K"].astype(np.float16)
    with pytest.warns(UserWarning, match="distinct values among 60000 scores"):
        found = evaluate(a, -dump["mcm_OOD_Places"].astype(np.float16))
    assert abs(found["FPR95-ID"] - 0.4373) > 1e-4
