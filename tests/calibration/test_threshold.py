"""What a threshold refuses, and that a file is read exactly or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch

from fastood.calibration import Threshold, calibrate
from fastood.calibration.store import _digest
from fastood.errors import DataError
from fastood.scores.result import ScoreKey, Scores

PARTS = {"score": "mcm", "options": {"tau": 1.0, "c": 2}, "model": "m1", "prompts": "p1"}
NEW = np.array([0.5, 1.0, 7.0])


def scores(values=NEW, higher="id", **changes):
    return Scores(np.asarray(values), higher, key=ScoreKey(**{**PARTS, **changes}))


@pytest.fixture
def threshold():
    return calibrate(scores(np.arange(40.0)))


def test_same_origin_is_decided(threshold):
    assert threshold.is_ood(scores()).tolist() == [True, False, False]
    assert threshold.is_ood(scores([])).shape == (0,)
    assert threshold.is_ood(scores(options={"tau": 1, "c": 2.0})).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": "msp"}, "score 'mcm' against 'msp'"),
        ({"options": {"tau": 0.01, "c": 2}}, "option tau 1.0 against 0.01"),
        ({"options": {"tau": 1.0}}, "option c 2 against 'unset'"),
        ({"model": "m2"}, "model 'm1' against 'm2'"),
        ({"prompts": "p2"}, "prompts 'p1' against 'p2'"),
        ({"model": "m2", "prompts": "p2"}, "model 'm1' against 'm2'; prompts 'p1' against 'p2'"),
        ({"higher": "ood"}, "higher means ood in these, but id for this threshold"),
    ],
)
def test_other_origin_is_refused_even_on_trust(threshold, changes, words):
    for trust in (False, True):
        with pytest.raises(ValueError, match=words):
            threshold.is_ood(scores(**changes), trust=trust)


def test_unknown_origin_needs_trust(threshold):
    unknown = [
        NEW,
        NEW.tolist(),
        torch.tensor(NEW),
        Scores(NEW),
        scores(model=None),
        scores(prompts=None),
    ]
    for given in unknown:
        with pytest.raises(ValueError, match=r"bare numbers|None"):
            threshold.is_ood(given)
        assert threshold.is_ood(given, trust=True).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="higher means ood"):
        threshold.is_ood(Scores(NEW, "ood"), trust=True)


def test_a_threshold_from_bare_numbers_takes_bare_numbers():
    found = calibrate(np.arange(40.0))
    assert found.key is None
    assert found.is_ood(NEW).tolist() == found.is_ood(Scores(NEW)).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="does not say what it is for"):
        found.is_ood(scores())
    assert found.is_ood(scores(), trust=True).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="higher means ood"):
        found.is_ood(Scores(NEW, "ood"))


@pytest.mark.parametrize("one", [8, 1.5, np.float32(1.5), np.array(1.5), torch.tensor(1.5)])
def test_one_number_is_one_decision(one):
    assert calibrate(np.arange(40.0) + 2).is_ood(one).tolist() == [float(one) < 2]


def test_comparison_does_not_round_the_threshold():
    third = 1 / 3  # float32(third) is larger, so not below; rounding the threshold would tie
    found = calibrate(np.array([third] + [1.0 + i for i in range(19)]))
    assert found.threshold == third
    below = np.nextafter(np.float32(third), np.float32(0))
    assert found.is_ood(np.array([below, np.float32(third)])).tolist() == [True, False]
    wide = calibrate(np.array([float(np.float32(third)) + 1e-12] + [1.0 + i for i in range(19)]))
    assert wide.is_ood(np.array([np.float32(third)])).tolist() == [True]


def test_bad_scores(threshold):
    for bad in ([math.nan], [math.inf]):
        with pytest.raises(ValueError, match="NaN or infinite, at rows 0"):
            threshold.is_ood(scores(bad))
    with pytest.raises(TypeError, match="booleans"):
        threshold.is_ood([True], trust=True)
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        threshold.is_ood([[1.0]], trust=True)


@pytest.mark.filterwarnings("ignore:.*cannot support tpr")
@pytest.mark.parametrize(
    "make",
    [
        lambda: calibrate(scores(np.arange(40.0) / 3)),
        lambda: calibrate(np.arange(40.0) * -1e-300, higher="ood"),
        lambda: calibrate([1.0, 2.0]),
        lambda: calibrate([1.0, 2.0], higher="ood", rule="percentile", tpr="0.999"),
        lambda: calibrate(
            scores(
                np.arange(40.0),
                options={"reset": -math.inf, "list": (math.inf, "inf"), "deep": {"none": None}},
            ),
            source="Fotos äöü <b> \udcff",
        ),
    ],
)
def test_round_trip_is_exact(make, tmp_path):
    made = make()
    path = made.save(tmp_path / "t.json")
    assert Threshold.load(path) == made
    assert Threshold.load(str(path)).describe() == made.describe()
    content = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert content["kind"] == "fastood.threshold" and content["schema"] == 1
    assert json.loads(json.dumps(made.as_dict(), allow_nan=False))["tpr"] == made.tpr
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_loaded_threshold_still_refuses(threshold, tmp_path):
    loaded = Threshold.load(threshold.save(tmp_path / "t.json"))
    assert loaded.is_ood(scores()).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="model 'm1' against 'm2'"):
        loaded.is_ood(scores(model="m2"))


def resign(content):
    content.pop("digest", None)
    content["digest"] = _digest(content)
    return content


def test_every_edited_field_is_noticed(threshold, tmp_path):
    path = threshold.save(tmp_path / "t.json")
    original = json.loads(path.read_text())
    for name in original:
        content = {**original, name: "edited"}
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"digest|schema|no fastood threshold"):
            Threshold.load(path)
        del content[name]
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"missing fields|schema|no fastood threshold"):
            Threshold.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": "inf"}, "would reject every image"),
        ({"threshold": None}, "threshold: expected a number"),
        ({"threshold": True}, "threshold: expected a number"),
        ({"threshold": "nan"}, "threshold: expected a number"),
        ({"higher": "up"}, "higher: expected"),
        ({"tpr": 95}, "expected fractions in"),
        ({"tpr": "0.95"}, "tpr: expected a number"),
        ({"confidence": 1.0}, "expected fractions in"),
        ({"rule": "mean"}, "rule: expected one of"),
        ({"rule": 3}, "rule: expected text"),
        ({"n": 0}, "n: expected at least 1"),
        ({"n": 2.5}, "n: expected an integer"),
        ({"interval": [2.0, 1.0]}, "interval: expected low <= high"),
        ({"interval": [1.0]}, "interval: expected two numbers"),
        ({"acceptance": [0.5, 1.5]}, r"expected fractions in \[0, 1\]"),
        ({"score": 5}, "score: expected text or None"),
        ({"options": []}, "options: expected a mapping"),
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"schema": 2}, "expected schema 1, got 2; was it saved by another version"),
        ({"kind": "other"}, "is no fastood threshold"),
    ],
)
def test_nonsense_with_a_right_digest_is_refused(threshold, tmp_path, changes, words):
    path = threshold.save(tmp_path / "t.json")
    content = resign({**json.loads(path.read_text()), **changes})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        Threshold.load(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"threshold": 0.5}',
        b"\xff\xfe",
        b'{"kind": NaN}',
        b'{"kind": 1, "kind": 2}',
        b"[" * 100_000,
        b" " * 2_000_000,
    ],
)
def test_foreign_files(raw, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="is no fastood threshold"):
        Threshold.load(path)


def test_truncated_files(threshold, tmp_path):
    path = threshold.save(tmp_path / "t.json")
    raw = path.read_bytes().rstrip()
    for length in range(0, len(raw), 37):
        path.write_bytes(raw[:length])
        with pytest.raises(DataError, match="not valid JSON"):
            Threshold.load(path)


def test_places_that_cannot_be_used(threshold, tmp_path):
    with pytest.raises(DataError, match=r"cannot read threshold .*No such file"):
        Threshold.load(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read threshold"):
        Threshold.load(tmp_path)
    with pytest.raises(DataError, match=r"expected a file that can be written.*No such file"):
        threshold.save(tmp_path / "none" / "t.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected a file that can be written"):
        threshold.save(tmp_path / "file" / "t.json")
    with pytest.raises(DataError, match="expected a file that can be written"):
        threshold.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_concurrent_saves_never_show_a_part(threshold, tmp_path):
    path = tmp_path / "t.json"
    variants = [replace(threshold, source=str(i) * 5000) for i in range(8)]
    variants[0].save(path)

    def work(i):
        variants[i % 8].save(path)
        return Threshold.load(path) in variants

    with ThreadPool(8) as pool:
        assert all(pool.map(work, range(80)))
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
