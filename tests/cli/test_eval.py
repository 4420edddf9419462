"""``fastood eval`` and ``fastood report``: what they write and print, and that it agrees."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from fastood.pipeline import Evaluation
from tests.cli.conftest import TINY, strict_json


def results_of(folder: Path) -> dict:
    return strict_json((folder / "results.json").read_text("utf-8"))


def test_files_exist_and_agree(evaluated):
    results = results_of(evaluated)
    assert [s["name"] for s in results["ood"]] == ["near", "far & away"]
    assert list(results["scores"]) == ["mcm", "gl_mcm", "sharp"]
    assert results["scores"]["sharp"]["options"] == {
        "tau": 0.02, "c": 2, "reset": 0.0, "joint": False,
    }  # fmt: skip
    assert results["command"].startswith("fastood eval --model fastood-tiny -q")
    assert "'far & away=" in results["command"]
    table = pyarrow.parquet.read_table(evaluated / "scores.parquet").to_pydict()
    with (evaluated / "scores.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    counts = [results["id"]["images"], *(s["images"] for s in results["ood"])]
    assert len(table["path"]) == len(lines) == sum(counts)
    for label in results["scores"]:
        text = np.array([line[label] for line in lines], dtype=np.float32)
        np.testing.assert_array_equal(text, np.array(table[label], dtype=np.float32))
    html = (evaluated / "report.html").read_text("utf-8")
    assert "far &amp; away" in html and "far & away" not in html
    row = next(r for r in results["metrics"] if (r["set"], r["score"]) == ("near", "mcm"))
    assert f"{100 * row['AUROC']:.2f}" in html
    assert results["model"]["fingerprint"] in html


def test_metrics_follow_from_the_saved_scores(evaluated):
    from fastood.metrics import evaluate

    found = Evaluation.load(evaluated)
    for label in found.results["scores"]:
        for name in ("near", "far & away"):
            again = evaluate(
                found.table.values(label, role="id"),
                found.table.values(label, role="ood", set=name),
                higher="id",
            )
            for metric in ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95-ID", "FPR95-OOD"):
                assert found.metric(name, label, metric) == pytest.approx(again[metric], abs=1e-12)


def test_json_is_one_document_and_the_rest_goes_to_stderr(fastood, photos, tmp_path):
    done = fastood(
        "eval", "--model", "fastood-tiny", "--json", "--id", photos.id, "--ood", photos.near,
        "--score", "mcm", "--limit", 9, "--bootstrap", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0
    assert done.json == results_of(tmp_path / "out")
    assert done.json["thresholds"]["mcm"]["threshold"] == "-inf"
    assert done.err.count("cannot support tpr") == 1
    assert all(s["images"] == 9 for s in (done.json["id"], *done.json["ood"]))


def test_the_table_on_the_console(fastood, photos, tmp_path):
    done = fastood(
        "eval", *TINY, "--id", photos.id, "--ood", photos.near, "--score", "mcm", "--bootstrap", 0,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0 and "AUROC" in done.out and "near" in done.out
    assert str(tmp_path / "out" / "report.html") in done.out
    assert done.err.count("Thresholds come from the evaluated ID images themselves") == 1
    assert "report:" not in done.err


def test_the_same_again_is_quick_and_something_else_is_refused(fastood, photos, tmp_path):
    words = [
        "eval", *TINY, "--id", photos.id, "--ood", photos.near, "--score", "mcm", "--bootstrap", 0,
        "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--json",
    ]  # fmt: skip
    first, second = fastood(*words), fastood(*words)
    assert first.code == second.code == 0
    assert first.json["id"]["encoded"] == first.json["id"]["images"] > 0
    assert second.json["id"]["encoded"] == second.json["ood"][0]["encoded"] == 0
    assert first.json["metrics"] == second.json["metrics"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    for change in (
        ["--score", "energy"],
        ["--ood", photos.far],
        ["--tpr", "0.9"],
        ["--limit", "5"],
        ["--calibration", photos.calibration],
        ["--template", "a {}"],
    ):
        fresh = tmp_path / "fresh"
        refused = fastood(*words, *change, "--cache", fresh)
        assert refused.code == 2 and "holds the results of another evaluation" in refused.error
        assert not list(fresh.glob("chunks/*/*"))  # found before anything was encoded
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    replaced = fastood(*words, "--score", "energy", "--overwrite")
    assert replaced.code == 0 and list(replaced.json["scores"]) == ["mcm", "energy"]


def test_an_id_set_without_class_folders_takes_a_class_file(fastood, photos, classes, tmp_path):
    words = [
        "eval", *TINY, "--id", photos.far, "--ood", photos.near, "--score", "mcm", "--json",
        "--bootstrap", 0, "--out", tmp_path / "out",
    ]  # fmt: skip
    assert "--classes: fastood-tiny scores the classes you name" in fastood(*words).error
    done = fastood(*words, "--classes", classes)
    assert done.code == 0 and done.json["id"]["accuracy"] is None
    assert done.json["prompts"]["class_names"][2] == "pants"


def test_a_class_file_renames_folders_by_mapping_or_order(fastood, photos, tmp_path):
    words = [
        "eval", *TINY, "--id", photos.id, "--ood", photos.near, "--score", "mcm", "--json",
        "--bootstrap", 0, "--limit", 12, "--overwrite", "--out", tmp_path / "out",
    ]  # fmt: skip
    names = ["gown", "sweater", "trousers", "sneakers", "tee"]
    listed = tmp_path / "listed.txt"
    listed.write_text("\n".join(names))
    assert "do not match the 5 classes" in fastood(*words, "--classes", listed).error
    done = fastood(*words, "--classes", listed, "--class-match", "order")
    assert done.json["prompts"]["class_names"] == names
    assert done.json["id"]["accuracy"]["n"] == 12
    folders = ["dress", "longsleeve", "pants", "shoes", "t-shirt"]
    mapped = tmp_path / "mapped.json"
    mapped.write_text(json.dumps(dict(zip(folders, names, strict=True))))
    assert sorted(fastood(*words, "--classes", mapped).json["prompts"]["class_names"]) == sorted(
        names
    )


def test_every_kind_of_score_in_one_command(fastood, photos, tmp_path):
    negatives = tmp_path / "negatives.txt"
    negatives.write_text("\n".join(f"a photo of a {w}" for w in ("cat", "dog", "ship", "truck")))
    done = fastood(
        "eval", *TINY, "--id", photos.id, "--ood", photos.near, "--train", photos.calibration,
        "--negatives", negatives, "--groups", 2, "--json", "--bootstrap", 0,
        "--score", "mcm,energy", "--score", "knn:k=3", "--score", "m=mahalanobis:shrinkage=0.5",
        "--score", "neg_label", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0
    scores = done.json["scores"]
    assert list(scores) == ["mcm", "energy", "knn:k=3", "m", "neg_label"]
    assert scores["m"]["options"]["shrinkage"] == 0.5 and scores["knn:k=3"]["options"]["k"] == 3
    assert scores["neg_label"]["options"]["groups"] == 2
    assert len(done.json["metrics"]) == 5


# -- fastood report ----------------------------------------------------------------------------


def test_report_is_written_again(fastood, evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "moved")
    (folder / "report.html").unlink()
    done = fastood("report", folder, "--score", "sharp", "--figure", tmp_path / "figure.png")
    assert done.code == 0 and (tmp_path / "figure.png").stat().st_size > 1000
    html = (folder / "report.html").read_text("utf-8")
    assert "data:image/" in html  # thumbnails are found again after the results moved
    assert fastood("report", folder, "--out", tmp_path / "new" / "r.html").code == 0
    assert (tmp_path / "new" / "r.html").exists()


def test_report_tables(fastood, evaluated):
    rows = results_of(evaluated)["metrics"]
    number = f"{100 * rows[0]['AUROC']:.2f}"
    markdown = fastood("report", evaluated, "--table", "markdown")
    assert markdown.code == 0 and markdown.out.startswith("| OOD set") and number in markdown.out
    latex = fastood("report", evaluated, "--table", "latex").out
    assert latex.startswith("\\begin{tabular}") and "far \\& away" in latex and number in latex
    lines = list(csv.DictReader(fastood("report", evaluated, "--table", "csv").out.splitlines()))
    assert len(lines) == len(rows)
    assert [float(line["AUROC"]) for line in lines] == [row["AUROC"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "xml"], "--table: expected 'markdown' or 'latex' or 'csv', got 'xml'"),
        (["--score", "nope"], "score: expected one of"),
        (["--figure", "figure.xyz"], "--figure: suffix: expected '.png'"),
        (["--out", "/dev/null/x/r.html"], "/dev/null"),
    ],
)
def test_report_refusals(fastood, evaluated, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fastood("report", evaluated, *words)
    assert done.code == 2 and message in done.error


def test_report_of_nothing(fastood, tmp_path):
    assert "expected the results of an evaluation" in fastood("report", tmp_path).error
