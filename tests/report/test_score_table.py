import csv
import os

import numpy as np
import pytest

from fastood.errors import DataError
from fastood.report import ScoreTable

BASE = {"set": ["a", "a", "b"], "role": ["id", "id", "ood"], "path": ["1.jpg", "2.jpg", "3.jpg"]}


def same(left, right):
    for name in ("set", "role", "path", "label", "class_name", "predicted"):
        assert getattr(left, name).tolist() == getattr(right, name).tolist(), name
    assert list(left.scores) == list(right.scores)
    for name, values in left.scores.items():
        assert values.dtype == right.scores[name].dtype
        np.testing.assert_array_equal(values, right.scores[name])


def test_round_trip_through_parquet(sample, tmp_path):
    files = sample.table.save(tmp_path / "new" / "folder")
    assert [f.name for f in files] == ["scores.parquet", "scores.csv"]
    same(sample.table, ScoreTable.load(tmp_path / "new" / "folder"))
    same(sample.table, ScoreTable.load(files[0]))


def test_csv_is_lossless_and_quotes_awkward_names(sample, tmp_path):
    _, file = sample.table.save(tmp_path)
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [r["path"] for r in rows] == sample.table.path.tolist()
    assert [r["class_name"] or None for r in rows] == sample.table.class_name.tolist()
    for name, values in sample.table.scores.items():
        read = np.array([r[name] for r in rows], dtype=np.float32)
        np.testing.assert_array_equal(read, values)


def test_csv_floats_are_the_shortest_that_read_back(tmp_path):
    values = np.array([0.1, 1 / 3, 1e-30], dtype=np.float32)
    doubles = np.array([0.1, 1 / 3, 1e-300])
    ScoreTable.from_columns(**BASE, scores={"f": values, "d": doubles}).save(tmp_path)
    with (tmp_path / "scores.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert rows[0]["f"] == "0.1" and rows[1]["f"] == "0.33333334"
    assert [float(r["d"]) for r in rows] == doubles.tolist()


def test_a_file_name_that_is_not_utf8_survives(tmp_path):
    paths = [os.fsdecode(b"caf\xe9.jpg"), "=1+1.jpg", "3.jpg"]
    table = ScoreTable.from_columns(**{**BASE, "path": paths}, scores={"s": [1.0, 2.0, 3.0]})
    table.save(tmp_path)
    assert ScoreTable.load(tmp_path).path.tolist() == paths
    raw = (tmp_path / "scores.csv").read_bytes()
    assert b"caf\xe9.jpg" in raw and b"path_bytes" not in raw
    assert b"=1+1.jpg" in raw  # data, not prefixed


def test_rows_are_found_by_role_and_set():
    table = ScoreTable.from_columns(**BASE, scores={"s": [1.0, 2.0, 3.0]}, label=[0, None, None])
    assert table.values("s", role="id").tolist() == [1, 2]
    assert table.values("s", role="ood", set="b").tolist() == [3]
    assert table.values("s", role="ood", set="a").tolist() == []
    assert table.set_names() == ["a", "b"] and table.set_names("ood") == ["b"]
    assert table.label.tolist() == [0, None, None]
    with pytest.raises(ValueError, match=r"score: expected one of \['s'\], got 'x'"):
        table.values("x", role="id")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"role": ["id", "id", "test"]}, ValueError, "role: expected .* got 'test'"),
        ({"set": ["a"]}, ValueError, r"set: expected one entry per image \(3 in path\), got 1"),
        ({"path": ["1", 2, "3"]}, TypeError, "path: expected text in row 1, got int"),
        ({"label": [1, 0.5, None]}, TypeError, "label: expected int or None in row 1, got float"),
        ({"scores": {"path": [1.0, 2.0, 3.0]}}, ValueError, "'path' is another column"),
        ({"scores": {"s": [1.0, 2.0]}}, ValueError, r"scores\['s'\]: expected one entry"),
        ({"scores": {"s": [[1.0]] * 3}}, ValueError, r"one number per image \(n,\), got \(3, 1\)"),
        ({"scores": {"s": ["a", "b", "c"]}}, TypeError, r"scores\['s'\]: expected numbers"),
        ({"scores": {"": [1.0, 2.0, 3.0]}}, ValueError, "expected a name for every score"),
    ],
)
def test_wrong_columns_are_named(change, error, message):
    columns = {**BASE, "scores": {"s": [1.0, 2.0, 3.0]}, **change}
    with pytest.raises(error, match=message):
        ScoreTable.from_columns(**columns)


def test_loading_something_else_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no such file; expected the folder"):
        ScoreTable.load(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        ScoreTable.load(tmp_path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=r"expected columns set, role, .*; set is missing"):
        ScoreTable.load(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    import pyarrow.parquet

    table = ScoreTable.from_columns(**BASE, scores={"s": [1.0, 2.0, 3.0]})
    table.save(tmp_path)
    before = (tmp_path / "scores.parquet").read_bytes()

    def fail(table, where, **options):
        where.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pyarrow.parquet, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        table.save(tmp_path)
    assert (tmp_path / "scores.parquet").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.csv", "scores.parquet"]


def test_an_empty_table_round_trips(tmp_path):
    table = ScoreTable.from_columns(set=[], role=[], path=[], scores={"s": np.zeros(0, "f4")})
    table.save(tmp_path)
    same(table, ScoreTable.load(tmp_path))
