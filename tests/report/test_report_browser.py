"""The page in a real browser: parsed by its rules, laid out, and drawn."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from fastood.report import write_report

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: set CHROMIUM to its executable"),
]


@pytest.fixture(scope="module")
def report(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_report(sample.results, sample.table, folder, open_image=sample.open_image)


def browse(tmp_path, report, *options):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        *options,
        report.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_parts_are_in_the_dom(report, tmp_path):
    dom = browse(tmp_path, report, "--dump-dom").stdout
    for part in ("summary", "metrics", "overall", "by-set", "distributions", "gallery"):
        assert f'id="{part}"' in dom
    for part in ("accuracy", "thresholds", "provenance", "skipped", "glossary"):
        assert f'id="{part}"' in dom
    assert dom.count('<svg class="chart hist"') == 8
    assert dom.count('<svg class="chart roc"') == 2
    assert dom.count('<svg class="chart range"') == 20
    assert dom.count('<div class="frame">') == 36
    assert "<script" not in dom and "onerror" not in re.sub(r"&lt;.*?&gt;", "", dom)
    assert "FPR95, ID positive" in dom and "FPR95, OOD positive" in dom
    # Charts closed where they should be: nothing swallowed the footer.
    assert dom.rindex("</main>") < dom.index("<footer")


def test_it_draws(report, tmp_path):
    shot = tmp_path / "shot.png"
    browse(tmp_path, report, f"--screenshot={shot}", "--window-size=1280,4200")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (4200, 1280, 3)
    blue = (pixels[..., 2] - pixels[..., 0] > 90).mean()
    orange = (pixels[..., 0] - pixels[..., 2] > 90).mean()
    ink = (pixels.max(-1) < 60).mean()
    assert blue > 0.0005 and orange > 0.0005 and ink > 0.002
    # The style sheet applies: a page margin on both sides, free of anything but background.
    assert (pixels[700:, :40] == pixels[2000, 5]).all()
