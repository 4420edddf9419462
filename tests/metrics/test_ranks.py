"""AUROC, AUPR, FPR, AUTC and ROC against slow transcriptions and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastood.metrics import aupr, auroc, autc, evaluate, fpr, fpr95, roc
from tests.metrics.slow import slow_aupr, slow_auroc, slow_fpr

# Sums of n rounded terms in another order than the fractions of the slow version.
SUM = {"rel": 1e-12, "abs": 1e-15}

# Few values make many ties; the wide ones reach both ends of the float range.
TIED = st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=25)
WIDE = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=25)
LEVELS = st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.975, 1.0])

pytestmark = [
    pytest.mark.filterwarnings("ignore:all .* scores are equal"),
    pytest.mark.filterwarnings("ignore:only .* distinct values"),
]


def check_everything(a: list[float], b: list[float], tpr: float) -> None:
    minus_a, minus_b = [-x for x in a], [-x for x in b]
    assert auroc(a, b) == slow_auroc(a, b)
    for rule in ("ap", "trapezoid"):
        assert aupr(a, b, positive="id", rule=rule) == pytest.approx(slow_aupr(a, b, rule), **SUM)
        assert aupr(a, b, positive="ood", rule=rule) == pytest.approx(
            slow_aupr(minus_b, minus_a, rule), **SUM
        )
    for rule in ("nearest", "at_least"):
        assert fpr(a, b, positive="id", rule=rule, tpr=tpr) == slow_fpr(a, b, rule, tpr)
        assert fpr(a, b, positive="ood", rule=rule, tpr=tpr) == slow_fpr(
            minus_b, minus_a, rule, tpr
        )


@settings(max_examples=150, deadline=None)
@given(TIED, TIED, LEVELS)
def test_rules_with_many_ties(a, b, tpr):
    check_everything(a, b, tpr)


@settings(max_examples=100, deadline=None)
@given(WIDE, WIDE, LEVELS)
def test_rules_over_the_whole_float_range(a, b, tpr):
    check_everything(a, b, tpr)


@pytest.mark.parametrize("n", range(1, 131))
def test_nearest_recall_for_every_small_n(n):
    """Exact ties of the distance (n = 10, 30, ...) are broken by float64 rounding."""
    rng = np.random.default_rng(n)
    a, b = rng.integers(0, 200, n).tolist(), rng.integers(-60, 150, 40).tolist()
    for tpr in (0.95, 0.9):
        assert fpr(a, b, positive="id", tpr=tpr) == slow_fpr(a, b, "nearest", tpr)
        assert fpr(b, a, positive="ood", rule="nearest", tpr=tpr) == slow_fpr(
            [-x for x in a], [-x for x in b], "nearest", tpr
        )


@pytest.mark.parametrize(("n", "tp"), [(30, 28), (50, 48), (70, 66), (90, 85), (110, 104)])
def test_which_of_two_equally_near_recalls(n, tp):
    """Both neighbours of .95 n are half an image away. Floats decide: at 30, 70, 90 and 110 for
    the smaller recall, against the rule of thumb that the lower threshold wins."""
    id_scores = [float(i) for i in range(n)]
    # One OOD score just above each ID score, so FPR tells the threshold apart.
    ood_scores = [i + 0.5 for i in range(n)]
    accepted = tp + 1  # the loosest threshold with that recall is an OOD score below the next ID
    assert fpr95(id_scores, ood_scores, positive="id") == accepted / n
    assert fpr95(id_scores, ood_scores, positive="id") == slow_fpr(
        id_scores, ood_scores, "nearest", 0.95
    )


def test_full_recall_starts_at_its_strictest_threshold():
    # With one ID image only full recall is near; the OOD scores below it are never accepted.
    assert fpr95([1.0], [0.0, -1.0, 2.0], positive="id") == 1 / 3
    # Recall 0 is a candidate only where an OOD score lies above all ID scores.
    assert fpr([1.0], [0.0, 1.0], positive="id", tpr=0.3) == 0.5
    assert fpr([1.0], [0.0, 2.0, 3.0], positive="id", tpr=0.3) == 2 / 3
    assert slow_fpr([1.0], [0.0, 2.0, 3.0], "nearest", 0.3) == 2 / 3


@pytest.mark.parametrize("decimals", [1, 3, 9])
def test_against_scikit_learn(decimals):
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(decimals)
    a, b = rng.normal(1, 1, 3000).round(decimals), rng.normal(0, 1, 700).round(decimals)
    scores, is_id = np.r_[a, b], np.r_[np.ones(3000), np.zeros(700)]
    assert auroc(a, b) == pytest.approx(sk.roc_auc_score(is_id, scores), **SUM)
    for side, truth, sign in (("id", is_id, 1), ("ood", 1 - is_id, -1)):
        assert aupr(a, b, positive=side) == pytest.approx(
            sk.average_precision_score(truth, sign * scores), **SUM
        )
        precision, recall, _ = sk.precision_recall_curve(truth, sign * scores)
        assert aupr(a, b, positive=side, rule="trapezoid") == pytest.approx(
            sk.auc(recall, precision), **SUM
        )
        wrong, right, _ = sk.roc_curve(truth, sign * scores, drop_intermediate=False)
        assert fpr(a, b, positive=side, rule="at_least") == wrong[np.argmax(right >= 0.95)]


@pytest.mark.parametrize("decimals", [1, 3, 9])
def test_against_pytorch_ood(decimals):
    peer = pytest.importorskip("pytorch_ood.metrics.functional")
    rng = np.random.default_rng(decimals)
    a, b = rng.normal(1, 1, 900).round(decimals), rng.normal(0, 1, 400).round(decimals)
    outlier = torch.from_numpy(-np.r_[a, b])
    labels = torch.cat([torch.zeros(900), -torch.ones(400)])
    found = evaluate(a, b, aupr="trapezoid", autc=True)
    assert found["AUROC"] == pytest.approx(float(peer.auroc(outlier, labels)), **SUM)
    assert found["FPR95TPR"] == float(peer.fpr_at_tpr(outlier, labels))
    assert found["AUPR-IN"] == pytest.approx(float(peer.aupr(outlier, labels, "id")), **SUM)
    assert found["AUPR-OUT"] == pytest.approx(float(peer.aupr(outlier, labels, "ood")), **SUM)
    assert found["AUTC"] == pytest.approx(float(peer.autc(outlier, labels)), **SUM)


def test_rank_metrics_ignore_monotone_transforms_and_order():
    rng = np.random.default_rng(4)
    a, b = rng.normal(1, 1, 400).round(2), rng.normal(0, 1, 300).round(2)
    want = evaluate(a, b)
    for transform in (lambda x: 1e300 * x, lambda x: 1e-300 * x, np.exp, lambda x: 3 * x - 7):
        assert evaluate(transform(a), transform(b)) == want
    assert evaluate(rng.permutation(a), rng.permutation(b)) == want


def test_exchanging_the_classes_and_negating_swaps_in_and_out():
    rng = np.random.default_rng(5)
    a, b = rng.normal(1, 1, 400).round(1), rng.normal(0, 1, 300).round(1)
    one, other = evaluate(a, b), evaluate(-b, -a)
    assert one["AUROC"] == other["AUROC"]
    assert one["AUPR-IN"] == pytest.approx(other["AUPR-OUT"], **SUM)
    assert one["AUPR-OUT"] == pytest.approx(other["AUPR-IN"], **SUM)
    for rule in ("nearest", "at_least"):
        assert fpr95(a, b, positive="id", rule=rule) == fpr95(-b, -a, positive="ood", rule=rule)
    # Exchanging without negating turns the ranking round.
    assert evaluate(b, a)["AUROC"] == pytest.approx(1 - one["AUROC"], **SUM)


def test_autc_by_hand_and_at_the_ends():
    assert autc([1.0, 0.5], [0.0, 0.5]) == 0.25
    assert autc([1.7e308], [-1.7e308]) == 0.0  # the range itself would overflow
    assert autc([5e-324], [0.0]) == 0.0  # halving the range would lose it
    assert math.isnan(autc([1.0, 1.0], [1.0]))


@pytest.mark.parametrize("positive", ["id", "ood"])
@pytest.mark.parametrize("decimals", [1, 6])
def test_roc_keeps_every_corner_and_the_area(positive, decimals):
    rng = np.random.default_rng(6)
    a, b = rng.normal(1, 1, 300).round(decimals), rng.normal(0, 1, 200).round(decimals)
    x, y = roc(a, b, positive=positive)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
    area = (np.diff(x) * (y[1:] + y[:-1])).sum() / 2
    assert area == pytest.approx(auroc(a, b), **SUM)
    # Thinning leaves the same polygon: every full-resolution point lies on it.
    positives, negatives = (a, b) if positive == "id" else (-b, -a)
    thresholds = np.unique(np.r_[a, b] if positive == "id" else -np.r_[a, b])[::-1]
    full_y = (positives[None] >= thresholds[:, None]).mean(1)
    full_x = (negatives[None] >= thresholds[:, None]).mean(1)
    on_step = np.isin(full_x, x)
    assert on_step.any()
    between = np.interp(full_x[~on_step], x, y)
    np.testing.assert_allclose(full_y[~on_step], between, rtol=0, atol=1e-12)
    assert len(x) < len(thresholds)


def test_perfect_and_constant_scores():
    found = evaluate([2.0, 3.0], [0.0, 1.0])
    assert found == {"AUROC": 1, "AUPR-IN": 1, "AUPR-OUT": 1, "FPR95-ID": 0, "FPR95-OOD": 0}
    assert fpr95([2.0] * 30, [0.0], positive="id") == 0
    with pytest.warns(UserWarning, match="all 5 scores are equal") as caught:
        found = evaluate([7.0] * 3, [7.0] * 2)
    assert len(caught) == 1
    assert (found["AUROC"], found["FPR95-ID"], found["FPR95-OOD"]) == (0.5, 1.0, 1.0)
    assert found["AUPR-IN"] == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": "in"}, "positive: expected 'id' or 'ood', got 'in'"),
        ({"positive": "id", "rule": "first"}, "rule: expected"),
        ({"positive": "id", "tpr": 95}, "in percent"),
        ({"positive": "id", "tpr": 0.0}, "tpr: expected a fraction"),
        ({"positive": "id", "tpr": math.nan}, "tpr: expected a fraction"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        fpr([1.0], [0.0], **options)
