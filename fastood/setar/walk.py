"""The greedy walk of a search: at each visit the best candidate is accepted if it is better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fastood.models.matrices import Matrix
from fastood.setar.evaluate import Evaluator
from fastood.setar.objective import Objective, Value
from fastood.setar.picks import Pick
from fastood.setar.plan import Candidate, Plan
from fastood.setar.table import Row, Table

__all__ = ["Progress", "Walk"]


class Progress(NamedTuple):
    """Where a search is."""

    visit: int
    """From 1; 0 while the model as it is is evaluated."""
    visits: int
    matrix: str
    """Address of the matrix tried at the moment."""
    done: float
    """Share of the work, 0 to 1."""
    objective: float | None
    """Best so far."""


class Walk:
    """The visits of a plan, with their values from the table or the evaluator.

    Args:
        evaluating: the evaluator, made when something has to be computed.
    Attributes:
        picks: one for each matrix, in the order of deciding.
        baseline, best: values of the model as it was, and with all picks.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        table: Table,
        evaluating: Callable[[], Evaluator],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan, self._objective, self._table = plan, objective, table
        self._evaluating, self._progress = evaluating, progress
        self._accepted: list[Candidate] = []
        self._given = 0  # how many of them the evaluator has
        self._decided: list[Matrix] = []
        self._same = False  # the model is the one of the visit before
        self.picks: list[Pick] = []
        self.baseline: Value
        self.best: Value
        self._accepted_value: Value  # of the model that the candidates of a visit are made from
        self._done = self._total = 0.0
        self._at = (0, "")

    def run(self) -> None:
        """Go through all visits; what is in the table is not computed again."""
        row = self._table.find(0, "", 0)
        if row is None:
            row = self._compute(0, "", [])[0]
        self.baseline = self.best = row.value
        for visit in range(1, self._plan.visits + 1):
            group, self._accepted_value = self._plan.visit(self._decided), self.best
            chosen: Candidate | None = None
            for matrix in group:
                for candidate, value in self._values(visit, matrix):
                    if self._objective.better(value, self.best):
                        self.best, chosen = value, candidate
            self._same = chosen is None
            decided = group[0] if chosen is None else chosen.matrix
            self._decide(decided, chosen)
            if self._plan.order == "single":
                for matrix in group:
                    if matrix != decided:
                        self._decide(matrix, None)
            self._tell()

    def _values(self, visit: int, matrix: Matrix) -> list[tuple[Candidate, Value]]:
        candidates = list(self._plan.candidates(matrix))
        known = [self._table.find(visit, matrix.address, c.count) for c in candidates]
        # all of a matrix or none: a candidate computed among others is rounded otherwise, and a
        # search goes on with the same bits wherever its table was cut
        if None in known and not self._copy(visit, matrix.address, candidates):
            self._compute(visit, matrix.address, candidates)
        found = []
        for candidate in candidates:
            row = self._table.find(visit, matrix.address, candidate.count)
            assert row is not None
            found.append((candidate, row.value))
        return found

    def _copy(self, visit: int, address: str, candidates: list[Candidate]) -> bool:
        """Whether these were tried on the very same model in the visit before; then they are known.

        So an exhaustive search computes nothing more once a visit has found no better candidate.
        """
        if not self._same:
            return False
        rows = [self._table.find(visit - 1, address, c.count) for c in candidates]
        known = [replace(row, visit=visit, seconds=0.0) for row in rows if row is not None]
        if len(known) < len(rows):
            return False
        self._keep(known)
        if self._total:
            self._tell(sum(map(self._evaluating().cost, candidates)))
        return True

    def _compute(self, visit: int, address: str, candidates: list[Candidate]) -> list[Row]:
        evaluator = self._evaluating()
        for candidate in self._accepted[self._given :]:
            evaluator.accept(candidate)
        self._given = len(self._accepted)
        if not self._total:
            self._total = self._left(evaluator, visit)
        self._at = (visit, address)
        begin = time.perf_counter()
        if candidates:
            values = evaluator.candidates(candidates, self._tell)
            values = [self._told(c, v) for c, v in zip(candidates, values, strict=True)]
        else:
            values = [evaluator.baseline(self._tell)]
        each = (time.perf_counter() - begin) / len(values)
        given = [(c.ratio, c.count) for c in candidates] or [(0, 0)]
        rows = [
            Row(visit, address, ratio, count, value, each)
            for (ratio, count), value in zip(given, values, strict=True)
        ]
        self._keep(rows)
        return rows

    def _told(self, candidate: Candidate, value: Value) -> Value:
        """The value of a candidate, where rounding alone would tell it from the accepted model."""
        evaluator, same = self._evaluating(), self._accepted_value
        if evaluator.drops_nothing(candidate):
            return same
        if evaluator.cannot_matter(candidate.matrix):  # what else the table says does change
            return replace(value, objective=same.objective)
        return value

    def _keep(self, rows: list[Row]) -> None:
        """Put rows in the table; what a stopped run left there is known to be the same."""
        self._table.add(row for row in rows if self._table.find(*row.key) is None)

    def _decide(self, matrix: Matrix, chosen: Candidate | None) -> None:
        self._decided.append(matrix)
        if chosen is not None:
            self._accepted.append(chosen)
        self.picks.append(
            Pick(
                matrix.tower,
                matrix.kind,
                matrix.layer,
                0.0 if chosen is None else chosen.ratio,
                0 if chosen is None else chosen.count,
                self.best.objective,
            )
        )

    def _left(self, evaluator: Evaluator, visit: int) -> float:
        """Cost of what is still to be computed, as far as it is known."""
        plan, decided = self._plan, set(self._decided)
        total = evaluator.cost_of_baseline if visit == 0 else 0.0
        left = [m for m in plan.matrices if m not in decided]
        for place, matrix in enumerate(left):
            # an exhaustive search tries a matrix until it is decided: at half of its visits
            times = (len(left) - place + 1) / 2 + place / 2 if plan.revisits else 1.0
            number = visit if plan.revisits else visit + place
            candidates = list(plan.candidates(matrix))
            known = [self._table.find(number, matrix.address, c.count) for c in candidates]
            total += times * sum(map(evaluator.cost, candidates)) * (None in known)
        return total

    def _tell(self, units: float = 0.0) -> None:
        self._done += units
        if self._progress is None:
            return
        share = min(1.0, self._done / self._total) if self._total else 1.0
        best = self.best.objective if hasattr(self, "best") else None
        self._progress(Progress(self._at[0], self._plan.visits, self._at[1], share, best))
