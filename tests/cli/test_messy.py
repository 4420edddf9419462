"""Files as they really are: damaged, mislabelled, of every mode, with names from hell."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fastood.demo import ID, photo_folder
from fastood.pipeline import Evaluation
from tests.cli.conftest import TINY

SKIPPED = {"truncated.jpg", "words.jpg", "zero.png", "<img src=x onerror=alert(2)>.jpg"}
USED = {
    "grey.png", "rgba.png", "cmyk.jpg", "deep.png", "moving.gif", "ünï 图 .jpg",
    "<script>alert(1)<.jpg", "&amp;.png", "=1+1.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "<b>messy & co"
    folder.mkdir()
    source = sorted(photo_folder(ID).rglob("*.jpg"))[0].read_bytes()
    image = Image.open(io.BytesIO(source)).convert("RGB")
    (folder / "truncated.jpg").write_bytes(source[: len(source) // 2])
    (folder / "words.jpg").write_text("this is no picture")
    (folder / "zero.png").write_bytes(b"")
    (folder / "<img src=x onerror=alert(2)>.jpg").write_text("<script>alert(3)</script>")
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    deep = (np.asarray(image.convert("L"), dtype=np.uint16) << 8) + 17
    Image.fromarray(deep).save(folder / "deep.png")
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(90)])
    for name in ("ünï 图 .jpg", "<script>alert(1)<.jpg", "&amp;.png", "=1+1.png"):
        image.save(folder / name)
    return folder


def evaluate(fastood, photos, messy, out, *more):
    return fastood(
        "eval", *TINY, "--id", photos.id, "--ood", messy, "--score", "mcm", "--bootstrap", 0,
        "--out", out, *more,
    )  # fmt: skip


def test_a_messy_folder_is_scored_and_what_is_left_out_is_shown(fastood, photos, messy, tmp_path):
    done = evaluate(fastood, photos, messy, tmp_path)
    assert done.code == 0
    assert "4 files could not be read and were left out; the report lists them" in done.err
    found = Evaluation.load(tmp_path)
    entry = found.results["ood"][0]
    assert entry["name"] == "<b>messy & co" and entry["images"] == len(USED)
    reasons = {s["path"]: s["reason"] for s in entry["skipped"]}
    assert set(reasons) == SKIPPED
    assert "truncated" in reasons["truncated.jpg"] and "empty" in reasons["zero.png"]
    assert "text" in reasons["words.jpg"]
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    rows = {r["path"]: r["mcm"] for r in table if r["role"] == "ood"}
    assert set(rows) == USED and np.isfinite(list(rows.values())).all()
    assert rows["rgba.png"] == pytest.approx(rows["&amp;.png"], rel=1e-5)
    html = (tmp_path / "report.html").read_text("utf-8")
    for name in SKIPPED:
        assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "<script" not in html and "<b>messy" not in html and "onerror=alert(2)>" not in html
    assert "4 skipped files" in html
    assert found.open_image("<b>messy & co", "=1+1.png")[:4] == b"\x89PNG"


def test_screening_the_same_folder(fastood, messy, classes, tmp_path):
    done = fastood(
        "score", messy, *TINY, "--classes", classes, "--score", "mcm", "--json", "--out", tmp_path
    )
    assert {row["path"] for row in done.json["images"]} == USED
    assert {s["path"] for s in done.json["skipped"]} == SKIPPED
    plain = fastood("score", messy, *TINY, "--classes", classes, "--score", "mcm")
    assert plain.err.count("left out:") == 4 and "<script>alert(1)<.jpg" in plain.out


def test_strict_fails_with_code_2_and_names_the_files(fastood, photos, messy, tmp_path):
    done = evaluate(fastood, photos, messy, tmp_path / "out", "--strict")
    assert done.code == 2 and "truncated.jpg" in done.error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_nothing_but_rubbish(fastood, photos, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(8):
        (tmp_path / "bad" / f"{i}.jpg").write_text("x")
    done = evaluate(fastood, photos, tmp_path / "bad", tmp_path / "out")
    assert done.code == 2 and "bad: none of the 8 images can be used: 0.jpg (" in done.error


def test_names_that_are_not_utf8(fastood, photos, classes, tmp_path):
    source = sorted(photo_folder(ID).rglob("*.jpg"))[0].read_bytes()
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(folder)).mkdir()
        Path(os.fsdecode(folder + b"/\xff\xfe.jpg")).write_bytes(source)
        Path(os.fsdecode(folder + b"/\xe9.jpg")).write_text("no picture")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    place, out = os.fsdecode(folder), os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9")
    done = evaluate(fastood, photos, place, out, "--json")
    assert done.code == 0
    assert [s["path"] for s in done.json["ood"][0]["skipped"]] == ["\\xe9.jpg"]
    assert "caf\\udce9" in done.json["command"]
    assert Evaluation.load(out).table.path[-1] == "\\xff\\xfe.jpg"
    screened = fastood("score", place, *TINY, "--classes", classes, "--score", "mcm", "--out", out)
    assert screened.code == 0 and "\\xff\\xfe.jpg" in screened.out


def test_a_damaged_cache_chunk_is_computed_again(fastood, photos, tmp_path):
    cache = tmp_path / "cache"
    words = ["--cache", cache, "--json"]
    first = evaluate(fastood, photos, photos.near, tmp_path / "out", *words)
    for chunk in cache.glob("chunks/*/*.safetensors"):
        chunk.write_bytes(chunk.read_bytes()[:-100])
    second = evaluate(fastood, photos, photos.near, tmp_path / "out", *words)
    assert second.code == 0 and "is damaged" in second.err
    assert second.json["metrics"] == first.json["metrics"]
    assert second.json["id"]["encoded"] == first.json["id"]["encoded"] > 0
