"""Runs of the command line in this process, and one evaluation that many tests look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastood.cli.app import run
from fastood.demo import CALIBRATION, FAR_OOD, ID, NEAR_OOD, photo_folder

TINY = ("--model", "fastood-tiny", "-q")


def strict_json(text: str) -> Any:
    """One JSON document and nothing else; NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return strict_json(self.out)

    @property
    def error(self) -> str:
        """The one line a failed command prints."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of our own, no network, and no variable of whoever runs the tests."""
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FASTOOD_DEBUG", raising=False)


@pytest.fixture
def fastood(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """``fastood("eval", "--id", ...)``: code, stdout, stderr."""

    def call(*words: object) -> Finished:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return call


@dataclass(frozen=True)
class Photos:
    id: Path
    near: Path
    far: Path
    calibration: Path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """A few of the shipped photographs: six a class, so that a forward pass takes a moment."""
    base = tmp_path_factory.mktemp("photos")
    parts = {"id": ID, "near": NEAR_OOD, "calibration": CALIBRATION}
    for name, part in parts.items():
        for folder in sorted(photo_folder(part).iterdir()):
            if folder.is_dir():
                (base / name / folder.name).mkdir(parents=True)
                for file in sorted(folder.glob("*.jpg"))[:6]:
                    shutil.copy(file, base / name / folder.name)
    shutil.copytree(photo_folder(FAR_OOD[0]), base / "scikit")
    return Photos(base / "id", base / "near", base / "scikit", base / "calibration")


@pytest.fixture(scope="session")
def evaluated(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished evaluation with several scores; look, but do not touch."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    cache = tmp_path_factory.getbasetemp() / "cli-cache"
    words = [
        "eval", *TINY, "--cache", cache, "--out", out, "--bootstrap", 100,
        "--id", photos.id, "--ood", photos.near, "--ood", f"far & away={photos.far}",
        "--calibration", photos.calibration, "--score", "mcm", "--score", "gl_mcm",
        "--score", "sharp=delta_energy:tau=0.02,c=2",
    ]  # fmt: skip
    assert run([str(word) for word in words]) == 0
    return out


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    file = tmp_path / "classes.txt"
    file.write_text("dress\nlongsleeve\npants\nshoes\nt-shirt\n")
    return file


def varied_photos(folder: Path, count: int) -> None:
    """``count`` different PNG files in two class folders, made from the shipped photographs."""
    sources = sorted(photo_folder(ID).rglob("*.jpg"))
    pictures = [np.asarray(Image.open(f).convert("RGB").resize((64, 64))) for f in sources[:20]]
    for i in range(count):
        pixels = pictures[i % len(pictures)].copy()
        pixels[i % 64, :] = (i % 256, i // 256, 7)
        target = folder / ("dress" if i % 2 else "pants") / f"{i:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
