"""One case: everybody checked, then timed against each other; a record for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu import lowrank, scores, training
from bench.gpu.cases import Case, Goal, tiny
from bench.gpu.ceilings import Ceilings
from bench.gpu.clock import Clock, Runner, Times
from bench.gpu.inputs import Target
from bench.gpu.launches import launches
from bench.gpu.work import OURS, Variant, Work
from bench.timing import Timing, ratio

__all__ = ["Broken", "Row", "build", "count_launches", "measure"]

Row = dict[str, Any]

_SHARES = (0.5, 0.3, 0.1)
"""Of a case's seconds for GPU time, wall time, latency; the rest is for checking."""
_CALLS_AT_LEAST = 12


class Broken(RuntimeError):
    """The device no longer answers: nothing more can be computed in this process."""


@dataclass
class _Candidate:
    variant: Variant
    row: Row
    runner: Runner | None = None
    only: Timing | None = None
    """Of calls too long to be repeated."""
    times: Times | None = field(default=None)


def build(case: Case, target: Target) -> Work:
    """The case with everybody who can compute it; on tiny inputs where there is no GPU."""
    make = {"low_rank": lowrank, "ebm_loss": training, "locoop_loss": training}
    work = make.get(case.work, scores).build(case if target.gpu else tiny(case), target)
    work.case = case  # under its own name
    return work


def measure(work: Work, clock: Clock, ceilings: Ceilings | None, seconds: float) -> list[Row]:
    """Records of all variants, those that are wrong or failed with the reason.

    Raises:
        Broken: a kernel left the device unusable.
    """
    truth = list(work.truth())
    candidates = [_checked(work, v, clock, truth, seconds) for v in work.variants]
    del truth
    ready = {c.variant.name: c for c in candidates if c.runner is not None and c.only is None}
    gpu = clock.gpu({n: c.runner for n, c in ready.items() if c.runner}, _SHARES[0] * seconds)
    calls = {
        n: (c.variant.call, c.variant.copies or work.copies, gpu[n].median)
        for n, c in ready.items()
    }
    wall = clock.wall(calls, _SHARES[1] * seconds)
    latency = clock.latency(calls, _SHARES[2] * seconds)
    for c in candidates:
        if c.variant.name in ready:
            name = c.variant.name
            c.times = Times(gpu[name], wall[name], latency[name])
        if c.only is not None:
            c.times = Times(c.only, c.only, c.only)
    for c in candidates:
        if c.times is not None:
            _add_times(c, work, ceilings, candidates)
    rows = [c.row for c in candidates]
    for c in candidates:
        c.row["goals"] = judged(work.case.goals, c.row, rows) if c.variant.name == OURS else []
    return rows


def _checked(
    work: Work, variant: Variant, clock: Clock, truth: Sequence[Tensor], seconds: float
) -> _Candidate:
    """Its result is right and it can be timed, or the record says why not."""
    row: Row = {
        "case": work.case.name,
        "variant": variant.name,
        "role": variant.role,
        "precision": variant.precision,
    }
    found = _Candidate(variant, row)
    try:
        result, first_s = clock.once(variant.call)
        if variant.role != "product":
            accuracy = work.check(result, truth, variant.bound)
            row |= accuracy.record()
            if accuracy.wrong is not None:
                row["wrong"] = accuracy.wrong
                return found
        del result
        if first_s * _CALLS_AT_LEAST > seconds:  # it may have compiled: once more decides
            _, first_s = clock.once(variant.call)
        if first_s * _CALLS_AT_LEAST > seconds:
            times = [first_s]
            while sum(times) + first_s < seconds / 2 and len(times) < _CALLS_AT_LEAST:
                times.append(clock.once(variant.call)[1])
            found.only = Timing((times[0], *times))  # quartiles want two
            row["note"] = f"{len(times)} calls from Python, waited for"
            return found
        row["peak_bytes"] = clock.peak_bytes(variant.call)
        found.runner = clock.runner(
            variant.call, variant.copies or work.copies, capturable=variant.capturable
        )
        row["captured"] = found.runner.captured
        if found.runner.note:
            row["note"] = found.runner.note
        if found.runner.captured and found.runner.note and variant.role == "ours":
            row["wrong"] = found.runner.note
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {_short(error)}"
        _still_alive(clock.target, error)
    return found


def _still_alive(target: Target, error: Exception) -> None:
    try:
        target.synchronize()
        torch.zeros(1, device=target.device).add_(1)
        target.synchronize()
    except Exception:
        raise Broken(_short(error)) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return " | ".join(line.strip() for line in lines[:1] + lines[1:][-2:])[:300]


def _add_times(
    c: _Candidate, work: Work, ceilings: Ceilings | None, others: Sequence[_Candidate]
) -> None:
    assert c.times is not None
    gpu, wall, latency = c.times
    row = c.row
    for key, timing in (("gpu", gpu), ("wall", wall), ("latency", latency)):
        low, high = timing.quartiles
        row[f"{key}_us"] = [1e6 * x for x in (timing.median, low, high)]
    row["rounds"] = len(gpu.seconds)
    limit = ceilings and ceilings.limit_s(c.variant.precision, work.flops, work.moved)
    if limit:
        row["share_of_limit"] = limit / gpu.median
    if row.get("peak_bytes") is not None and work.logits_bytes:
        row["peak_over_logits"] = row["peak_bytes"] / work.logits_bytes
    row["to"] = {}
    for o in others:
        if o is c or o.times is None:
            continue
        if c.only is None and o.only is None:
            r = ratio(gpu, o.times.gpu)
            row["to"][o.variant.name] = [r.value, r.low, r.high]
        else:  # not in the same rounds: no spread is known
            row["to"][o.variant.name] = [gpu.median / o.times.gpu.median] * 3
    bare = c.variant.bare
    if bare in row["to"]:
        row["bare"], row["over_bare"] = bare, row["to"][bare]


def judged(goals: Sequence[Goal], row: Row, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where nothing was."""
    return [
        {"metric": g.metric, "least": g.least, "aim": g.aim, "value": _value(g, row, rows)}
        for g in goals
    ]


def _value(goal: Goal, row: Row, rows: Sequence[Row]) -> float | None:
    if goal.metric.startswith("x "):
        other = next((r for r in rows if r["variant"] == goal.metric[2:]), None)
        if other is None or "gpu_us" not in other or "gpu_us" not in row:
            return None
        return float(other["gpu_us"][0] / row["gpu_us"][0])
    value = {
        "C": lambda: row["over_bare"][0],
        "gpu us": lambda: row["gpu_us"][0],
        "wall us": lambda: row["wall_us"][0],
        "ms": lambda: 1e-3 * row["wall_us"][0],
        "launches": lambda: row["launches"],
        "error": lambda: row["max_rel_error"],
        "peak / logits": lambda: row["peak_over_logits"],
    }[goal.metric]
    try:
        found = value()
    except KeyError:
        return None
    return None if found is None else float(found)


def count_launches(case: Case, rows: list[Row], target: Target) -> None:
    """Add the number of launches to the records of a case; inputs are made anew."""
    by_name = {row["variant"]: row for row in rows}
    for variant in build(case, target).variants:
        row = by_name.get(variant.name, {})
        if "gpu_us" in row and variant.role in ("ours", "optional"):
            row["launches"] = launches(variant.call, target)
            if variant.name == OURS:
                row["goals"] = judged(case.goals, row, rows)
