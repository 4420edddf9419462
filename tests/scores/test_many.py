"""score(): many methods at once equal each on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastood
from fastood.scores import SCORES, Similarities
from fastood.scores.registry import default_methods, resolve
from tests.conftest import clip_like


def everything():
    image, text, label = clip_like(23, 9, 32)
    local = clip_like(23 * 4, 9, 32, seed=5)[0].view(23, 4, 32)
    negatives = clip_like(1, 30, 32, seed=6)[1]
    fits = {
        "mahalanobis": ("mahalanobis", {"fit": fastood.fit_mahalanobis(image, label, eps=0.1)}),
        "knn": ("knn", {"fit": fastood.fit_knn(image), "k": 3}),
    }
    methods = {n: n for n, spec in SCORES.items() if spec.needs != "fit"}
    return image, text, local, negatives, {**methods, **fits}


@pytest.mark.parametrize("rows", [None, 5, 1000])
def test_every_registered_score_equals_its_function(rows):
    image, text, local, negatives, methods = everything()
    out = fastood.score(
        image, text, methods=methods, local=local, negatives=negatives, groups=3, rows=rows
    )
    assert list(out) == list(SCORES)
    for name, values in out.items():
        function = getattr(fastood, name)
        if name == "l_mcm":
            want = function(local, text)
        elif name == "gl_mcm":
            want = function(image, local, text)
        elif name == "neg_label":
            want = function(image, text, negatives, groups=3)
        elif name in ("mahalanobis", "knn"):
            options = dict(methods[name][1])
            want = function(image, options.pop("fit"), **options)
        else:
            want = function(image, text)
        torch.testing.assert_close(values, want, rtol=2e-5, atol=1e-7)


def test_autocast_around_the_scores_changes_nothing():
    image, text, local, negatives, methods = everything()
    options = {"methods": methods, "local": local, "negatives": negatives, "groups": 3}
    want = fastood.score(image, text, **options)
    per_image = text.expand(len(image), -1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (image @ text.mT).dtype == torch.bfloat16  # else this test shows nothing
        got = fastood.score(image, text, **options)
        assert torch.equal(fastood.mcm(image, text), want["mcm"])
        torch.testing.assert_close(fastood.mcm(image, per_image), want["mcm"])
        torch.testing.assert_close(fastood.l_mcm(local, per_image), want["l_mcm"])
        loss = fastood.ebm_loss(image, text, torch.zeros(len(image), dtype=torch.int64))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert loss == fastood.ebm_loss(image, text, torch.zeros(len(image), dtype=torch.int64))


def test_one_score_at_several_temperatures_and_the_models_own():
    image, text, _ = clip_like(8, 5)
    out = fastood.score(
        image,
        text,
        methods={"a": ("msp", {"tau": 0.5}), "b": ("msp", {}), "c": "mcm"},
        logit_scale=50.0,
    )
    assert torch.equal(out["a"], fastood.msp(image, text, tau=0.5))
    assert torch.equal(out["b"], fastood.msp(image, text, tau=0.02))
    assert torch.equal(out["c"], fastood.mcm(image, text, tau=1.0))


def test_names_and_labelled_entries_mix_in_one_list():
    image, text, _ = clip_like(8, 5)
    out = fastood.score(
        image, text, methods=["mcm", {"hot": ("mcm", {"tau": 2.0}), "c": "msp"}, "energy"]
    )
    assert list(out) == ["mcm", "hot", "c", "energy"]
    assert torch.equal(out["hot"], fastood.mcm(image, text, tau=2.0))


@pytest.mark.parametrize(
    "methods",
    [
        [("mcm", {"tau": 1.0})],
        {"a": ("mcm",)},
        {"a": None},
        {"a": ("mcm", 0.5)},
        [3],
    ],
)
def test_an_entry_of_another_form_is_named(methods):
    image, text, _ = clip_like(3, 5)
    with pytest.raises(ValueError, match=r"expected names or \{label: \(name, options\)\}, got"):
        fastood.score(image, text, methods=methods)


def test_a_label_is_given_once_however_it_is_asked():
    image, text, _ = clip_like(3, 5)
    with pytest.raises(ValueError, match="'mcm' is asked for twice"):
        fastood.score(image, text, methods=["mcm", {"mcm": ("mcm", {"tau": 0.5})}])


def test_an_adapted_model_needs_similarities_only():
    image, text, _ = clip_like(8, 5)

    class Shifted:
        def similarities(self, features, local=None):
            s = fastood.ClassBank(text).similarities(features, local)
            return Similarities(s.image + 0.1, s.local)

    out = fastood.score(image, Shifted(), methods=["max_similarity"])["max_similarity"]
    torch.testing.assert_close(out, fastood.max_similarity(image, text) + 0.1)


def test_an_empty_batch_gives_empty_scores():
    image, text, _ = clip_like(3, 5)
    assert {
        v.shape for v in fastood.score(image[:0], text, methods=["mcm", "energy"]).values()
    } == {(0,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["mmc"]}, "unknown score 'mmc'; did you mean 'mcm'"),
        ({"methods": []}, "at least one of max_similarity"),
        ({"methods": ["mcm", "mcm"]}, "asked for twice"),
        (
            {"methods": {"x": ("mcm", {"temperature": 1})}},
            "unknown option 'temperature'; it takes tau",
        ),
        ({"methods": {"x": ("mcm", {"tau": -1})}}, "tau: expected a temperature > 0"),
        ({"methods": {"x": ("delta_energy", {"c": 6})}}, "c: expected 1 <= c <= K = 5, got 6"),
        ({"methods": ["gl_mcm"]}, "needs patch features"),
        ({"methods": ["neg_label"]}, "needs negative labels"),
        ({"methods": ["knn"]}, r"needs a bank of training features.*fit_knn"),
        ({"methods": ["mcm"], "rows": 0}, "rows: expected 1 <= rows, got 0"),
        ({"methods": ["mcm"], "local": torch.zeros(2, 3, 64) + 1}, "expected patches of 3 images"),
    ],
)
def test_refusals_come_before_any_arithmetic(options, message, monkeypatch):
    image, text, _ = clip_like(3, 5)
    monkeypatch.setattr(
        fastood.ClassBank, "similarities", lambda *a, **k: pytest.fail("arithmetic has started")
    )
    with pytest.raises(ValueError, match=message):
        fastood.score(image, text, **options)


def test_not_a_head():
    with pytest.raises(TypeError, match="similarities"):
        fastood.score(torch.ones(1, 2), object(), methods=["mcm"])


def test_defaults_leave_out_what_cannot_be_computed():
    assert "gl_mcm" in default_methods(local=True, classes=5)
    assert "gl_mcm" not in default_methods(local=False, classes=5)
    assert "margin" not in default_methods(local=False, classes=1)
    resolve(default_methods(local=True, classes=5), local=True, negatives=False, classes=5)


def test_unsigned_scores_turn_without_wrapping():
    scores = fastood.Scores(np.array([1, 200], dtype=np.uint8), higher="ood")
    assert scores.toward("id").tolist() == [-1.0, -200.0]
    assert scores.toward("ood").tolist() == [1, 200]
