"""``bench/gpu.sh`` with an interpreter of pretence: order, limits, resuming, and what it says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"

PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
-c*) exit 0 ;;
*"-m bench.gpu.facts"*) echo "gpu pretended" ;;
*"-m pytest"*) echo "t.py::a PASSED"; [[ "$*" == *$FAILING* ]] && { echo "t.py::b FAILED"; exit 1; }
    exit 5 ;;
*"-m bench.gpu.small"*) echo "ran delta_energy" ;;
*' --summary'*) echo "the summary" ;;
*' --warm'*) exit 0 ;;
*' --resume'*) exit 0 ;;
*) [[ "$HANGS" == 1 ]] && sleep 60; exit 75 ;;
esac
"""
CHECKER = """#!/bin/bash
[[ "$*" == *racecheck* ]] && { echo "Error: Device not supported"; exit 1; }
"$PYTHON" -m bench.gpu.small
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def script(tmp_path):
    if shutil.which("timeout") is None:
        pytest.skip("no timeout command")
    for name, text in (("python", PYTHON), ("compute-sanitizer", CHECKER)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def run(**variables: str) -> tuple[int, str, str]:
        done = subprocess.run(
            ["bash", SCRIPT],
            env={
                "PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin",
                "HOME": str(tmp_path),
                "PYTHON": str(tmp_path / "python"),
                "OUT": str(tmp_path / "out"),
                "CALLS": str(tmp_path / "calls"),
                "FAILING": "nothing-fails",
                "HANGS": "0",
                **variables,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, (tmp_path / "calls").read_text(encoding="utf-8")

    return run


def test_all_stages_run_and_a_broken_device_is_left_behind(script, tmp_path):
    status, said, calls = script()
    assert status == 0, said
    assert said.rstrip().endswith("== OK")
    places = [
        calls.rindex(x) if x == "gpu.small" else calls.index(x)
        for x in ("gpu.facts", "--warm 0/6", "-m pytest", "gpu.small", "--resume")
    ]
    assert places == sorted(places)
    assert "the summary" in said and "ERROR SUMMARY: 0 errors" in said
    assert "left out" in said  # racecheck, which the pretended driver refuses
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_failing_test_does_not_stop_the_benchmark(script):
    status, said, calls = script(FAILING="test_rows.py")
    assert status == 1
    assert "1 failed" in said and "NOT OK: tests" in said
    assert "--resume" in calls and "the summary" in said


def test_what_hangs_is_stopped_and_the_summary_still_comes(script):
    status, said, _ = script(HANGS="1", LIMIT_S="24")
    assert status == 1
    assert "benchmark: stopped after" in said and "the summary" in said
