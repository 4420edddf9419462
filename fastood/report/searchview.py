"""What the page of a search shows, as numbers: candidates in order, best so far, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastood.setar.recipe import Pick
    from fastood.setar.run import Found
    from fastood.setar.table import Row

__all__ = ["KIND_NAMES", "METRIC_NAMES", "Bar", "Candidate", "SearchView", "Tower", "Visit"]

METRIC_NAMES = {
    "loss": "loss",
    "cross_entropy": "cross-entropy",
    "patches": "patch term",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr": "FPR95",
}
KIND_NAMES = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "attention output",
    "up": "MLP up",
    "down": "MLP down",
    "proj": "projection",
}
_TAIL = 0.1  # share of candidates that may lie beyond the axis, on the worse side


@dataclass(frozen=True)
class Candidate:
    """An evaluated candidate and where the search stood after it."""

    row: Row
    best: float
    """Best objective so far, this one included."""
    accepted: bool

    @property
    def tower(self) -> str:
        return self.row.matrix.partition(".")[0]


@dataclass(frozen=True)
class Visit:
    """What was decided about one matrix."""

    number: int
    pick: Pick
    tried: int
    of: int | None
    """Singular directions of the matrix, if the recipe knows its shape."""
    before: float
    after: float
    gain: float
    """How much better ``after`` is, >= 0."""


@dataclass(frozen=True)
class Bar:
    """One matrix in the chart of what is kept."""

    kind: str
    place: int
    """Block, from the input; the projection comes after the last."""
    name: str
    kept: float
    changed: bool
    address: str


@dataclass(frozen=True)
class Tower:
    name: str
    kinds: tuple[str, ...]
    places: tuple[str, ...]
    """Names of the blocks, from the input."""
    bars: tuple[Bar, ...]


class SearchView:
    """The numbers of a search, in the order of its decisions.

    Args:
        found: what a search returned. Its rows may be in any order: those of a visit are taken by
            matrix, as they first come up, and by number of directions.
    """

    def __init__(self, found: Found) -> None:
        from fastood.setar.objective import METRICS

        self.found, self.recipe = found, found.recipe
        self.search: dict[str, Any] = dict(found.recipe.search)
        objective = self.search.get("objective") or {}
        self.metric: str = objective.get("metric", "loss")
        self.score: str | None = objective.get("score")
        self.sign = METRICS[self.metric]
        self.order: str = (self.search.get("plan") or {}).get("order", "")
        self.candidates = self._candidates()
        self.visits = self._visits()
        self.towers = self._towers()
        self.seconds = sum(row.seconds for row in found.rows)

    @property
    def objective_name(self) -> str:
        name = METRIC_NAMES[self.metric]
        return f"{name} of {self.score}" if self.score else name

    @property
    def changed(self) -> list[Visit]:
        return [visit for visit in self.visits if visit.pick.count]

    def _visit_of(self, place: int) -> int:
        """Where pick ``place`` was decided."""
        return 1 if self.order == "single" else place + 1

    def _candidates(self) -> list[Candidate]:
        rows = [row for row in self.found.rows if row.visit > 0]
        first: dict[tuple[int, str], int] = {}
        for row in rows:
            first.setdefault((row.visit, row.matrix), len(first))
        rows.sort(key=lambda row: (row.visit, first[row.visit, row.matrix], row.count))
        chosen = {
            (self._visit_of(place), pick.address, pick.count)
            for place, pick in enumerate(self.recipe.picks)
            if pick.count
        }
        best, found = self.found.baseline.objective, []
        for row in rows:
            value = row.value.objective
            best = value if self.sign * (value - best) > 0 else best
            found.append(Candidate(row, best, row.key in chosen))
        return found

    def _visits(self) -> list[Visit]:
        before, found = self.found.baseline.objective, []
        for place, pick in enumerate(self.recipe.picks):
            number = self._visit_of(place)
            after = before if pick.objective is None else pick.objective
            tried = sum(c.row.visit == number for c in self.candidates)
            if self.order == "single":
                tried = sum(c.row.matrix == pick.address for c in self.candidates)
            gain = self.sign * (after - before)
            found.append(Visit(number, pick, tried, self._size(pick), before, after, gain))
            before = after
        return found

    def _size(self, pick: Pick) -> int | None:
        shape = (self.recipe.model.get("matrices") or {}).get(pick.address)
        return None if shape is None else min(shape)

    def kept(self, pick: Pick) -> float:
        """Share of the singular directions that stay."""
        size = self._size(pick)
        if size and pick.count is not None:
            return 1 - pick.count / size
        return 1 - pick.ratio if pick.ratio < 1 else 1.0

    def _towers(self) -> list[Tower]:
        stages = tuple(self.recipe.model.get("stages") or ())
        found = []
        for name in ("image", "text"):
            picks = [p for p in self.recipe.picks if p.tower == name]
            if not picks:
                continue
            blocks = [_block(pick.layer, stages) for pick in picks]
            depth = max((b for b in blocks if b is not None), default=-1) + 1
            depth = max(depth, sum(stages) if name == "image" else 0)
            places = [_block_name(i, stages) for i in range(depth)]
            if None in blocks:
                places.append("proj")
            bars = tuple(
                Bar(
                    pick.kind,
                    depth if block is None else block,
                    "projection" if block is None else f"block {places[block]}",
                    self.kept(pick),
                    bool(pick.count),
                    pick.address,
                )
                for pick, block in zip(picks, blocks, strict=True)
            )
            kinds = tuple(k for k in KIND_NAMES if any(bar.kind == k for bar in bars))
            found.append(Tower(name, kinds, tuple(places), bars))
        return found

    def span(self) -> tuple[float, float]:
        """An axis of objectives that a few bad candidates cannot squeeze.

        It holds the model as it was, the best, and all but a tenth of the candidates; the rest too
        if that is not much wider.
        """
        values = np.array([c.row.value.objective for c in self.candidates])
        start, end = self.found.baseline.objective, self.found.final.objective
        ends = [start, end]
        if len(values):
            better = float((self.sign * values).max()) * self.sign
            worse = float(np.quantile(self.sign * values, _TAIL)) * self.sign
            worst = float((self.sign * values).min()) * self.sign
            ends += [better, worse]
            if abs(worst - better) <= 1.4 * (max(ends) - min(ends)):
                ends.append(worst)
        lo, hi = min(ends), max(ends)
        pad = 0.06 * (hi - lo) or 0.01 * max(abs(lo), 1e-6)
        return lo - pad, hi + pad


def _block(layer: Any, stages: Sequence[int]) -> int | None:
    """Counted through all stages; None for a projection."""
    if isinstance(layer, tuple):
        return int(sum(stages[: layer[0]]) + layer[1])
    return None if layer is None else int(layer)


def _block_name(block: int, stages: Sequence[int]) -> str:
    """A number; ``2.17`` for block 17 of stage 2."""
    for stage, depth in enumerate(stages):
        if block < depth:
            return f"{stage}.{block}"
        block -= depth
    return str(block)
