"""``fastood search setar`` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastood.cli.app import run
from fastood.demo import photo_folder

TINY = ["--model", "fastood-tiny", "--quiet"]


@pytest.fixture(scope="module")
def photos() -> Path:
    return photo_folder("id")


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("search") / "found"
    code = run(["search", "setar", "--id", str(photos), "--out", str(out), *TINY, "--order", "text",
                "--ratios", "0,0.2,0.4"])  # fmt: skip
    assert code == 0
    return out


def failing(capsys, *words: str) -> str:
    assert run(["search", "setar", *words, *TINY]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_search_writes_recipe_table_and_report(found):
    assert sorted(p.name for p in found.iterdir()) == [
        "candidates.csv", "recipe.json", "report.html", "search.json",
    ]  # fmt: skip
    assert len((found / "candidates.csv").read_text().splitlines()) == 1 + 1 + 3 * 2


def test_the_recipe_is_used_by_eval_and_train(found, photos, tmp_path, capsys):
    recipe = str(found / "recipe.json")
    assert run(["eval", *TINY, "--adapt", recipe, "--id", str(photos), "--ood",
                str(photo_folder("far-omniglot")), "--score", "mcm", "--out", str(tmp_path / "e"),
                "--no-cache"]) == 0  # fmt: skip
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["model"]["name"] == "fastood-tiny + setar"
    code = run(["train", f"setar-ft:picks={recipe}", *TINY, "--id", str(photos), "--shots", "1",
                "--epochs", "1", "--out", str(tmp_path / "t")])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "t" / "adaptation.safetensors").exists()


def test_the_same_command_again_computes_nothing(found, photos, monkeypatch, capsys):
    from fastood.setar.evaluate import Evaluator

    monkeypatch.setattr(Evaluator, "__init__", None)
    words = ["search", "setar", "--id", str(photos), "--out", str(found), *TINY, "--order", "text"]
    assert run([*words, "--ratios", "0,0.2,0.4", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [p[:3] for p in content["picks"]] == [["text", "W_up", i] for i in (2, 1, 0)]
    assert run([*words, "--ratios", "0,0.3"]) == 2
    assert "holds another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "0,1.5"], "share in [0, 1), got 1.5"),
        (["--ratios", "0,5,0.2"], "got both"),
        (["--ratios", "500"], "ratios: image.5.up (768, 192): drop: expected 0 <= directions <="),
        (["--kinds", "mlp"], "kinds: expected some of q, k, v"),
        (["--layers", "3-1"], "expected a range like 6-11"),
        (["--layers", "99"], "layers: expected numbers in"),
        (["--order", "sideways"], "order: expected one of image_text"),
        (["--top-k", "10"], "top_k"),
        (["--memory", "much"], "--memory: expected a size like 8GB"),
        (["--shots", "³"], "--shots: expected a number of images"),
        (["--shots", "none"], "--shots: expected a number of images"),
        (["--part", "middle"], "part: expected one of minor"),
        (["--partition", "none"], "partition: expected one of reference, global"),
        (["--metric", "auroc"], "score"),
        (["--id-set", "imagenet"], "imagenet has 1000 classes, got 5"),
        (["--shots", "5000"], "fewer than 5000 images"),
    ],
)
def test_wrong_words_are_refused(photos, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert message in failing(capsys, "--id", str(photos), "--out", str(out), *words)
    assert not out.exists()


def test_templates_come_as_sets_by_name_or_as_they_are(photos, tmp_path):
    from fastood.data.prompts import TEMPLATES

    words = ["search", "setar", "--id", str(photos), *TINY, "--order", "text", "--ratios", "0.2"]
    for given, expected in (
        (["coop"], TEMPLATES["coop"]),
        (["a {}.", "one {}"], ("a {}.", "one {}")),
    ):
        out = tmp_path / given[0][:4]
        options = [word for text in given for word in ("--template", text)]
        assert run([*words, *options, "--layers", "-1", "--out", str(out)]) == 0
        recipe = json.loads((out / "recipe.json").read_text())
        assert recipe["search"]["templates"] == list(expected)


def test_shares_are_printed_as_they_are(photos, tmp_path, capsys):
    words = ["search", "setar", "--id", str(photos), *TINY, "--order", "text", "--layers", "-1"]
    assert run([*words, "--ratios", "0.255", "--out", str(tmp_path / "out")]) == 0
    assert "25.5%" in capsys.readouterr().out


def test_images_without_classes_and_files_as_folders(tmp_path, capsys):
    assert "expected labelled images" in failing(capsys, "--id", str(photo_folder("far-omniglot")))
    file = tmp_path / "file"
    file.touch()
    assert "expected a folder" in failing(capsys, "--id", str(file), "--out", str(file))
    assert "expected a folder" in failing(capsys, "--id", str(file), "--out", "recipe.json")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a SIGINT")
def test_an_interrupted_search_goes_on(photos, tmp_path):
    """Killed by Ctrl-C between candidates, the same command ends like one that never stopped."""
    words = [sys.executable, "-m", "fastood", "search", "setar", *TINY, "--id", str(photos)]
    words += ["--out", str(tmp_path / "out"), "--ratios", "0,0.1,0.3", "--shots", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    table = tmp_path / "out" / "candidates.csv"
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while first.poll() is None and time.monotonic() < limit:
        if table.exists() and len(table.read_text().splitlines()) > 2:
            first.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130, error
    assert "interrupted" in error
    before = table.read_text()
    again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    after = table.read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 1 + 1 + 9 * 2
