"""Pipeline: what it computes equals the plain scores, and what it refuses it refuses at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fastood
from fastood.data import load_images
from fastood.errors import DataError, ModelError
from fastood.features import FeatureCache
from fastood.pipeline import Pipeline
from fastood.scores.bank import ClassBank, Similarities
from tests.features.toy_encoder import ToyEncoder, write_images
from tests.pipeline.conftest import NAMES, feature_set


def pipeline(text: torch.Tensor, **options) -> Pipeline:
    options.setdefault("methods", ["mcm"])
    return Pipeline(None, options.pop("names", NAMES), text=text, **options)


class NoReading(ToyEncoder):
    """A tower that must not be used: the mistake should have been found before."""

    def encode_image(self, pixels, *, local=False):
        raise AssertionError("an image was encoded before the mistake was found")


class CosineHead:
    """An adapted head with as many classes as rows."""

    def __init__(self, rows: torch.Tensor, fingerprint: str | None = None) -> None:
        self.rows = rows
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def similarities(self, features, local=None):
        unit = torch.nn.functional.normalize
        z, t = unit(features.float(), dim=-1), unit(self.rows, dim=-1)
        return Similarities(z @ t.T, None if local is None else unit(local.float(), dim=-1) @ t.T)


def test_scores_equal_the_functional_ones_over_all_chunks(text, id_set):
    methods = {
        "mcm": "mcm",
        "sharp": ("mcm", {"tau": 0.1}),
        "energy": "energy",
        "delta": ("delta_energy", {"c": 2}),
        "margin": "margin",
    }
    found = pipeline(text, methods=methods).score(id_set)
    expected = fastood.score(id_set.image(), text, methods=methods, logit_scale=100.0)
    assert list(found.scores) == list(methods)
    for label, values in expected.items():
        np.testing.assert_allclose(found.scores[label].values, values.numpy(), rtol=1e-6)
    cosines = ClassBank(text).similarities(id_set.image()).image
    assert (found.predicted == cosines.argmax(1).numpy()).all()
    assert (found.labels == id_set.labels).all() and len(found) == 80


def test_tau_follows_the_logit_scale(text, id_set):
    soft = pipeline(text, methods=["msp", "mcm"], logit_scale=20.0)
    assert soft.keys()["msp"].options["tau"] == pytest.approx(0.05)
    assert soft.keys()["mcm"].options["tau"] == 1.0
    expected = fastood.msp(id_set.image(), text, tau=0.05)
    np.testing.assert_allclose(soft.score(id_set).scores["msp"].values, expected.numpy(), rtol=1e-6)


def test_default_scores_of_features_leave_out_what_needs_more(text, id_set, ood_set):
    made = Pipeline(None, NAMES, text=text)
    labels = set(made.keys())
    assert {"mcm", "energy", "delta_energy", "margin"} <= labels
    assert not labels & {"gl_mcm", "l_mcm", "neg_label", "knn", "mahalanobis"}
    assert set(made.score(ood_set).scores) == labels


def test_patch_scores_of_features_and_their_absence(text, ood_set):
    made = pipeline(text, methods=["gl_mcm"])
    with_patches = feature_set("p", 9, seed=1, local=5)
    local = torch.cat([c.local for c in with_patches.chunks])
    expected = fastood.gl_mcm(with_patches.image(), local, text)
    np.testing.assert_allclose(
        made.score(with_patches).scores["gl_mcm"].values, expected.numpy(), rtol=1e-5
    )
    with pytest.raises(DataError, match=r"far: patch scores need an array 'local'"):
        made.score(ood_set)
    with pytest.raises(DataError, match="far: patch scores"):
        made.evaluate(with_patches, [ood_set])


def test_one_class_has_no_margin_but_everything_else(text, id_set):
    one = Pipeline(None, ["only"], text=text[:1])
    labels = set(one.keys())
    assert "margin" not in labels and "mcm" in labels
    found = one.score(id_set)
    assert (found.predicted == 0).all()
    assert np.isfinite(np.stack([s.values for s in found.scores.values()])).all()
    with pytest.raises(ValueError, match=r"margin: expected at least two classes, got K = 1"):
        pipeline(text[:1], names=["only"], methods=["margin"])


def test_knn_and_mahalanobis_equal_a_fit_by_hand(text, id_set, ood_set):
    train = feature_set("train", 60, seed=7)
    methods = {
        "near": ("knn", {"k": 3}),
        "gauss": ("mahalanobis", {"shrinkage": 0.3, "normalize": True}),
    }
    made = pipeline(text, methods=methods, train=train)
    found = made.score(ood_set).scores
    bank = fastood.fit_mahalanobis(
        train.image(), torch.from_numpy(train.labels), shrinkage=0.3, normalize=True
    )
    neighbours = fastood.fit_knn(train.image())
    np.testing.assert_allclose(
        found["near"].values, fastood.knn(ood_set.image(), neighbours, k=3).numpy(), rtol=1e-6
    )
    np.testing.assert_allclose(
        found["gauss"].values, fastood.mahalanobis(ood_set.image(), bank).numpy(), rtol=1e-5
    )
    keys = made.keys()
    assert keys["gauss"].options["shrinkage"] == 0.3 and len(keys["gauss"].options["fit"]) == 32
    other = pipeline(text, methods=methods, train=feature_set("train", 60, seed=8))
    assert other.keys()["near"].options["fit"] != keys["near"].options["fit"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["knn"], r"knn: k: expected an integer with 1 <= k <= 20.*got 50"),
        ({"x": ("knn", {"k": 0})}, r"knn: k: expected an integer with 1 <= k <= 20.*got 0"),
        ({"x": ("knn", {"k": True})}, r"knn: k: expected an integer.*got True"),
        ({"x": ("mahalanobis", {"shrinkage": 7})}, r"mahalanobis: shrinkage: expected 0 to 1"),
        ({"x": ("mahalanobis", {"eps": "a"})}, r"mahalanobis: eps: expected a number, got 'a'"),
        ({"x": ("mahalanobis", {"k": 3})}, r"mahalanobis: unknown option 'k'; it takes normalize"),
        ({"x": ("knn", {"tau": 1})}, r"knn: unknown option 'tau'; it takes k"),
    ],
)
def test_training_mistakes_are_found_before_the_training_images_are_read(
    text, tmp_path, methods, message
):
    write_images(tmp_path / "train" / "a", 20)
    train = load_images(tmp_path / "train")
    with pytest.raises(ValueError, match=message):
        Pipeline(NoReading(), NAMES, text=text, methods=methods, train=train)


def test_mahalanobis_needs_labels_before_anything_is_read(text, tmp_path):
    write_images(tmp_path / "flat", 3)
    with pytest.raises(DataError, match="flat: mahalanobis needs a class for every training image"):
        Pipeline(
            NoReading(), NAMES, text=text, methods=["mahalanobis"],
            train=load_images(tmp_path / "flat"),
        )  # fmt: skip


@pytest.mark.parametrize("methods", [["knn"], ["mahalanobis"]])
def test_fitted_scores_without_training_set(text, methods):
    with pytest.raises(ValueError, match="needs a bank of training features"):
        pipeline(text, methods=methods)


def test_what_no_score_uses_is_said(text):
    train = feature_set("train", 60, seed=7)
    assert any("train: given, but" in w for w in pipeline(text, train=train).warnings)
    assert not pipeline(text, methods={"k": ("knn", {"k": 2})}, train=train).warnings


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"methods": ["mcn"]}, ValueError, r"unknown score 'mcn'; did you mean 'mcm'"),
        ({"methods": []}, ValueError, r"methods: expected at least one of"),
        ({"methods": ["mcm", "mcm"]}, ValueError, r"'mcm' is asked for twice"),
        ({"methods": {"a": ("mcm", {"tau": 0})}}, ValueError, r"tau: expected a temperature > 0"),
        ({"methods": {"a": ("mcm", {"t": 1})}}, ValueError, r"mcm: unknown option 't'; it takes"),
        ({"methods": {"set": "mcm"}}, ValueError, r"a score cannot be called 'set'"),
        ({"methods": {"decision": "mcm"}}, ValueError, r"a score cannot be called 'decision'"),
        ({"methods": {"": "mcm"}}, ValueError, r"expected a label of text"),
        ({"methods": {3: "mcm"}}, ValueError, r"expected a label of text"),
        ({"methods": {"d": ("delta_energy", {"c": 7})}}, ValueError, r"c: .*K = 6, got 7"),
        ({"methods": ["neg_label"]}, ValueError, r"neg_label: needs negative labels"),
        ({"negatives": ["a photo of a word"]}, ModelError, r"negatives: expected a model with a"),
        ({"names": NAMES[:5]}, ValueError, r"class_names: expected one for each of 6 rows.*got 5"),
        ({"names": ("a", "a", "b", "c", "d", "e")}, DataError, r"class_names: .*'a' \(2 times\)"),
        ({"names": "thing"}, TypeError, r"class_names: expected a list of names, got the text"),
    ],
)
def test_refusals(text, options, kind, message):
    # a duplicate is a ValueError in older spellings of the check: both are FastoodError or value
    kinds = (kind, ValueError) if kind is DataError else kind
    with pytest.raises(kinds, match=message):
        pipeline(text, **options)


def test_neither_model_nor_classes():
    with pytest.raises(ModelError, match="expected a model, or class features"):
        Pipeline(None, NAMES)


def test_a_tower_without_text_or_head_says_what_to_give():
    with pytest.raises(ModelError, match="toy has neither a text tower nor classes of its own"):
        Pipeline(ToyEncoder(), NAMES)


def test_features_of_another_width_are_refused_before_any_image(text, id_set, tmp_path):
    narrow = dataclasses.replace(
        id_set, chunks=(dataclasses.replace(id_set.chunks[0], image=torch.ones(40, 8)),)
    )
    with pytest.raises(ValueError, match=r"id: expected features of width 16 .* got 8"):
        pipeline(text).score(narrow)
    write_images(tmp_path / "shots", 3)
    images = load_images(tmp_path / "shots")
    with pytest.raises(ValueError, match="id: expected features of width 16"):
        Pipeline(NoReading(), NAMES, text=text, methods=["mcm"]).evaluate(images, [narrow])
    with pytest.raises(ValueError, match="text: expected class features of width 16 as toy has"):
        Pipeline(NoReading(), NAMES, text=torch.randn(6, 12))


def test_images_without_a_model(text, tmp_path):
    write_images(tmp_path / "shots", 2)
    with pytest.raises(ModelError, match="shots: images need a model"):
        pipeline(text).score(load_images(tmp_path / "shots"))


def test_adapted_head_gives_its_own_fingerprint_and_class_numbers(text, id_set):
    bare = Pipeline(ToyEncoder(), None, head=CosineHead(text), methods=["mcm"])
    assert bare.class_names == tuple(f"class {k}" for k in range(6))
    named = Pipeline(ToyEncoder(), NAMES, head=CosineHead(text, "v1"), methods=["mcm"])
    assert named.model_fingerprint == f"{ToyEncoder().fingerprint}+v1"
    expected = fastood.mcm(id_set.image(), text)
    np.testing.assert_allclose(
        named.score(id_set).scores["mcm"].values, expected.numpy(), rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"one for each of the 6 classes of the head, got 2"):
        Pipeline(NoReading(), NAMES[:2], head=CosineHead(text), methods=["mcm"])
    with pytest.raises(ValueError, match="head, text: expected one of them"):
        Pipeline(None, NAMES, head=CosineHead(text), text=text)
    with pytest.raises(TypeError, match="similarities"):
        Pipeline(ToyEncoder(), NAMES, head=object())


def test_thresholds_of_two_adaptations_do_not_mix(text, id_set):
    old = Pipeline(ToyEncoder(), NAMES, head=CosineHead(text, "v1"), methods=["mcm"])
    new = Pipeline(ToyEncoder(), NAMES, head=CosineHead(text, "v2"), methods=["mcm"])
    threshold = old.calibrate(id_set)
    assert threshold.is_ood(old.score(id_set).scores["mcm"]).mean() <= 0.05
    with pytest.raises(ValueError, match="model"):
        threshold.is_ood(new.score(id_set).scores["mcm"])


def test_a_bank_as_head_knows_its_prompts(text, id_set):
    one = Pipeline(None, NAMES, head=ClassBank(text), methods=["mcm"])
    same = Pipeline(None, NAMES, text=text, methods=["mcm"])
    other = Pipeline(None, NAMES, head=ClassBank(text.flip(0)), methods=["mcm"])
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="prompts"):
        one.calibrate(id_set).is_ood(other.score(id_set).scores["mcm"])


def test_negative_labels_in_a_bank_work_and_their_groups_are_part_of_the_key(text, id_set):
    generator = torch.Generator().manual_seed(2)
    negatives = torch.randn(40, 16, generator=generator)
    ten, five = (
        Pipeline(
            None, NAMES, head=ClassBank(text, negatives=negatives, groups=g), methods=["neg_label"]
        )
        for g in (10, 5)
    )
    expected = fastood.neg_label(id_set.image(), text, negatives, groups=10)
    found = ten.score(id_set).scores["neg_label"]
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-5)
    assert found.key.options["groups"] == 10
    with pytest.raises(ValueError, match="groups"):
        ten.calibrate(id_set).is_ood(five.score(id_set).scores["neg_label"])


def test_images_are_encoded_once_for_all_scores_and_kept(text, tmp_path):
    write_images(tmp_path / "shots", 20)
    images = load_images(tmp_path / "shots")
    cache = FeatureCache(tmp_path / "cache")
    seen: list[tuple[int, int, str]] = []
    options = {"text": text, "cache": cache, "batch_size": 4}
    encoder = ToyEncoder()
    made = Pipeline(encoder, NAMES, progress=lambda *step: seen.append(step), **options)
    assert {"gl_mcm", "mcm", "energy"} <= set(made.keys())
    first = made.score(images)
    assert sum(encoder.batches) == 20 and first.features.encoded == 20
    assert seen[-1] == (20, 20, "shots") and made.wants_local
    again = Pipeline(NoReading(), NAMES, **options).score(images)
    assert again.features.encoded == 0
    for label, values in first.scores.items():
        assert (values.values == again.scores[label].values).all()


def test_strict_fails_where_otherwise_files_are_skipped(text, tmp_path):
    write_images(tmp_path / "shots", 3)
    (tmp_path / "shots" / "zz.jpg").write_text("no picture")
    images = load_images(tmp_path / "shots")
    found = Pipeline(ToyEncoder(), NAMES, text=text, methods=["mcm"]).score(images)
    assert len(found) == 3 and [s.path for s in found.features.skipped] == ["zz.jpg"]
    with pytest.raises(DataError, match=r"zz\.jpg"):
        Pipeline(ToyEncoder(), NAMES, text=text, methods=["mcm"], strict=True).score(images)


def test_an_interrupt_in_a_decoding_thread_ends_the_run_and_keeps_the_cache(text, tmp_path):
    write_images(tmp_path / "shots", 24)
    images = load_images(tmp_path / "shots")

    def interrupt() -> bytes:
        raise KeyboardInterrupt

    items = list(images.items)
    items[17] = dataclasses.replace(items[17], read=interrupt)
    broken = dataclasses.replace(images, items=tuple(items))
    cache = FeatureCache(tmp_path / "cache")
    options = {"text": text, "cache": cache, "batch_size": 2, "methods": ["mcm"]}
    with pytest.raises(KeyboardInterrupt):
        Pipeline(ToyEncoder(), NAMES, **options).score(broken)
    found = Pipeline(ToyEncoder(), NAMES, **options).score(images)
    fresh = Pipeline(ToyEncoder(), NAMES, text=text, batch_size=2, methods=["mcm"]).score(images)
    assert (found.scores["mcm"].values == fresh.scores["mcm"].values).all()


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (NAMES, [0, 1, 2, 3, 4, 5]),
        (("Thing_5", "thing-4", "THING 3", "thing 2", "thing  1", "thing_0"), [5, 4, 3, 2, 1, 0]),
        (("thing 0", "thing 1", "thing 2", "thing 3", "thing 4", "cat"), None),
    ],
)
def test_labels_follow_the_spelling_of_class_names(text, id_set, theirs, expected):
    given = dataclasses.replace(id_set, class_names=theirs)
    found = pipeline(text).score(given).labels
    if expected is None:
        assert found is None
    else:
        assert (found == np.asarray(expected)[id_set.labels]).all()


def test_names_that_differ_in_spelling_only_are_not_confused(text, id_set):
    names = ("a_b", "a b", "c", "d", "e", "f")
    given = dataclasses.replace(id_set, class_names=("c", "a b", "a_b", "d", "e", "f"))
    found = pipeline(text, names=names, allow_duplicates=True).score(given).labels
    assert (found == np.asarray([2, 1, 0, 3, 4, 5])[id_set.labels]).all()
    unclear = dataclasses.replace(id_set, class_names=("c", "A-B", "a_b", "d", "e", "f"))
    assert pipeline(text, names=names, allow_duplicates=True).score(unclear).labels is None


def test_classes_that_share_a_name_keep_their_own_labels(text, id_set):
    names = ("crane", "crane", "c", "d", "e", "f")
    given = dataclasses.replace(id_set, class_names=names)
    made = pipeline(text, names=names, allow_duplicates=True)
    assert any("crane" in w for w in made.warnings)
    assert (made.score(given).labels == id_set.labels).all()


def test_unknown_labels_stay_unknown(text, id_set):
    labels = id_set.labels.copy()
    labels[:5] = -1
    found = pipeline(text).score(dataclasses.replace(id_set, labels=labels)).labels
    assert (found[:5] == -1).all() and (found[5:] == labels[5:]).all()


def test_calibrate_carries_the_recipe_and_accepts_what_it_promises(text, id_set):
    made = pipeline(text, methods=["mcm", "energy"])
    threshold = made.calibrate(id_set, score="energy", tpr=0.9)
    assert threshold.score == "energy" and threshold.recipe["class_names"] == list(NAMES)
    assert threshold.recipe["model"] is None
    kept = ~threshold.is_ood(made.score(id_set).scores["energy"])
    assert kept.mean() >= 0.9
    with pytest.raises(ValueError, match="score: expected one of mcm, energy, got None"):
        made.calibrate(id_set)
    with pytest.raises(ValueError, match="score: expected one of mcm, energy, got 'msp'"):
        made.calibrate(id_set, score="msp")
