"""``fastood train``, and what ``--adapt`` does with its file."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from fastood.tuning.loop import CHECKPOINT
from fastood.tuning.state import read_header
from tests.cli.conftest import TINY


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "train-cache"


@pytest.fixture
def fit(fastood, photos, tmp_path, cache):
    """``fit("coop:n_ctx=2", "--epochs", 2)``: a short run on four photographs a class."""

    def run(method, *words, out="out"):
        views = 0 if method.startswith("lora") else 1
        return fastood(
            "train", method, *TINY, "--id", photos.calibration, "--shots", 4, "--views", views,
            "--cache", cache, "--out", tmp_path / out, *words,
        )  # fmt: skip

    run.folder = tmp_path
    return run


def adaptation(fit, out="out"):
    return fit.folder / out / "adaptation.safetensors"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("coop:n_ctx=2,position=middle", ["--epochs", 2]),
        ("tip-f", ["--epochs", 2]),
        ("tip", []),
        ("locoop:n_ctx=2", ["--epochs", 1]),
    ],
)
def test_what_was_trained_scores(fit, fastood, photos, cache, method, words):
    done = fit(method, *words, "--val", photos.id)
    assert done.code == 0, done.error
    file = adaptation(fit)
    assert f"adaptation: {file}" in done.out.replace("\n", "")
    header = read_header(file)
    assert header.method == method.partition(":")[0] and len(header.class_names) == 5
    assert header.training["data"]["training"]["images"] == 20
    out = fit.folder / "eval"
    done = fastood(
        "eval", *TINY, "--adapt", file, "--id", photos.id, "--ood", photos.near, "--bootstrap", 0,
        "--score", "mcm", "--score", "gl_mcm", "--cache", cache, "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.error
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert results["model"]["adapted"] == [f"{header.method} ({header.digest})"]
    assert results["prompts"]["class_names"] == list(header.class_names)
    assert results["id"]["accuracy"] is not None
    assert header.digest in (out / "report.html").read_text("utf-8")


def test_a_threshold_remembers_its_adaptation(fit, fastood, photos, cache):
    assert fit("coop:n_ctx=2", "--epochs", 1).code == 0
    threshold = fit.folder / "threshold.json"
    made = fastood(
        "calibrate", *TINY, "--adapt", adaptation(fit), "--id", photos.calibration,
        "--cache", cache, "--out", threshold,
    )  # fmt: skip
    assert made.code == 0, made.error
    done = fastood("score", photos.near, "--threshold", threshold, "--cache", cache, "-q")
    assert done.code == 0, done.error
    assert "images are out of distribution" in done.out
    plain = fastood(
        "score", photos.near, *TINY, "--threshold", threshold, "--score", "mcm",
        "--adapt", adaptation(fit), "--cache", cache, "--json",
    )  # fmt: skip
    assert plain.code == 0, plain.error
    assert fit("coop:n_ctx=2", "--epochs", 2, "--seed", 3, out="other").code == 0
    other = fastood(
        "score", photos.near, "--threshold", threshold, "--adapt", adaptation(fit, "other"),
        "--cache", cache, "-q",
    )  # fmt: skip
    assert other.code == 2 and "--threshold" in other.error


def test_lora_changes_towers_and_can_be_trained_on(fit, fastood, photos, cache):
    lora = fit("lora:kinds=q+v,layers=5,rank=2,towers=image", "--epochs", 1, "--shots", 1)
    assert lora.code == 0, lora.error
    first = adaptation(fit)
    assert read_header(first).settings["kinds"] == ["q", "v"]
    both = fit("coop:n_ctx=2", "--epochs", 1, "--adapt", first, out="both")
    assert both.code == 0, both.error
    second = adaptation(fit, "both")
    words = ["--id", photos.id, "--ood", photos.far, "--score", "mcm", "--bootstrap", 0]
    out = fit.folder / "eval"
    done = fastood(
        "eval", *TINY, "--adapt", first, "--adapt", second, *words, "--cache", cache, "--out", out
    )
    assert done.code == 0, done.error
    assert len(json.loads((out / "results.json").read_text("utf-8"))["model"]["adapted"]) == 2
    alone = fastood("eval", *TINY, "--adapt", second, *words, "--cache", cache, "--out", out)
    assert alone.code == 2 and "trained on fastood-tiny + lora" in alone.error
    swapped = fastood("eval", *TINY, "--adapt", second, "--adapt", first, *words)
    assert swapped.code == 2


def test_the_same_command_continues(fit):
    assert fit("coop:n_ctx=2", "--epochs", 2).code == 0
    again = fit("coop:n_ctx=2", "--epochs", 2)
    assert again.code == 0, again.error
    changed = fit("coop:n_ctx=2", "--epochs", 3)
    assert changed.code == 2
    assert "recipe.epochs: saved 2, now 3" in changed.error and "--overwrite" in changed.error
    assert fit("coop:n_ctx=2", "--epochs", 3, "--overwrite").code == 0
    assert read_header(adaptation(fit)).training["epochs"][-1]["epoch"] == 3


def test_a_run_cut_short_ends_as_if_it_had_not_been(fit):
    assert fit("coop:n_ctx=2", "--epochs", 4, out="whole").code == 0
    assert fit("coop:n_ctx=2", "--epochs", 4).code == 0
    want = load_file(adaptation(fit, "whole"))
    got = load_file(adaptation(fit))
    assert all((got[name] == want[name]).all() for name in want)


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("koop", [], "did you mean 'coop'?"),
        ("coop:n_ctxx=2", [], "did you mean 'n_ctx'?"),
        ("coop:n_ctx", [], "expected name=value"),
        ("coop:n_ctx=30", [], "32"),
        ("locoop:top_k=5", [], "no patch could be OOD"),
        ("coop", ["--shots", "7"], "fewer than 7 images"),
        ("coop", ["--shots", "many"], "--shots"),
        ("coop", ["--select", "validation"], "--val"),
        ("coop", ["--select", "test"], "--select"),
        ("coop", ["--recipe", "speed=2"], "'speed'"),
        ("tip", ["--epochs", "2"], "trains nothing"),
        ("lora", ["--views", "2"], "expected 0, got 2"),
    ],
)
def test_bad_input_is_one_line_before_any_work(fit, method, words, says):
    done = fit(method, *words)
    assert done.code == 2 and says in done.error, done.error
    assert not (fit.folder / "out" / CHECKPOINT).exists()
    assert done.err.count("error:") == 1


def test_a_threshold_of_changed_towers_is_used_again(fit, fastood, photos, cache):
    done = fit("lora:rank=1", "--epochs", 1, "--shots", 1, "--dtype", "float64")
    assert done.code == 0, done.error
    assert "--dtype float64 --adapt" in done.out
    threshold = fit.folder / "threshold.json"
    made = fastood(
        "calibrate", *TINY, "--adapt", adaptation(fit), "--id", photos.calibration,
        "--cache", cache, "--out", threshold, "--dtype", "float64",
    )  # fmt: skip
    assert made.code == 0, made.error
    words = ["--threshold", threshold, "--cache", cache, "-q", "--dtype", "float64"]
    used = fastood("score", photos.near, *words)
    assert used.code == 0, used.error
    assert "images are out of distribution" in used.out


def test_notes_are_shown_once(fit, fastood, photos):
    done = fit("tip", "--val", photos.calibration)
    assert done.code == 0, done.error
    assert done.err.count("validation images are training images too") == 1


def test_other_classes_are_refused_with_both_sides(fit, fastood, photos, tmp_path):
    assert fit("tip").code == 0
    strange = tmp_path / "strange"
    shutil.copytree(photos.near, strange)
    words = ["eval", *TINY, "--adapt", adaptation(fit), "--ood", photos.far]
    done = fastood(*words, "--id", strange, "--out", tmp_path / "e")
    assert done.code == 2
    assert "expected the 5 classes" in done.error and "hat" in done.error
    assert "dress" in done.error
    shutil.copytree(photos.id / "dress", tmp_path / "some" / "dress")
    part = fastood(
        *words, "--id", tmp_path / "some", "--out", tmp_path / "e", "--score", "mcm",
        "--bootstrap", 0,
    )  # fmt: skip
    assert part.code == 0, part.error


def test_shots_of_a_coop_split_decide_the_epochs_too(fit, photos, tmp_path, monkeypatch):
    rows = {
        part: [
            [f.relative_to(photos.calibration).as_posix(), k, f.parent.name]
            for k, folder in enumerate(sorted(photos.calibration.iterdir()))
            for f in sorted(folder.iterdir())[: 3 * (number + 1)][-3:]
        ]
        for number, part in enumerate(("train", "val"))
    }
    file = photos.calibration.parent / "split_zhou_Photos.json"
    file.write_text(
        json.dumps({k: [[f"calibration/{p}", y, c] for p, y, c in v] for k, v in rows.items()})
    )
    monkeypatch.setattr("fastood.tuning.run.Run.go", lambda self: None)
    done = fit("coop:n_ctx=2", "--id", file, "--shots", 1)
    file.unlink()
    assert done.code == 0, done.error
    assert read_header(adaptation(fit)).training["settings"]["recipe"]["epochs"] == 50


def test_a_class_folder_without_images_is_named(fit, fastood, photos, tmp_path):
    shutil.copytree(photos.calibration, tmp_path / "gap")
    (tmp_path / "gap" / "hat").mkdir()
    done = fit("tip", "--id", tmp_path / "gap")
    assert done.code == 2 and "classes without images: hat" in done.error, done.error


def test_overwrite_keeps_the_old_result_until_the_model_is_there(fit):
    assert fit("tip").code == 0
    assert fit("tip", "--overwrite", "--model", "no-such-model").code == 2
    assert adaptation(fit).is_file()


def test_a_file_that_is_none_of_ours(fastood, photos, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nothing")
    done = fastood("score", photos.far, *TINY, "--adapt", file)
    assert done.code == 2 and str(file) in done.error.replace("\n", "")
