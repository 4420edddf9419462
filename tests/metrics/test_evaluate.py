"""The mapping, what goes in, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from fastood.metrics import Metrics, accuracy, average, evaluate, fpr, wilson
from fastood.scores.result import ScoreKey, Scores

A, B = [0.9, 0.8, 0.7, 0.4], [0.5, 0.3, 0.2]


def test_keys_follow_tpr():
    assert list(evaluate(A, B)) == ["AUROC", "AUPR-IN", "AUPR-OUT", "FPR95-ID", "FPR95-OOD"]
    for tpr, number in ((0.9, "90"), (0.975, "97.5"), (1.0, "100"), (0.1, "10"), (0.999, "99.9")):
        found = evaluate(A, B, tpr=tpr)
        assert found[f"FPR{number}-ID"] == fpr(A, B, positive="id", tpr=tpr)
        assert found[f"FPR{number}-OOD"] == fpr(A, B, positive="ood", tpr=tpr)
        assert found[f"FPR{number}TPR"] == found[f"FPR{number}-OOD"] == found[f"FPR@{number}"]
        assert found.tpr == tpr
    assert "AUTC" in evaluate(A, B, autc=True)


def test_names_of_other_toolkits():
    found = evaluate(A, B)
    for alias, name in {
        "FPR95TPR": "FPR95-OOD",
        "FPR@95": "FPR95-OOD",
        "AUPR_IN": "AUPR-IN",
        "AUPR_OUT": "AUPR-OUT",
    }.items():
        assert found[alias] == found[name] == found.get(alias)
        assert alias in found
    # Another recall is another metric, not an alias of this one.
    assert "FPR@90" not in found and found.get("FPR90TPR") is None and 3 not in found
    with pytest.raises(KeyError, match="no metric 'FPR'; here are AUROC, AUPR-IN"):
        found["FPR"]


def test_is_a_plain_dict_to_others():
    found = evaluate(A, B, intervals=True, resamples=100)
    assert json.loads(json.dumps(found)) == dict(found)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == found and twin.intervals == found.intervals and twin.n_id == 4
        assert twin["FPR@95"] == found["FPR95-OOD"]
    written = found.as_dict()
    assert written["n_ood"] == 3 and set(written["intervals"]) == set(found)
    assert Metrics({"AUTC": math.nan}).as_dict()["AUTC"] is None


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.asarray,
        lambda x: np.asarray(x, np.float32),
        lambda x: np.asarray(x).astype(np.longdouble),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True),
        lambda x: Scores(np.asarray(x)),
        lambda x: np.asarray(x)[::-1],
    ],
)
def test_what_may_hold_scores(convert):
    assert evaluate(convert(A), convert(B)) == evaluate(A, B)
    assert evaluate(convert(A), B)["AUROC"] == evaluate(A, B)["AUROC"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_float_type(dtype):
    # Sixteenths below one are exact in every float type.
    a, b = torch.tensor([14, 13, 11, 6]) / 16, torch.tensor([8, 5, 3]) / 16
    assert evaluate(a.to(dtype), b.to(dtype)) == evaluate(a.tolist(), b.tolist())


@pytest.mark.gpu
def test_tensors_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a, b = torch.tensor(A, device="cuda"), torch.tensor(B, device="cuda")
    assert evaluate(a.bfloat16(), b.bfloat16())["AUROC"] == evaluate(A, B)["AUROC"]


def test_mixed_precision_compares_the_numbers_themselves():
    third = 1 / 3  # float32 rounds it up: the wide comparison sees a win, a narrow one a tie
    assert float(np.float32(third)) > third
    assert evaluate(np.array([third], np.float32), np.array([third]))["AUROC"] == 1.0


def test_integers_are_ranked_exactly():
    assert evaluate([3, 2], [1, 0])["AUROC"] == 1.0
    a, b = np.array([3, 2], np.uint8), np.array([1, 0], np.uint8)
    assert evaluate(a, b, higher="ood")["AUROC"] == 0.0
    for bad in (np.array([1, 2**53 + 1]), np.array([1, -(2**60)])):
        with pytest.raises(ValueError, match="beyond float64 precision at rows 1"):
            evaluate(bad, [0.0])
    if np.finfo(np.longdouble).nmant > 52:
        with pytest.raises(ValueError, match="beyond float64 precision at rows 0"):
            evaluate(np.array([1, 2], np.longdouble) / 3, [0.0])


def test_orientation():
    up = evaluate(A, B)
    down_a, down_b = [-x for x in A], [-x for x in B]
    assert evaluate(down_a, down_b, higher="ood") == up
    ood_a, ood_b = Scores(np.array(down_a), "ood"), Scores(np.array(down_b), "ood")
    assert evaluate(ood_a, ood_b) == up
    assert evaluate(ood_a, ood_b, higher="ood") == up
    assert evaluate(ood_a, down_b, higher="ood") == up
    with pytest.raises(ValueError, match="higher means ood in these scores"):
        evaluate(ood_a, ood_b, higher="id")
    with pytest.raises(ValueError, match="disagree on what a higher score means"):
        evaluate(Scores(np.array(A)), ood_b)
    with pytest.raises(ValueError, match="disagree"):
        evaluate(A, ood_b)
    with pytest.raises(ValueError, match='higher: expected "id" or "ood"'):
        evaluate(A, B, higher="up")


def test_scores_of_different_origin_are_refused():
    def scores(values, **changes):
        parts = {"score": "mcm", "options": {"tau": 1.0}, "model": "m1", "prompts": "p1"}
        return Scores(np.array(values), key=ScoreKey(**{**parts, **changes}))

    assert evaluate(scores(A), scores(B)) == evaluate(A, B)
    assert evaluate(scores(A), scores(B, model=None)) == evaluate(A, B)
    for changes, words in (
        ({"score": "energy"}, "score 'mcm' against 'energy'"),
        ({"options": {"tau": 0.01}}, "option tau 1.0 against 0.01"),
        ({"options": {"tau": 1.0, "c": 2}}, "option c 'unset' against 2"),
        ({"model": "m2"}, "model 'm1' against 'm2'"),
        ({"prompts": "p2"}, "prompts 'p1' against 'p2'"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(scores(A), scores(B, **changes))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "ood_scores: expected at least one score, got none"),
        ([0.1, math.nan], ValueError, "1 of 2 scores are NaN or infinite, at rows 1;"),
        ([math.inf] * 9, ValueError, r"9 of 9 .* at rows 0, 1, 2, 3, 4, \.\.\.;"),
        ([[0.1, 0.2]], ValueError, r"shape \(n,\), got \(1, 2\); are these logits"),
        (0.5, ValueError, r"got \(\)"),
        ([True, False], TypeError, "got booleans; are these decisions"),
        (["a"], TypeError, "expected real numbers, got dtype <U1"),
        ([1j], TypeError, "expected real numbers"),
        ([None], TypeError, "expected real numbers, got dtype object"),
    ],
)
def test_bad_scores(bad, error, message):
    with pytest.raises(error, match=message):
        evaluate(A, bad)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tpr": 95}, ValueError),
        ({"tpr": "high"}, ValueError),
        ({"tpr": None}, ValueError),
        ({"tpr": True}, ValueError),
        ({"aupr": "step"}, ValueError),
        ({"intervals": "all"}, ValueError),
        ({"confidence": 95}, ValueError),
        ({"resamples": 10}, ValueError),
        ({"resamples": 1e3}, TypeError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        evaluate(A, B, **options)


def test_collapsed_scores_warn_once_with_the_remedy():
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.normal(0.30, 0.01, 2000))
    b = torch.from_numpy(rng.normal(0.28, 0.01, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = evaluate(a.float(), b.float())
    with pytest.warns(UserWarning, match="half precision, compute and store") as caught:
        half = evaluate(a.bfloat16(), b.bfloat16())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert half["AUROC"] != full["AUROC"]


def test_average_is_unweighted():
    first, second = evaluate(A, B), evaluate(A, [0.95, 0.1])
    mean = average([first, second])
    for key in first:
        assert mean[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-15)
    assert (mean.n_id, mean.n_ood, mean.intervals) == (4, 5, {})
    with pytest.raises(ValueError, match="at least one"):
        average([])
    for other in (evaluate(A, B, tpr=0.9), evaluate(A, B, aupr="trapezoid")):
        with pytest.raises(ValueError, match="same metrics with the same options"):
            average([first, other])


def test_accuracy():
    found = accuracy(torch.tensor([0, 1, 2, 2]), [0, 1, 1, 2])
    assert (found.value, found.n) == (0.75, 4)
    assert found.as_dict() == {"value": 0.75, "n": 4, "interval": list(found.interval)}
    assert accuracy(["cat", "dog"], ["cat", "cat"]).value == 0.5
    with pytest.raises(ValueError, match="expected 2 to match predicted, got 1"):
        accuracy([0, 1], [0])
    with pytest.raises(ValueError, match="got none"):
        accuracy([], [])
    with pytest.raises(ValueError, match="one class per image"):
        accuracy(np.zeros((2, 3)), [0, 1])
    with pytest.raises(TypeError, match="float64"):
        accuracy([0.5], [0])
    with pytest.raises(TypeError, match="every image needs a label"):
        accuracy([0, 1], [0, None])
    with pytest.raises(TypeError, match="both as numbers or both as names"):
        accuracy([0], ["cat"])


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 30), (7, 10), (999, 1000), (5, 5)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_against_scipy(k, n, confidence):
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((want.low, want.high), rel=1e-9, abs=1e-12)
