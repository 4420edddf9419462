"""Wrong input: one line, exit code 2, before any long work, naming what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import TINY


@pytest.fixture
def base(photos, tmp_path, monkeypatch):
    """A correct command; every encoder call fails, so mistakes must be found before."""
    from fastood.models.openclip import OpenClipEncoder

    def refuse(*args, **kwargs):
        raise AssertionError("an image was encoded before the mistake was found")

    monkeypatch.setattr(OpenClipEncoder, "encode_image", refuse)
    (tmp_path / "empty").mkdir()
    (tmp_path / "noimages").mkdir()
    (tmp_path / "noimages" / "notes.txt").write_text("x")
    (tmp_path / "double.txt").write_text("dress\ndress\npants\n")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "nothing.txt").write_text("\n")
    (tmp_path / "a file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return [
        "eval", *TINY, "--id", photos.id, "--ood", photos.near, "--out", tmp_path / "out",
        "--no-cache",
    ]  # fmt: skip


REFUSED = [
    ("--score nope", "methods: unknown score 'nope'; known: max_similarity"),
    ("--score mcn", "did you mean 'mcm'"),
    ("--score mcm:tau=0", "tau: expected a temperature > 0, got 0"),
    ("--score mcm:tau=-1", "tau: expected a temperature > 0, got -1"),
    ("--score mcm:tau=warm", "tau: expected a finite number, got 'warm'"),
    ("--score mcm:tau=NaN", "tau: expected a finite number, got nan"),
    ("--score mcm:tau=Infinity", "tau: expected a finite number, got inf"),
    ("--score mcm:tau", "expected name:option=value,option=value, got 'tau'"),
    ("--score mcm:tau=1,tau=2", "'tau' is given twice"),
    ("--score mcm:t=1", "mcm: unknown option 't'; it takes tau"),
    ("--score energy:scale=big", 'scale: expected "tau" or "unit", got \'big\''),
    ("--score delta_energy:c=0", "c: expected 1 <= c <= K = 5, got 0"),
    ("--score delta_energy:c=6", "c: expected 1 <= c <= K = 5, got 6"),
    ("--score delta_energy:c=1.5", "c: expected an integer"),
    ("--score =mcm", "expected a score or label=score, got '=mcm'"),
    ("--score x=", "expected a score or label=score, got 'x='"),
    ("--score ,", "--score: expected the name of a score, got nothing"),
    ("--score mcm,mcm", "'mcm' is asked for twice"),
    ("--score path=mcm", "a score cannot be called 'path'"),
    ("--score knn", "--score knn: expected training images that it is fitted to, got none"),
    ("--score mahalanobis", "give --train PATH"),
    ("--score knn:fit=x", "fit is made from --train"),
    ("--score knn:k=99 --train ID", "knn: k: expected an integer with 1 <= k <= 30"),
    ("--score mahalanobis:shrinkage=2 --train ID", "shrinkage: expected 0 to 1, got 2"),
    ("--score mahalanobis --train FAR", "needs a class for every training image"),
    ("--score neg_label", "--score neg_label: expected negative labels, got none"),
    ("--negatives two.txt", "--groups: expected at most 2, the prompts in two.txt, got 100"),
    ("--negatives nothing.txt", "nothing.txt: expected one prompt a line, the file is empty"),
    ("--negatives missing.txt", "missing.txt: expected a text file with one prompt a line"),
    ("--tpr 1.5", "tpr: expected a fraction in (0, 1], got 1.5; is it in percent?"),
    ("--tpr 95", "is it in percent?"),
    ("--tpr 1", "tpr: expected a fraction in (0, 1), got 1.0"),
    ("--tpr 0", "tpr: expected a fraction"),
    ("--tpr nan", "tpr: expected a fraction"),
    ("--tpr many", "'--tpr'"),
    ("--aupr area", "aupr: expected 'ap' or 'trapezoid', got 'area'"),
    ("--bootstrap 5", "resamples: expected at least 100"),
    ("--bootstrap -1", "resamples: expected at least 100"),
    ("--seed -1", "seed: expected an integer >= 0, got -1"),
    ("--batch-size 0", "'--batch-size'"),
    ("--limit 0", "'--limit'"),
    ("--workers 0", "'--workers'"),
    ("--dtype int8", "dtype: expected one of"),
    ("--device tpu9", "device: expected 'cpu', 'cuda'"),
    ("--classes missing.txt", "missing.txt: cannot be read"),
    ("--classes double.txt", "do not match the 5 classes"),
    ("--classes two.txt", "classes without a name: dress, longsleeve, pants, shoes, t-shirt"),
    ("--classes nothing.txt", "expected one name a line, got an empty file"),
    ("--class-match loosely", "match: expected 'name' or 'order', got 'loosely'"),
    ("--template photo", "templates: expected one with {} for the class name"),
    ("--ood missing", "missing: no such file or folder"),
    ("--ood empty", "empty: expected at least one image"),
    ("--ood noimages", "1 other file ignored (1 .txt)"),
    ("--ood average=FAR", "a set cannot be called 'average'"),
    ("--ood id=FAR", "expected every set under its own name, got 'id' 2 times"),
    ("--ood NEAR", "two OOD sets are called 'near'; name them: --ood NAME=PATH"),
    ("--ood x=", "x=: no such file or folder"),
    ("--train missing", "missing: no such file or folder"),
    ("--calibration missing", "missing: no such file or folder"),
    ("--ood x=FAR@val", "split: "),
    ("--ood FAR@val/x", "no such file or folder"),
    ("--out s.CSV", "output folder s.CSV: expected a folder, which the files are written into"),
    ("--out /dev/null/x", "output folder /dev/null/x: expected a folder that can be written"),
    ("--text-features missing.npz", "missing.npz: no such file"),
    ("--model nope", "no model is called 'nope'"),
    ("--model ViT-B-16/openai", "weights could not be reached"),
    ("--model none", "--model none: expected the features of the classes"),
    ("--checkpoint weights.pt", "has no meaning for fastood-tiny"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[w for w, _ in REFUSED])
def test_eval_refuses(fastood, base, photos, words, message, tmp_path):
    places = {"ID": photos.id, "FAR": photos.far, "NEAR": photos.near}
    given = words.split()
    for key, place in places.items():
        given = [
            w.replace(key, str(place)) if re.split("[=@]", w)[-1 - ("@" in w)] == key else w
            for w in given
        ]
    if "--class-match" in words:
        given += ["--classes", str(tmp_path / "two.txt")]
    done = fastood(*base, *given)
    assert done.code == 2 and message in done.error, done
    assert done.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval"], "Missing option '--id'"),
        (["eval", "--id", "x"], "Missing option '--ood'"),
        (["eval", "--id", "", "--ood", "x"], "for an image set, got nothing"),
        (["eval", "--nope"], "No such option: --nope"),
        (["nonsense"], "No such command 'nonsense'"),
        (["score"], "Missing argument"),
        (["score", "x", "--fail-on-ood"], "--fail-on-ood: a decision needs --threshold FILE"),
        (["score", "x", "--threshold", "missing.json"], "cannot read threshold missing.json"),
        (["score", "x", "--threshold", "."], "cannot read threshold"),
        (["calibrate", "--id", "x", "--tpr", "95"], "is it in percent?"),
        (["calibrate", "--id", "x", "--tpr", "1"], "tpr: expected a fraction in (0, 1)"),
        (["calibrate", "--id", "x", "--out", "."], "expected a file for the threshold"),
        (["calibrate", "--id", "x", "--score", "mcm,msp"], "a threshold is for one score"),
        (["calibrate", "--id", "x", "--out", "/dev/null/x/t.json"], "/dev/null/x"),
        (["cache", "info", "--cache", "/dev/null/x"], "cache folder /dev/null/x"),
        (["cache", "clear", "--older-than", "-1"], "older_than"),
        (["demo", "--out", "/dev/null/x"], "output folder /dev/null/x"),
    ],
)
def test_other_commands_refuse(fastood, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fastood(*words)
    assert done.code == 2 and message in done.error and done.out == ""
    assert list(tmp_path.iterdir()) == []


def features(file: Path, array: np.ndarray, **more) -> Path:
    np.savez(file, features=array, **more)
    return file


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, np.nan], [1, 2]], np.float32), "1 of 2 rows are zero or not finite"),
        (np.array([[1.0, 2], [np.inf, 2]], np.float32), "first: row 1"),
        (np.array([[0.0, 0], [1, 2]], np.float32), "first: row 0"),
        (np.array([[1, 2], [3, 4]]), "expected floating point numbers, got int64"),
        (np.zeros((0, 2), np.float32), "not empty"),
        (np.ones((2, 3), np.float32), "expected features of width 2 as the classes have, got 3"),
        (np.array([["a", "b"]], dtype=object), "pickled objects"),
    ],
)
def test_bad_features_are_refused(fastood, tmp_path, array, message):
    good = features(tmp_path / "good.npz", np.eye(2, dtype=np.float32))
    bad = features(tmp_path / "bad.npz", array)
    done = fastood(
        "eval", "--model", "none", "-q", "--id", good, "--ood", bad, "--text-features", good,
        "--score", "mcm", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 2 and message in done.error


def test_features_alone_do_not_take_images_or_patch_scores(fastood, photos, tmp_path):
    good = features(tmp_path / "good.npz", np.eye(2, dtype=np.float32))
    words = ["eval", "--model", "none", "-q", "--text-features", good, "--out", tmp_path / "out"]
    images = fastood(*words, "--id", good, "--ood", photos.near)
    assert images.code == 2 and "near: images need a model" in images.error
    patches = fastood(*words, "--id", good, "--ood", f"o={good}", "--score", "gl_mcm")
    assert patches.code == 2 and "patch scores need an array 'local'" in patches.error


def test_text_features_of_another_width_than_the_model(fastood, base, tmp_path):
    text = features(tmp_path / "text.npz", np.eye(5, dtype=np.float32))
    done = fastood(*base, "--text-features", text)
    assert done.code == 2 and "text: expected class features of width" in done.error


def test_an_unexpected_exception_is_one_line_and_code_1(fastood, monkeypatch, tmp_path):
    import fastood.models as package

    def broken(**options):
        raise RuntimeError("something\nodd\x1b[31m")

    monkeypatch.setattr(package, "list_models", broken)
    done = fastood("models")
    assert done.code == 1
    assert "unexpected RuntimeError: something odd\\x1b[31m" in done.error
    assert "FASTOOD_DEBUG=1" in done.error
    monkeypatch.setenv("FASTOOD_DEBUG", "1")
    with pytest.raises(RuntimeError, match="something"):
        fastood("models")


def test_ctrl_c_is_130_with_the_way_on(fastood, monkeypatch):
    import fastood.models as package

    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "list_models", interrupted)
    done = fastood("models")
    assert done.code == 130 and "the same command continues from there" in done.error


def test_warning_filters_are_left_alone(fastood):
    import warnings

    before = (list(warnings.filters), warnings.showwarning)
    fastood("models", "tiny")
    fastood("eval", "--nope")
    assert (list(warnings.filters), warnings.showwarning) == before
