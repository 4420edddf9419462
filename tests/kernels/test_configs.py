"""The table of tile sizes: complete, reachable, and honest about what was timed."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch

from fastood.kernels import configs
from fastood.kernels.configs import Config, Entry, pick, splits_for
from fastood.kernels.precision import PRECISIONS

PRODUCTS = sorted({e.family for e in configs.entries()} - {"given"})  # these have no products


@pytest.fixture
def table(monkeypatch):
    """``pick`` as on a GPU, whatever runs the kernels here."""
    monkeypatch.setattr(configs, "INTERPRETED", False)
    configs._entry.cache_clear()
    yield configs.entries()
    configs._entry.cache_clear()


def groups() -> dict[tuple[str, str], list[Entry]]:
    found = defaultdict(list)
    for e in configs.entries():
        found[e.family, e.precision].append(e)
    return found


def test_the_file_holds_nothing_that_is_not_understood():
    read = json.loads(configs.TABLE.read_text(encoding="utf-8"))
    assert len(read) == len(configs.entries())
    for written, e in zip(read, configs.entries(), strict=True):
        assert set(written) == set(Entry._fields)
        assert Config(**written["config"]) == e.config


@pytest.mark.parametrize("family", PRODUCTS)
def test_every_family_has_every_precision(family):
    assert {p for f, p in groups() if f == family} == set(PRECISIONS)


def test_sizes_are_what_kernels_can_be_cut_into():
    for e in configs.entries():
        rows, columns, depth, warps, stages, splits, *_ = e.config
        for size in (rows, columns, depth, warps):
            assert size > 0 and size & (size - 1) == 0, e
        assert e.precision in PRECISIONS, e
        assert 1 <= warps <= 16 and 1 <= stages <= 8 and splits >= 0, e
        if e.family != "given":  # the smallest product of matrix units
            assert rows >= 16 and columns >= 16 and depth >= 16, e
        assert e.config.options == {"num_warps": warps, "num_stages": stages}


def test_what_was_never_timed_says_so():
    for e in configs.entries():
        assert e.timed is None or (isinstance(e.timed, str) and e.timed.strip()), e


def test_the_last_entry_of_each_precision_takes_anything():
    for of, found in groups().items():
        assert (found[-1].rows, found[-1].width) == (None, None), of


def test_every_entry_is_picked_for_some_shape(table):
    for e in table:
        rows = [e.rows] if e.rows is not None else [1 << n for n in range(25)]
        widths = [e.width] if e.width is not None else [64, 512, 768, 1024, 4096]
        picked = [pick(e.family, e.precision, rows=b, width=d) for b in rows for d in widths]
        assert any(config is e.config for config in picked), f"{e} is behind another"


def test_picking_is_by_limits_in_order(monkeypatch):
    def entry(rows, width, size):
        return Entry("rows", "fp16", rows, width, Config(size, 16, 16, 4, 2), None)

    table = (
        entry(512, 512, 16),
        entry(512, None, 32),
        entry(None, 768, 64),
        entry(None, None, 128),
    )
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "entries", lambda: table)
    configs._entry.cache_clear()
    try:
        for rows, width, size in [
            (1, 512, 16),
            (512, 64, 16),
            (512, 513, 32),
            (513, 512, 64),
            (10**6, 768, 64),
            (513, 769, 128),
            (0, 512, 16),
        ]:
            found = {pick("rows", "fp16", rows=rows, width=width).rows for _ in range(3)}
            assert found == {size}, (rows, width)
    finally:
        configs._entry.cache_clear()


def test_an_unknown_family_is_named(table):
    with pytest.raises(LookupError, match=r"configs.json has no entry for columns, fp16"):
        pick("columns", "fp16", rows=1, width=1)
    with pytest.raises(LookupError, match="rows, fp8"):
        pick("rows", "fp8", rows=1, width=1)


def test_interpreted_kernels_get_several_small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", True)
    for e in configs.entries():
        config = pick(e.family, e.precision, rows=70, width=80)
        assert config.rows <= 16 and config.columns <= 32 and config.splits == 2


class TestSplits:
    device = torch.device("cpu")

    @pytest.fixture(autouse=True)
    def processors(self, monkeypatch):
        monkeypatch.setattr(configs, "processors", lambda device: 132)

    def of(self, rows, columns, **sizes):
        config = Config(
            **{"rows": 64, "columns": 128, "depth": 64, "warps": 4, "stages": 4, **sizes}
        )
        return splits_for(config, rows, columns, self.device)

    def test_few_rows_share_their_classes_out_to_fill_the_gpu(self):
        assert self.of(1024, 1000) == 8
        assert self.of(1024, 1000, resident=2) == 8  # there are no more tiles
        assert self.of(1024, 11000) == 132 // 16
        assert self.of(1024, 11000, resident=2) == 264 // 16

    def test_many_rows_fill_it_alone(self):
        assert self.of(8448, 1000) == 1
        assert self.of(10**6, 1000) == 1

    def test_each_has_a_tile(self):
        assert self.of(1, 128) == 1
        assert self.of(1, 129) == 2
        assert self.of(1, 129, splits=8) == 2

    def test_the_table_may_say_how_many(self):
        assert self.of(10**6, 1000, splits=4) == 4

    def test_nothing_to_do(self):
        assert self.of(0, 1000) == 1
        assert self.of(5, 0) == 1
