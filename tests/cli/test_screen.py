"""``fastood calibrate`` and ``fastood score``: a threshold decides about its own scores only."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from fastood.calibration import Threshold
from fastood.cli.app import run
from tests.cli.conftest import TINY


@pytest.fixture(scope="module")
def threshold(photos, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("threshold") / "deep" / "t.json"
    cache = tmp_path_factory.getbasetemp() / "cli-cache"
    words = ["calibrate", *TINY, "--id", photos.calibration, "--tpr", "0.8", "--out", file]
    assert run([str(w) for w in [*words, "--score", "mcm", "--cache", cache]]) == 0
    return file


def test_calibrate_says_what_it_saved(fastood, photos, tmp_path):
    words = ["calibrate", *TINY, "--id", photos.calibration, "--tpr", "0.9"]
    words += ["--score", "energy:tau=0.02", "--out", tmp_path / "t.json"]
    done = fastood(*words)
    assert done.code == 0 and done.out.startswith("OOD if energy(tau=0.02")
    assert f"threshold: {tmp_path / 't.json'}" in done.out
    saved = Threshold.load(tmp_path / "t.json")
    assert (saved.score, saved.options["tau"], saved.n) == ("energy", 0.02, 30)
    assert fastood(*words, "--json").json["threshold"] == saved.threshold


def test_a_threshold_needs_no_other_option(fastood, photos, threshold, tmp_path):
    done = fastood("score", photos.near, "--threshold", threshold, "-q", "--json")
    assert done.code == 0 and done.json["skipped"] == []
    limit = Threshold.load(threshold).threshold
    rows = done.json["images"]
    assert len(rows) == 30 and {r["decision"] for r in rows} == {"id", "ood"}
    assert all((r["decision"] == "ood") == (r["mcm"] < limit) for r in rows)
    out = fastood(
        "score", photos.near, "--threshold", threshold, "-q", "--out", tmp_path / "o",
        "--fail-on-ood",
    )  # fmt: skip
    assert out.code == 3 and "images are out of distribution" in out.out
    table = pyarrow.parquet.read_table(tmp_path / "o" / "scores.parquet").to_pylist()
    assert table == rows
    with (tmp_path / "o" / "scores.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["decision"] for line in lines] == [r["decision"] for r in rows]
    assert [float(line["mcm"]) for line in lines] == [r["mcm"] for r in rows]


def test_fail_on_ood_is_0_if_nothing_is(fastood, photos, tmp_path):
    file = tmp_path / "never.json"
    words = ["calibrate", *TINY, "--id", photos.calibration, "--limit", 5, "--out", file]
    assert "cannot support tpr" in fastood(*words).err
    done = fastood("score", photos.near, "--threshold", file, "-q", "--fail-on-ood")
    assert done.code == 0 and "0 of 30 images are out of distribution" in done.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--score", "energy"], "it is for 'mcm', and the scores asked for are energy"),
        (["--score", "mcm:tau=0.5"], "option tau 1.0 against 0.5"),
        (["--template", "a {}"], "prompts"),
        (["--classes", "CLASSES"], "prompts"),
    ],
)
def test_a_threshold_refuses_other_scores_before_encoding(
    fastood, photos, threshold, change, message, tmp_path
):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    change = [str(tmp_path / "classes.txt") if w == "CLASSES" else w for w in change]
    cache = tmp_path / "cache"
    done = fastood("score", photos.near, "--threshold", threshold, *change, "--cache", cache)
    assert done.code == 2 and message in done.error and done.out == ""
    assert not list(cache.glob("chunks/*/*"))


def test_a_threshold_refuses_another_model(fastood, photos, threshold, tmp_path):
    content = json.loads(threshold.read_text())
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps({**content, "threshold": 0.0}))
    done = fastood("score", photos.near, "--threshold", edited)
    assert done.code == 2 and "edited.json" in done.error
    import dataclasses

    other = dataclasses.replace(Threshold.load(threshold), model="of another model")
    other.save(tmp_path / "other.json")
    done = fastood("score", photos.near, "--threshold", tmp_path / "other.json", "-q")
    assert done.code == 2 and "model 'of another model' against" in done.error


def test_the_same_score_under_another_label_is_decided(fastood, photos, threshold):
    done = fastood(
        "score", photos.near, "--threshold", threshold, "-q", "--json", "--score", "x=mcm",
        "--score", "energy",
    )  # fmt: skip
    limit = Threshold.load(threshold).threshold
    assert list(done.json["images"][0]) == ["path", "predicted", "x", "energy", "decision"]
    assert all((r["decision"] == "ood") == (r["x"] < limit) for r in done.json["images"])


@pytest.mark.parametrize("score", ["knn:k=3", "mahalanobis:shrinkage=0.5"])
def test_fitted_thresholds_want_the_same_training_images(fastood, photos, score, tmp_path):
    file = tmp_path / "t.json"
    words = ["calibrate", *TINY, "--id", photos.calibration, "--score", score, "--out", file]
    assert fastood(*words, "--train", photos.id).code == 0
    screen = ["score", photos.near, "--threshold", file, "-q"]
    assert "give --train PATH" in fastood(*screen).error
    assert fastood(*screen, "--train", photos.id).code == 0
    assert "option fit" in fastood(*screen, "--train", photos.calibration).error


def test_negative_labels_and_their_groups_are_remembered(fastood, photos, tmp_path):
    file, words = tmp_path / "t.json", tmp_path / "words.txt"
    words.write_text("\n".join(f"a photo of a {w}" for w in ("cat", "dog", "ship", "truck")))
    made = fastood(
        "calibrate", *TINY, "--id", photos.calibration, "--score", "neg_label", "--out", file,
        "--negatives", words, "--groups", 2,
    )  # fmt: skip
    assert made.code == 0
    screen = ["score", photos.near, "--threshold", file, "-q"]
    assert "give --negatives FILE" in fastood(*screen).error
    assert fastood(*screen, "--negatives", words).code == 0
    words.write_text("\n".join(f"a photo of a {w}" for w in ("cat", "dog", "ship", "horse")))
    assert "prompts" in fastood(*screen, "--negatives", words).error


def test_a_threshold_of_features_asks_for_features(fastood, tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    np.savez(tmp_path / "t.npz", features=generator.normal(size=(4, 8)))
    np.savez(tmp_path / "x.npz", features=generator.normal(size=(50, 8)))
    base = ["--model", "none", "-q"]
    words = ["calibrate", *base, "--id", tmp_path / "x.npz", "--text-features", tmp_path / "t.npz"]
    assert fastood(*words, "--out", tmp_path / "t.json").code == 0
    screen = ["score", tmp_path / "x.npz", "--threshold", tmp_path / "t.json", "-q"]
    assert "--text-features FILE" in fastood(*screen).error
    done = fastood(*screen, "--text-features", tmp_path / "t.npz", "--json", "--limit", 7)
    assert done.code == 0 and len(done.json["images"]) == 7


def test_one_image_without_threshold(fastood, photos, classes):
    image = next(photos.far.glob("*.*"))
    done = fastood("score", image, *TINY, "--score", "mcm", "--classes", classes)
    assert done.code == 0 and image.name in done.out and "decision" not in done.out


def test_subfolders_become_classes_only_with_a_word(fastood, photos):
    done = fastood("score", photos.near, *TINY, "--score", "mcm", "--json", "--limit", 3)
    assert done.code == 0 and "the classes are the 5 subfolders" in done.err
    assert len(done.json["images"]) == 3
