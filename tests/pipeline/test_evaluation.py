"""Evaluations: metrics of the right scores, thresholds, and files that agree with each other."""

from __future__ import annotations

import csv
import dataclasses
import json
import warnings

import numpy as np
import pyarrow.parquet
import pytest
import torch

from fastood.calibration import calibrate
from fastood.data import load_images
from fastood.errors import DataError
from fastood.metrics import evaluate
from fastood.pipeline import Evaluation, Pipeline
from fastood.pipeline.output import OutputFolder
from fastood.pipeline.pictures import opener
from fastood.pipeline.screening import Screening
from tests.features.toy_encoder import ToyEncoder, write_images
from tests.pipeline.conftest import NAMES, feature_set


@pytest.fixture(scope="module")
def made(text) -> Pipeline:
    return Pipeline(None, NAMES, text=text, methods={"mcm": "mcm", "hot": ("mcm", {"tau": 0.1})})


@pytest.fixture(scope="module")
def near():
    return feature_set("near", 30, seed=5)


@pytest.fixture(scope="module")
def held():
    return feature_set("held", 60, seed=6)


@pytest.fixture(scope="module")
def found(made, id_set, ood_set, near, held) -> Evaluation:
    return made.evaluate(
        id_set, [ood_set, near], calibration=held, tpr=0.9, resamples=100, command="by hand"
    )


