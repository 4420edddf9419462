"""Interleaved timing: every call of a group once a round, in an order drawn anew each round.

Machines are shared and clocks move, so times taken one after the other are not comparable; times
taken within a few milliseconds of each other are. pytest-benchmark times one call at a time: its
table is for reading, what is reported comes from here.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.shapes import SMOKE

__all__ = ["Ratio", "Timing", "interleave", "ratio"]

_BUDGET_S = 0.02 if SMOKE else 2.0  # of one group, warm-up not counted
_ROUNDS = (3, 4) if SMOKE else (5, 60)
_SAMPLE_S = 0.0 if SMOKE else 4e-4  # calls shorter than this are repeated within a sample

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number a round, rounds shared with every other call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """How much longer one call takes than another: of the medians, and round by round."""

    value: float
    low: float
    high: float


def ratio(of: Timing, to: Timing) -> Ratio:
    """The ratio of medians, with the quartiles of the ratios within a round."""
    rounds = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Ratio(of.median / to.median, low, high)


def interleave(calls: Mapping[str, Call]) -> dict[str, Timing]:
    """Time ``calls`` against each other; each is called twice before, to warm up."""
    repeats, once = {}, 0.0
    for name, call in calls.items():
        call()
        short = _seconds(call, 1)
        repeats[name] = max(1, math.ceil(_SAMPLE_S / max(short, 1e-7)))
        once += short * repeats[name]
    low, high = _ROUNDS
    rounds = min(high, max(low, round(_BUDGET_S / max(once, 1e-9))))

    order, shuffle = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(_seconds(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
