"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastood.atomic import write_text
from fastood.errors import DataError


def test_a_full_disk_is_told_with_the_name_and_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "table.csv"
    write_text(target, "old")

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does: without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"table\.csv: cannot be written \(No space left"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
