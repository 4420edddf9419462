"""What is written of a run, and how one goes on behind a case that broke the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu.cases import CASES
from bench.gpu.page import page, summary, template
from bench.gpu.store import Store
from tests.bench.fake_gpu import why_not_interpreted

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}

needs_triton = pytest.mark.skipif(
    why_not_interpreted() is not None, reason=f"{why_not_interpreted()}"
)


def row(case: str, variant: str = "fastood", **more: object) -> dict[str, object]:
    found = {"case": case, "variant": variant, "role": "ours", "precision": "fp16"}
    times = {f"{k}_us": [3.25, 3.0, 3.5] for k in ("gpu", "wall", "latency")}
    return {**found, **times, "to": {}, "goals": [], **more}


def test_template_has_every_case_and_goal_and_no_measurement():
    text = template("NVIDIA H200")
    assert "Not measured yet" in text and "bench/gpu.sh" in text
    for case in CASES:
        assert f"| {case.name} |" in text
    goals = [line for line in text.splitlines() if "GPU time ÷ C" in line and line[0] == "|"]
    assert len(goals) == 8 and all(line.endswith("|  |  |") for line in goals)


def test_the_committed_page_knows_every_case():
    text = (ROOT / "bench" / "results" / "nvidia-h200.md").read_text(encoding="utf-8")
    missing = [case.name for case in CASES if case.name not in text]
    assert "Not measured yet" not in text or not missing


def test_page_says_what_was_met_missed_and_why_something_is_missing():
    goals = [
        {"metric": "C", "least": 2.0, "aim": 1.2, "value": 1.5},
        {"metric": "x published", "least": 15.0, "aim": None, "value": 9.0},
        {"metric": "launches", "least": 4.0, "aim": None, "value": None},
    ]
    text = page(
        FACTS,
        {"fp16_tflops": 790.0},
        [
            row("a", goals=goals, over_bare=[1.5, 1.4, 1.6], to={"eager": [0.1, 0.1, 0.1]}),
            row("a", "eager", to={"fastood": [10.0, 9.0, 11.0]}, captured=False),
            {"case": "b", "variant": "fastood", "role": "ours", "failed": "KernelError: a | b\nc"},
        ],
    )
    assert "| a | GPU time ÷ C | ≤ 2 | ≤ 1.2 | 1.5 | met, aim missed |" in text
    assert "| a | speed-up over published | ≥ 15 |  | 9 | missed |" in text
    assert "| a | launches | ≤ 4 |  |  |  |" in text
    assert "| 3.25 (3–3.5)* |" in text and "| 10.00 |" in text
    assert "KernelError: a / b c |" in text


def test_summary_fits_a_screen():
    rows = [row(case.name, goals=[]) for case in CASES]
    rows += [
        {"case": c.name, "variant": f"fastood {i}", "role": "ours", "failed": f"reason {i % 20}"}
        for i, c in enumerate(CASES)
    ]
    lines = summary(FACTS, rows, CASES[:3])
    assert len(lines) <= 60
    assert any("no time for 3 cases" in line for line in lines)


def test_results_survive_and_a_resumed_run_skips_what_was_begun(tmp_path):
    store = Store(tmp_path, "nvidia-h200", dict(FACTS))
    store.started += ["a", "b"]
    store.rows.append(row("a", max_rel_error=float("inf"), share_of_limit=0.123456789))
    store.save()
    json.loads(store.path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = Store.resumed(tmp_path, "nvidia-h200", dict(FACTS))
    assert again.started == ["a", "b"]
    assert again.rows[0]["share_of_limit"] == 0.12346 and again.rows[0]["max_rel_error"] is None
    assert Store.resumed(tmp_path, "another", {}).rows == []


def test_a_broken_device_is_recorded_and_asks_for_another_process(tmp_path, monkeypatch):
    def breaks(*_: object) -> None:
        raise command.Broken("illegal memory access")

    monkeypatch.setattr(command, "measure", breaks)
    monkeypatch.setattr(command, "measured", lambda *_: SimpleNamespace(record=dict))
    given = ["--dry-run", "--out", str(tmp_path), "--seconds", "5", "--only", "^mcm S1.*fp16"]
    assert command.main(given) == command.BROKEN
    found = json.loads((tmp_path / "no-gpu.json").read_text(encoding="utf-8"))
    assert "illegal memory access" in found["rows"][0]["failed"] and not found["finished"]
    began = []
    monkeypatch.setattr(command, "measure", lambda work, *_: began.append(work.case.name) or [])
    command.main([*given, "--resume"])
    assert began == ["mcm S1 1024x1000 D=768 fp16"]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu.sh does this on a GPU")
def test_dry_run_measures_every_kind_of_case(tmp_path, capsys):
    only = r"(delta_energy S1|neg_label).*D=512 fp16|low_rank 12x2048"
    given = ["--dry-run", "--out", str(tmp_path), "--only", only]
    command.main([*given, "--seconds", "300"])
    found = json.loads((tmp_path / "no-gpu.json").read_text(encoding="utf-8"))
    ours = {r["case"]: r for r in found["rows"] if r["variant"] == "fastood"}
    assert len(ours) == 3 and found["finished"]
    for r in ours.values():
        assert r["gpu_us"][0] > 0 and r["max_rel_error"] < 1e-2, r
    assert ours["neg_label S3 4096x11000 D=512 fp16"]["to"].keys() >= {"published", "eager fp16"}
    capsys.readouterr()
    assert command.main([*given, "--summary"]) == 0
    assert "delta_energy S1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_at_once():
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh"],
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout


def test_an_interpreter_without_torch_is_not_taken_for_a_missing_gpu(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh"],
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "cannot import torch" in done.stderr and not done.stdout