def strict_json(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_are_those_of_the_scores(found, made, id_set, ood_set):
    for label in ("mcm", "hot"):
        expected = evaluate(
            made.score(id_set).scores[label], made.score(ood_set).scores[label], tpr=0.9
        )
        for name in ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR90-ID", "FPR90-OOD"):
            assert found.metric("far", label, name) == pytest.approx(expected[name], abs=0)
    mean = (found.metric("far", "mcm", "AUROC") + found.metric("near", "mcm", "AUROC")) / 2
    assert found.metric("average", "mcm", "AUROC") == pytest.approx(mean)
    with pytest.raises(KeyError, match="no metrics of 'x' on 'far'"):
        found.metric("far", "x", "AUROC")


def test_the_record_is_complete_and_is_json(found, id_set):
    results = strict_json(json.dumps(found.results, allow_nan=False))
    assert results["schema"] == 1 and results["command"] == "by hand"
    assert results["id"]["name"] == "id" and results["id"]["images"] == len(id_set)
    assert [s["name"] for s in results["ood"]] == ["far", "near"]
    assert results["calibration"]["name"] == "held"
    assert results["settings"] == {"tpr": 0.9, "aupr": "ap", "resamples": 100, "seed": 0}
    assert results["scores"]["hot"]["options"] == {"tau": 0.1}
    assert results["prompts"]["class_names"] == list(NAMES)
    row = results["metrics"][0]
    assert row["n_id"] == 80 and row["n_ood"] == 50
    low, high = row["intervals"]["AUROC"]
    assert low < row["AUROC"] < high


def test_accuracy_is_the_share_of_right_predictions(found, made, id_set):
    scored = made.score(id_set)
    right = float((scored.predicted == scored.labels).mean())
    accuracy = found.results["id"]["accuracy"]
    assert accuracy["value"] == pytest.approx(right) and accuracy["n"] == 80


def test_thresholds_come_from_the_calibration_set(found, made, id_set, ood_set, held):
    expected = calibrate(made.score(held).scores["mcm"], tpr=0.9).threshold
    entry = found.results["thresholds"]["mcm"]
    assert entry["threshold"] == expected and entry["source"].startswith("held (60 images)")
    assert not any("evaluated ID images" in note for note in found.results["notes"])
    own = made.evaluate(id_set, [ood_set], resamples=0)
    assert any("evaluated ID images themselves" in note for note in own.results["notes"])
    same = made.evaluate(id_set, [ood_set], calibration=id_set, resamples=0)
    assert "themselves" in same.results["thresholds"]["mcm"]["source"]
    assert any("evaluated ID images themselves" in note for note in same.results["notes"])


def test_the_table_has_a_row_for_every_image(found, made, id_set, ood_set):
    table = found.table
    assert len(table) == 80 + 50 + 30 and table.set_names() == ["id", "far", "near"]
    np.testing.assert_array_equal(
        table.values("hot", role="ood", set="far"), made.score(ood_set).scores["hot"].values
    )
    rows = table.rows(role="id")
    assert [table.class_name[i] for i in rows] == [NAMES[y] for y in id_set.labels]
    assert all(table.class_name[i] is None for i in table.rows(role="ood", set="far"))
    assert set(table.predicted) <= set(NAMES)


def test_saved_files_agree_and_load_again_after_a_move(found, tmp_path):
    folder = found.save(tmp_path / "deep" / "out")
    assert {f.name for f in folder.iterdir()} == {
        "results.json", "report.html", "scores.csv", "scores.parquet",
    }  # fmt: skip
    results = strict_json((folder / "results.json").read_text("utf-8"))
    assert results == json.loads(json.dumps(found.results))
    parquet = pyarrow.parquet.read_table(folder / "scores.parquet").to_pydict()
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == parquet["path"] == list(found.table.path)
    assert np.array_equal(
        np.array([float(line["mcm"]) for line in lines], dtype=np.float32), parquet["mcm"]
    )
    moved = folder.rename(tmp_path / "elsewhere")
    loaded = Evaluation.load(moved)
    assert loaded.results == results and len(loaded.table) == len(found.table)
    assert loaded.open_image("id", "id/0000.png") is None
    assert loaded.save(tmp_path / "copy").is_dir()


def test_loading_what_is_no_evaluation(tmp_path, found):
    with pytest.raises(DataError, match="expected the results of an evaluation"):
        Evaluation.load(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json: cannot be read"):
        Evaluation.load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 9}')
    with pytest.raises(DataError, match="expected results of schema 1, got 9"):
        Evaluation.load(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(DataError, match="expected results of schema 1, got list"):
        Evaluation.load(tmp_path)
    found.save(OutputFolder(tmp_path, overwrite=True))
    (tmp_path / "scores.parquet").unlink()
    with pytest.raises(DataError, match=r"scores\.parquet: no such file"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tpr": 95}, "tpr: .*is it in percent"),
        ({"tpr": 1.0}, "tpr: expected a fraction in"),
        ({"tpr": 0}, "tpr: expected a fraction"),
        ({"aupr": "area"}, "aupr: expected 'ap' or 'trapezoid', got 'area'"),
        ({"resamples": 10}, "resamples: expected at least 100"),
        ({"resamples": -1}, "resamples: expected at least 100"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_wrong_settings_are_refused_before_scoring(text, tmp_path, options, message):
    class NoReading(ToyEncoder):
        def encode_image(self, pixels, *, local=False):
            raise AssertionError("encoded before the mistake was found")

    write_images(tmp_path / "one", 2)
    write_images(tmp_path / "two", 2)
    one, two = load_images(tmp_path / "one"), load_images(tmp_path / "two", name="two")
    made = Pipeline(NoReading(), NAMES, text=text, methods=["mcm"])
    with pytest.raises(ValueError, match=message):
        made.evaluate(one, [two], **options)
    with pytest.raises(ValueError, match=message):
        made.plan(one, [two], **options)


def test_sets_need_names_of_their_own(made, id_set, ood_set):
    with pytest.raises(ValueError, match="at least one OOD set"):
        made.evaluate(id_set, [])
    with pytest.raises(ValueError, match="'far' 2 times among id, far, far"):
        made.evaluate(id_set, [ood_set, ood_set])
    with pytest.raises(ValueError, match="'id' 2 times"):
        made.evaluate(id_set, [id_set])
    with pytest.raises(ValueError, match="a set cannot be called 'average'"):
        made.evaluate(id_set, [dataclasses.replace(ood_set, name="average")])
    with pytest.raises(TypeError, match=r"expected an ImageSet .* got str"):
        made.evaluate(id_set, ["folder"])


def test_one_ood_image_has_metrics_but_no_intervals(made, id_set):
    one = made.evaluate(id_set, [feature_set("one", 1, seed=4)])
    row = one.results["metrics"][0]
    assert row["n_ood"] == 1 and 0 <= row["AUROC"] <= 1 and not row.get("intervals")


def test_infinite_thresholds_are_json_and_reported(made, ood_set, tmp_path):
    few = feature_set("few", 5, seed=9)
    with pytest.warns(UserWarning, match="5 ID scores cannot support tpr") as caught:
        found = made.evaluate(few, [ood_set], resamples=0)
    assert len(caught) == 1  # though two scores have the same fate
    assert found.results["thresholds"]["mcm"]["threshold"] == "-inf"
    assert len([w for w in found.results["warnings"] if "cannot support" in w]) == 1
    folder = found.save(tmp_path / "out")
    strict_json((folder / "results.json").read_text("utf-8"))
    assert "cannot support" in (folder / "report.html").read_text("utf-8")
    again = Evaluation.load(folder)
    assert again.results["thresholds"]["mcm"]["threshold"] == "-inf"


def test_ties_warn_once_each(text, ood_set):
    flat = torch.ones(6, 16)
    made = Pipeline(None, NAMES, text=flat, methods=["mcm"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = made.evaluate(feature_set("id", 30, seed=0), [ood_set], resamples=0)
    assert found.metric("far", "mcm", "AUROC") == 0.5
    assert found.metric("far", "mcm", "FPR95-ID") == 1.0
    texts = [str(w.message) for w in caught]
    assert texts and len(texts) == len(set(texts)) == len(found.results["warnings"])


def test_id_classes_that_were_not_prompted_give_no_accuracy_and_say_so(made, id_set, ood_set):
    other = dataclasses.replace(id_set, class_names=tuple("abcdef"))
    found = made.evaluate(other, [ood_set], resamples=0)
    assert found.results["id"]["accuracy"] is None
    assert any("ID accuracy is not given" in note for note in found.results["notes"])
    assert set(found.table.class_name[found.table.rows(role="id")]) <= set("abcdef")


# -- the folder results go to ------------------------------------------------------------------


def test_an_output_folder_is_tried_at_once_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a" / "b"
    OutputFolder(target)
    assert not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="expected a folder that can be written, got: a file"):
        OutputFolder(file)
    with pytest.raises(DataError, match="expected a folder that can be written"):
        OutputFolder(file / "below")
    kept = tmp_path / "kept"
    kept.mkdir()
    OutputFolder(kept)
    assert kept.is_dir()


def test_repeating_is_allowed_replacing_is_not(made, found, id_set, ood_set, near, held, tmp_path):
    folder = OutputFolder(tmp_path / "out")
    plan = made.plan(
        id_set, [ood_set, near], calibration=held, tpr=0.9, aupr="ap", resamples=100, seed=0
    )
    found.save(folder)
    folder.check(plan)
    found.save(folder)
    others = [
        made.plan(id_set, [ood_set, near], calibration=held, tpr=0.95, resamples=100),
        made.plan(id_set, [ood_set, near], tpr=0.9, resamples=100),
        made.plan(id_set, [ood_set], calibration=held, tpr=0.9, resamples=100),
        made.plan(
            id_set, [ood_set, dataclasses.replace(near, name="nearer")], calibration=held, tpr=0.9,
            resamples=100,
        ),
    ]  # fmt: skip
    before = (tmp_path / "out" / "results.json").read_bytes()
    for other in others:
        with pytest.raises(DataError, match="holds the results of another evaluation"):
            folder.check(other)
        OutputFolder(folder.path, overwrite=True).check(other)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    different = made.evaluate(id_set, [ood_set], resamples=0)
    with pytest.raises(DataError, match="holds the results of another evaluation"):
        different.save(folder.path)
    different.save(OutputFolder(folder.path, overwrite=True))
    assert Evaluation.load(folder.path).results["ood"][0]["name"] == "far"


def test_a_results_file_that_cannot_be_read_is_not_replaced_silently(found, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(DataError, match="holds the results of another evaluation"):
        found.save(tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"


# -- images behind a saved evaluation ----------------------------------------------------------


def test_pictures_are_found_again_from_any_folder(text, tmp_path, monkeypatch):
    write_images(tmp_path / "data" / "one", 3)
    write_images(tmp_path / "data" / "two", 3, seed=1)
    (tmp_path / "data" / "list.txt").write_text("two/000.png 0\ntwo/002.png 1\n")
    monkeypatch.chdir(tmp_path / "data")
    sets = [load_images("one"), load_images("two", name="second"), load_images("list.txt")]
    made = Pipeline(ToyEncoder(), NAMES, text=text, methods=["mcm"])
    with pytest.warns(UserWarning, match="cannot support"):
        found = made.evaluate(sets[0], sets[1:], resamples=0)
    folder = found.save(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    loaded = Evaluation.load(folder)
    content = (tmp_path / "data" / "two" / "002.png").read_bytes()
    assert loaded.open_image("second", "002.png") == content
    listed = [p for p, s in zip(found.table.path, found.table.set, strict=True) if s == "list"]
    assert loaded.open_image("list", listed[1]) == content
    assert loaded.open_image("second", "gone.png") is None
    assert loaded.open_image("nobody", "002.png") is None


def test_pictures_outside_the_sets_are_never_opened(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    open_image = opener({"id": {"name": "id", "root": str(tmp_path / "set")}, "ood": []})
    assert open_image("id", "../secret.png") is None
    assert open_image("id", str(tmp_path / "secret.png")) is None


def test_screening_keeps_names_of_any_bytes(made, ood_set, tmp_path):
    odd = ("a\udcff.png", "=cmd.png", "b,\n.png", *ood_set.paths[3:])
    scored = made.score(dataclasses.replace(ood_set, paths=odd))
    is_ood = np.arange(len(scored)) % 2 == 0
    found = Screening.of(scored, NAMES, is_ood)
    found.save(OutputFolder(tmp_path / "out"))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert list(table) == ["path", "predicted", "mcm", "hot", "decision"]
    assert table["path"][:3] == ["a\\udcff.png", "=cmd.png", "b,\n.png"]
    assert table["decision"][:2] == ["ood", "id"]
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [line["path"] for line in csv.DictReader(file)] == table["path"]
    assert found.rows()[1]["mcm"] == pytest.approx(float(scored.scores["mcm"].values[1]))
