"""``fastood demo``, ``models``, ``info`` and ``cache``; help; and real features from files."""

from __future__ import annotations

import numpy as np
import pytest

from fastood._version import __version__
from tests.cli.conftest import TINY


def test_demo_runs_the_whole_chain(fastood, tmp_path):
    done = fastood("demo", "--out", tmp_path / "demo", "--json", "-q")
    assert done.code == 0
    found = done.json
    assert found["id"]["images"] == 60 and len(found["ood"]) == 3
    assert {"mcm", "gl_mcm", "energy", "delta_energy"} <= set(found["scores"])
    assert "neg_label" not in found["scores"]
    assert any("NegLabel is left out" in note for note in found["notes"])
    assert found["calibration"]["name"] == "held-out clothing"
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
    again = fastood("demo", "--out", tmp_path / "demo", "-q")
    assert again.code == 0 and "ID accuracy" in again.out


def test_models(fastood):
    found = fastood("models", "--json").json
    assert {"name": "fastood-tiny", "source": "package", "cached": True} in found
    assert any(m["name"] == "ViT-B-16/openai" for m in found)
    plain = fastood("models", "TINY")
    assert plain.code == 0 and "fastood-tiny" in plain.out
    assert fastood("models", "no such thing", "--json").json == []
    assert all(m["cached"] for m in fastood("models", "--cached", "--json").json)


def test_info(fastood, monkeypatch):
    monkeypatch.setenv("FASTOOD_CHECK", "1")
    found = fastood("info", "--json").json
    assert found["environment"]["FASTOOD_CHECK"] == "1" and found["kernels"]["active"]
    assert found["versions"]["torch"] in fastood("info").out


def test_cache_info_and_clear(fastood, photos, tmp_path):
    where = ["--cache", tmp_path / "cache"]
    empty = fastood("cache", "info", *where, "--json").json
    assert empty["images"] == empty["chunks"] == 0
    fastood("score", photos.near, *TINY, "--score", "mcm", "--limit", 4, *where)
    full = fastood("cache", "info", *where, "--json").json
    assert full["images"] == 4 and full["models"]["fastood-tiny"]["images"] == 4
    assert "fastood-tiny: 4 images" in fastood("cache", "info", *where).out
    kept = fastood("cache", "clear", *where, "--older-than", 1, "--json").json
    assert kept == {"files": 0, "bytes": 0}
    cleared = fastood("cache", "clear", *where)
    assert cleared.code == 0 and "files deleted" in cleared.out
    assert fastood("cache", "info", *where, "--json").json["images"] == 0


@pytest.mark.parametrize("command", ["eval", "report", "score", "calibrate", "demo", "cache"])
def test_help_names_the_command(fastood, command):
    done = fastood(command, "--help")
    assert done.code == 0 and f"fastood {command}" in done.out and done.err == ""


def test_version(fastood):
    assert fastood("--version").out == f"fastood {__version__}\n"


def test_no_cache_leaves_no_cache(fastood, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    words = ["score", photos.near, *TINY, "--score", "mcm", "--limit", 2]
    assert fastood(*words, "--no-cache").code == 0 and not (tmp_path / "cache").exists()
    assert fastood(*words).code == 0 and (tmp_path / "cache").is_dir()


# in percent: AUROC, FPR95 with ID positive, AUPR with ID positive
MCM = {
    ("dtd", "test"): (85.305, 60.934, 91.063),
    ("oxford_flowers", "test"): (89.819, 50.183, 91.547),
    ("oxford_pets", "test"): (48.273, 96.784, 45.340),
    ("caltech101", "val"): (66.936, 82.838, 78.406),
}


@pytest.mark.data
@pytest.mark.parametrize("split", ["test", "val"])
def test_mcm_on_real_clip_features(fastood, data_root, tmp_path, split):
    folder = data_root / "features" / "vitb32"
    with np.load(folder / "text.npz") as archive:
        np.savez(tmp_path / "text.npz", features=archive["imagenet1k_features"])
    sets = [name for name, part in MCM if part == split]
    with np.load(folder / "imagenet_1shot_2shot.npz") as archive:
        keys = {k: archive[k] for k in ("features", "labels", "class_names")}
    keys["split"] = np.full(len(keys["labels"]), split)
    np.savez(tmp_path / "imagenet.npz", **keys)
    ood = [word for name in sets for word in ("--ood", f"{folder / name}.npz@{split}")]
    done = fastood(
        "eval", "--model", "none", "-q", "--text-features", tmp_path / "text.npz",
        "--id", f"{tmp_path / 'imagenet.npz'}@{split}", *ood, "--score", "mcm",
        "--bootstrap", 0, "--json", "--out", tmp_path / "out", "--allow-duplicates",
    )  # fmt: skip
    assert done.code == 0
    rows = {row["set"]: row for row in done.json["metrics"]}
    for name in sets:
        auroc, fpr, aupr = MCM[name, split]
        assert 100 * rows[name]["AUROC"] == pytest.approx(auroc, abs=5.1e-4)
        assert 100 * rows[name]["FPR95-ID"] == pytest.approx(fpr, abs=5.1e-4)
        assert 100 * rows[name]["AUPR-IN"] == pytest.approx(aupr, abs=5.1e-4)
    assert 100 * done.json["id"]["accuracy"]["value"] == pytest.approx(61.067, abs=5.1e-4)


def test_every_set_has_its_own_split(fastood, tmp_path):
    generator = np.random.default_rng(1)
    for name in ("text", "id", "ood"):
        extra = {"split": np.array(["a"] * 15 + ["b"] * 25)} if name == "id" else {}
        np.savez(tmp_path / f"{name}.npz", features=generator.normal(size=(40, 8)), **extra)

    def evaluate(id_set, ood_set):
        return fastood(
            "eval", "--model", "none", "-q", "--text-features", tmp_path / "text.npz", "--json",
            "--id", tmp_path / id_set, "--ood", f"far={tmp_path / ood_set}", "--score", "mcm",
            "--bootstrap", 0, "--out", tmp_path / "out",
        )  # fmt: skip

    done = evaluate("id.npz@b", "ood.npz")
    assert done.json["id"]["images"] == 25 and done.json["ood"][0]["images"] == 40
    assert done.json["ood"][0]["name"] == "far"
    assert "'c'" in evaluate("id.npz@c", "ood.npz").error
    assert "has no 'split' array" in evaluate("id.npz@a", "ood.npz@a").error
    assert "holds the results of another evaluation" in evaluate("id.npz", "ood.npz").error
    (tmp_path / "id.npz").rename(tmp_path / "id@b.npz")  # a path that exists is a path
    assert evaluate("id@b.npz", "ood.npz").error  # another evaluation again
