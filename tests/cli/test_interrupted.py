"""Killed or interrupted runs: the cache stays usable and the results are the same ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.cli.conftest import strict_json, varied_photos

TOTAL = 160


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varied")
    varied_photos(folder / "clothes", TOTAL)
    varied_photos(folder / "other", 30)
    return folder


def command(pictures: Path, out: Path, cache: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fastood", "eval", "--model", "fastood-tiny",
        "--id", str(pictures / "clothes"), "--ood", f"other={pictures / 'other'}",
        "--score", "mcm", "--score", "gl_mcm", "--batch-size", "4", "--workers", "1",
        "--bootstrap", "100", "--out", str(out), "--cache", str(cache), *more,
    ]  # fmt: skip


def chunks(cache: Path) -> int:
    return len(list(cache.glob("chunks/*/*.safetensors")))


def stopped(words: list[str], cache: Path, sign: int) -> tuple[int, str]:
    """Start the command, send the signal once some chunks are there; code and stderr."""
    # a pause at every batch, so that the signal reliably falls in the middle of the encoding
    # (and a test suite started in the background would hand down an ignored SIGINT)
    slow = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fastood.models.openclip import OpenClipEncoder as E; "
        "real = E.encode_image; "
        "E.encode_image = lambda *a, **k: (time.sleep(0.03), real(*a, **k))[1]; "
        "from fastood.cli import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 300
        while chunks(cache) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sign)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err.decode()


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(pictures, base / "out", base / "cache", "-q"), check=True)
    return base / "out"


def results_of(folder: Path) -> dict:
    return strict_json((folder / "results.json").read_text("utf-8"))


@pytest.mark.slow
def test_kill_9_and_again_gives_the_same_and_encodes_only_the_rest(pictures, undisturbed, tmp_path):
    words = command(pictures, tmp_path / "out", tmp_path / "cache")
    code, _ = stopped(words, tmp_path / "cache", signal.SIGKILL)
    assert code == -signal.SIGKILL
    kept = chunks(tmp_path / "cache")
    assert 5 <= kept < TOTAL // 8 and not (tmp_path / "out").exists()
    done = subprocess.run([*words, "--json"], capture_output=True, check=True)
    results, expected = strict_json(done.stdout.decode()), results_of(undisturbed)
    assert 0 < results["id"]["encoded"] <= TOTAL - 8 * kept  # eight images make a chunk here
    assert expected["id"]["encoded"] == TOTAL
    for key in ("metrics", "thresholds", "scores", "prompts"):
        if key == "thresholds":
            for label, entry in expected[key].items():
                assert results[key][label]["threshold"] == entry["threshold"]
        else:
            assert results[key] == expected[key]
    again = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet")
    assert again.equals(pyarrow.parquet.read_table(undisturbed / "scores.parquet"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_is_130_with_a_hint_and_the_next_run_continues(pictures, undisturbed, tmp_path):
    words = command(pictures, tmp_path / "out", tmp_path / "cache")
    code, err = stopped(words, tmp_path / "cache", signal.SIGINT)
    assert code == 130, err
    assert "error: interrupted; what was computed is kept, the same command continues" in err
    assert "Traceback" not in err and not (tmp_path / "out").exists()
    done = subprocess.run([*words, "--json", "-q"], capture_output=True, check=True)
    results = strict_json(done.stdout.decode())
    assert 0 < results["id"]["encoded"] < TOTAL
    assert results["metrics"] == results_of(undisturbed)["metrics"]
    again = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet")
    assert again.equals(pyarrow.parquet.read_table(undisturbed / "scores.parquet"))


def test_progress_and_notes_stay_off_stdout_in_a_pipe(pictures, tmp_path):
    words = command(pictures, tmp_path / "out", tmp_path / "cache", "--json", "--limit", "10")
    done = subprocess.run(words, capture_output=True, check=True)
    assert strict_json(done.stdout.decode())["id"]["images"] == 10
    assert b"clothes" in done.stderr and b"note: " in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m fastood --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True)
    assert done.returncode == 0 and done.stderr == b""


def test_python_m_fastood_exits_with_the_code():
    done = subprocess.run(
        [sys.executable, "-m", "fastood", "eval", "--id", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: Missing option '--ood'. (see fastood eval --help)\n"
