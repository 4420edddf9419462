"""The table of tile sizes: what is tried, and what is written."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu import tune
from bench.gpu.clock import Clock
from fastood.kernels import configs
from fastood.kernels.configs import Config, Entry
from fastood.kernels.precision import PRECISIONS
from tests.bench import fake_gpu


def test_the_committed_table_is_in_the_form_that_is_written():
    assert tune.text_of(configs.entries()) == configs.TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_family_of_the_table_can_be_tuned(precision):
    found = tune.subjects(list(tune._PLACES), [precision], [512, 768])
    families = {e.family for e in configs.entries()} - {"given"}
    assert {s.family for s in found} == families
    for subject in found:
        now = tune.current(subject)
        tried = tune.candidates(now, precision)
        assert tried[0] == now and len(set(tried)) == len(tried) > 5
        assert subject.case.shape.d == subject.width


def test_candidates_fit_the_chip():
    now = Config(64, 128, 64, 4, 4, 0, 2)
    for c in tune.candidates(now, "fp16", most=1000)[1:]:
        assert c.stages * (c.rows + c.columns) * c.depth * 2 * c.resident <= tune.SHARED_BYTES


def test_a_candidate_is_used_for_its_family_alone(monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", False)
    table = configs.pick("grouped", "fp16", rows=4096, width=512)
    other = table._replace(warps=16)
    with tune.using("rows", other):
        assert configs.pick("rows", "fp16", rows=1024, width=512) == other
        assert configs.pick("grouped", "fp16", rows=4096, width=512) == table
    assert configs.pick("rows", "fp16", rows=1024, width=512) != other


def test_the_fastest_that_is_right_is_taken(monkeypatch):
    device, target = fake_gpu.install(monkeypatch)
    subject = tune.subjects(["rows"], ["fp16"], [512])[0]
    tried = tune.candidates(tune.current(subject), "fp16", most=8)

    def call(_: int) -> torch.Tensor:
        config = configs._entry("rows", "fp16", 1024, 512)
        place = tried.index(config)
        if place == 1:
            raise RuntimeError("out of resource: shared memory")
        # the last but one is faster than all, and wrong
        device.work(1e-6 * (10 - place if place != 6 else 1))
        return torch.ones(3) if place != 6 else torch.zeros(3)

    monkeypatch.setattr(tune, "call_of", lambda *_: (call, 3))
    assert tune.tune(subject, Clock(target), 0.2, 8) == tried[7]


def test_what_was_found_goes_before_what_is_wider(monkeypatch, tmp_path):
    old, new = Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 4)
    table = [
        Entry("rows", "fp16", 2048, None, old, None),
        Entry("rows", "fp16", None, None, old, None),
        Entry("ebm", "fp16", None, None, old, None),
    ]
    (small, large) = tune.subjects(["rows"], ["fp16"], [512])
    found = tune.merged(table, {small: new, large: new}, "NVIDIA H200")
    assert [(e.family, e.rows, e.width, e.timed) for e in found] == [
        ("rows", 2048, 512, "NVIDIA H200"),
        ("rows", 2048, None, None),
        ("rows", None, 512, "NVIDIA H200"),
        ("rows", None, None, None),
        ("ebm", None, None, None),
    ]
    path = tmp_path / "configs.json"
    path.write_text(tune.text_of(found), encoding="utf-8")
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 5
    monkeypatch.setattr(configs, "TABLE", path)
    configs.entries.cache_clear()
    try:
        assert list(configs.entries()) == found
    finally:
        monkeypatch.undo()
        configs.entries.cache_clear()
