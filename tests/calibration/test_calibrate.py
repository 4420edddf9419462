"""Ranks, the acceptance guarantee, intervals, warnings."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastood.calibration import calibrate, conformal_rank
from fastood.scores.result import ScoreKey, Scores


def test_ranks_are_exact():
    assert conformal_rank(99, 0.9) == 10
    assert conformal_rank(19, 0.95) == 1 and conformal_rank(18, 0.95) == 0
    for n in range(1, 5000):
        assert conformal_rank(n, 0.9) == (n + 1) // 10
        assert conformal_rank(n, 0.95) == (n + 1) // 20
    wrong = sum(math.floor((1 - 0.9) * (n + 1)) != (n + 1) // 10 for n in range(1, 5000))
    assert wrong > 100  # what the fractions are for


@pytest.mark.parametrize(
    "tpr", [0.9, "0.9", Decimal("0.9"), Fraction(9, 10), np.float32(0.9), np.float64(0.9)]
)
def test_ways_to_write_tpr(tpr):
    assert calibrate(np.arange(99.0), tpr=tpr).threshold == 9.0


@pytest.mark.parametrize("tpr", [0, 1, 1.5, 95, -0.1, math.nan, math.inf, "x", None, True])
def test_wrong_tpr(tpr):
    with pytest.raises(ValueError, match="tpr: expected a fraction"):
        calibrate([1.0, 2.0], tpr=tpr)


@pytest.mark.parametrize("n", [19, 20, 38, 39, 99, 1000])
@pytest.mark.parametrize("higher", ["id", "ood"])
def test_threshold_is_the_kth_worst_score(n, higher):
    scores = np.random.default_rng(n).normal(size=n)
    found = calibrate(scores, higher=higher)
    k = (n + 1) // 20
    worst_first = np.sort(scores) if higher == "id" else -np.sort(-scores)
    assert found.threshold == worst_first[k - 1]
    assert found.is_ood(scores).sum() == k - 1  # the threshold itself is accepted
    assert found.expected_acceptance == pytest.approx(1 - k / (n + 1), rel=1e-15)
    assert found.expected_acceptance >= 0.95
    assert (found.n, found.higher, found.rule, found.tpr) == (n, higher, "conformal", 0.95)


def test_orientation_mirrors():
    scores = np.random.default_rng(0).normal(size=200)
    up, down = calibrate(scores), calibrate(-scores, higher="ood")
    assert down.threshold == -up.threshold
    assert down.interval == (-up.interval[1], -up.interval[0])
    assert down.acceptance == up.acceptance
    new = np.random.default_rng(1).normal(size=300)
    np.testing.assert_array_equal(up.is_ood(new), down.is_ood(-new))


@pytest.mark.parametrize(("tpr", "needed"), [(0.95, 19), (0.9, 9), (0.99, 99), (0.97, 33)])
def test_too_few_scores_reject_nothing_and_say_how_many_are_needed(tpr, needed):
    with pytest.warns(UserWarning, match=f"give at least {needed} scores") as caught:
        found = calibrate(np.arange(needed - 1.0), tpr=tpr)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert found.threshold == -math.inf and found.acceptance == (1, 1)
    assert found.expected_acceptance == 1
    assert not found.is_ood([-1e308]).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(np.arange(float(needed)), tpr=tpr).threshold == 0
    with pytest.warns(UserWarning):
        assert calibrate([1.0], higher="ood").threshold == math.inf


def test_new_images_are_accepted_as_often_as_promised():
    """Mean acceptance over calibrations, and how often the acceptance interval holds."""
    rng, accepted, inside, enclosed = np.random.default_rng(2), [], 0, 0
    truth = -math.sqrt(2) * 1.163087153676674  # 5 % quantile of N(0, 1)
    for _ in range(1000):
        found = calibrate(rng.normal(size=120))
        share = 0.5 * math.erfc(found.threshold / math.sqrt(2))
        accepted.append(share)
        inside += found.acceptance[0] <= share <= found.acceptance[1]
        enclosed += found.interval[0] <= truth <= found.interval[1]
    error = np.std(accepted) / math.sqrt(1000)
    assert abs(np.mean(accepted) - found.expected_acceptance) < 4 * error
    assert abs(inside / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)
    assert enclosed / 1000 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1000)  # conservative by design


def test_percentile_is_numpys():
    for n in (1, 2, 7, 20, 21, 333):
        scores = np.random.default_rng(n).normal(size=n)
        found = calibrate(scores, rule="percentile")
        assert found.threshold == pytest.approx(np.quantile(scores, 0.05), rel=1e-12)
        assert found.acceptance[0] <= found.expected_acceptance <= found.acceptance[1]
        assert found.rule == "percentile"
    # On a rank exactly: 21 scores put the 5 % point on the second smallest.
    assert calibrate(np.arange(21.0), rule="percentile").threshold == 1.0


@pytest.mark.parametrize("convert", [list, np.float32, torch.tensor, lambda x: Scores(np.array(x))])
def test_what_may_hold_scores(convert):
    scores = [i / 64 for i in range(40)]
    assert calibrate(convert(scores)).threshold == calibrate(scores).threshold == 1 / 64
    decided = calibrate(scores).is_ood(convert(scores))
    assert isinstance(decided, np.ndarray) and decided.dtype == bool
    assert decided.tolist() == [True] + [False] * 39


def test_provenance():
    key = ScoreKey("mcm", {"tau": np.float64(1.0), "grid": (1, 2)}, "m1", "p1")
    scores = Scores(np.arange(40.0), key=key, name="val")
    found = calibrate(scores)
    assert (found.score, found.model, found.prompts, found.source) == ("mcm", "m1", "p1", "val")
    assert found.options == {"tau": 1.0, "grid": [1, 2]}
    assert found.key == ScoreKey("mcm", {"tau": 1.0, "grid": [1, 2]}, "m1", "p1")
    assert found.created.endswith("+00:00") and found.version
    assert "mcm(tau=1.0, grid=[1, 2]) < 1" in found.describe() and "of val" in found.describe()
    bare = calibrate(np.arange(40.0), key=key, source="mine")
    assert (bare.score, bare.source) == ("mcm", "mine")
    with pytest.raises(ValueError, match="key: contradicts id_scores: score 'mcm' against 'msp'"):
        calibrate(scores, key=ScoreKey("msp"))
    with pytest.raises(ValueError, match="higher means id in these scores"):
        calibrate(scores, higher="ood")
    with pytest.raises(TypeError, match="got ndarray for bank"):
        calibrate(np.arange(40.0), key=ScoreKey("knn", {"bank": np.zeros(3)}))


def test_bad_input():
    with pytest.raises(ValueError, match="id_scores: expected at least one score"):
        calibrate([])
    with pytest.raises(ValueError, match="NaN or infinite, at rows 1"):
        calibrate([0.0, math.nan])
    with pytest.raises(TypeError, match="booleans"):
        calibrate([True, False])
    with pytest.raises(ValueError, match="rule: expected one of conformal, percentile"):
        calibrate([1.0], rule="mean")
    with pytest.raises(ValueError, match=r"confidence: .* in percent"):
        calibrate([1.0], confidence=95)
    with pytest.warns(UserWarning, match="all 50 ID scores are equal") as caught:
        assert not calibrate([1.0] * 50).is_ood([1.0]).any()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="only 10 distinct values"):
        calibrate([float(i % 10) for i in range(500)])
