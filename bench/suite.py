"""One piece of work, everything that can do it, and what is recorded of each.

A ``bench_*.py`` builds a ``Work``; ``record`` checks all its implementations against float64,
times them against each other and against the bare product, and says what is known of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench.limits import BARE, bare_products, peak_flops, stream_bytes
from bench.timing import Timing, interleave, ratio
from fastood.errors import BuildError

__all__ = ["Goal", "Work", "measure", "record"]


Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Goal:
    """What an implementation should reach: nothing is asserted, the report shows it.

    ``slowdown``: time over that of ``against``, at most. ``speedup``: time of ``against`` over its
    own, at least. ``extra us``: microseconds above ``against``, at most. ``peak MiB``: memory, at
    most. ``against="G*"`` is the bare product. ``parts``: how many times ``against`` would have to
    run for the whole work, where it was given one part of many to do.
    """

    kind: Literal["slowdown", "speedup", "extra us", "peak MiB"]
    least: float
    aim: float | None = None
    against: str = "G*"
    parts: int = 1


@dataclass
class Work:
    """Implementations of one thing on one shape.

    Args:
        name: of the group.
        calls: by implementation; what is not installed is left out.
        truth: the result in float64; several tensors are compared one by one.
        result: what a call returned, in the form of ``truth``.
        flops, moved: of the arithmetic nobody can avoid, and bytes of inputs and outputs.
        product: the two factors of the bare product, (B, D) and (K, D); None if there is none.
        tolerance: (relative, absolute) error allowed, by implementation; ``""`` for the others.
        part: which of the results an implementation computes alone.
        by_largest: errors relative to the largest number of a result rather than to each
            (gradients, differences).
        goals: by implementation.
        precision: of the inputs and the arithmetic.
        threads: of torch while it is measured; None leaves them.
    """

    name: str
    calls: dict[str, Callable[[], Any]]
    truth: Callable[[], Result]
    flops: float
    moved: float
    result: Callable[[Any], Result] = field(default=lambda found: found)
    product: tuple[Tensor, Tensor] | None = None
    tolerance: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"fastood": (1e-4, 1e-7), "": (2e-2, 1e-4)}
    )
    part: Mapping[str, int] = field(default_factory=dict)
    by_largest: bool = False
    goals: Mapping[str, tuple[Goal, ...]] = field(default_factory=dict)
    precision: str = "float32"
    threads: int | None = None

    @contextmanager
    def threading(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass
class Measured:
    """All that is known of a ``Work``: accuracy and times, or why there are none."""

    work: Work
    accuracy: dict[str, dict[str, float]]
    wrong: dict[str, str]
    calls: dict[str, Callable[[], Any]]
    times: dict[str, Timing]

    @property
    def bare(self) -> Timing | None:
        """G*"""
        return min(
            (self.times[name] for name in BARE if name in self.times),
            key=lambda t: t.median,
            default=None,
        )


def measure(work: Work) -> Measured:
    """Check every implementation, then time those that are right, interleaved."""
    truth = _parts(work.truth())
    accuracy, wrong = {}, {}
    for name, call in work.calls.items():
        wanted = [truth[work.part[name]]] if name in work.part else truth
        try:
            result = call() if name in work.part else work.result(call())
        except BuildError:  # no compiler here: no kernels to time
            continue
        found, why = _accuracy(_parts(result), wanted, work, name)
        accuracy[name] = found
        if why:
            wrong[name] = why
    calls = {n: c for n, c in work.calls.items() if n in accuracy and n not in wrong}
    if work.product is not None:
        products = bare_products(*work.product)
        z, t = work.product
        for call in products.values():
            torch.testing.assert_close(call(), z @ t.T, rtol=1e-3, atol=1e-3)
        calls = products | calls
    with work.threading():
        times = interleave(calls)
    return Measured(work, accuracy, wrong, calls, times)


def _parts(result: Result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _accuracy(
    parts: list[Tensor], truth: list[Tensor], work: Work, name: str
) -> tuple[dict[str, float], str | None]:
    """Error and distinct numbers of a result, and what is wrong with it if anything is."""
    kind = "fastood" if name.startswith("fastood") else ""
    allowed = next(work.tolerance[n] for n in (name, kind, "") if n in work.tolerance)
    relative, absolute = allowed
    worst, why = 0.0, None
    for got, want in zip(parts, truth, strict=True):
        if got.shape != want.shape:
            return {}, f"expected {tuple(want.shape)}, got {tuple(got.shape)}"
        error = (got.double() - want.double()).abs()
        scale = want.double().abs()
        scale = scale.max() if work.by_largest else scale
        worst = max(worst, float((error / scale.clamp_min(1e-300)).max()))
        beyond = ~(error <= relative * scale + absolute)  # NaN is beyond
        if bool(beyond.any()):
            why = (
                f"{int(beyond.sum())} of {beyond.numel()} numbers differ from float64 by more than "
                f"{relative:g} relative + {absolute:g}: at most {float(error.max()):.3g}"
            )
    found: dict[str, float] = {"max_rel_error": worst}
    if all(x.ndim == 1 for x in truth):  # scores, not gradients or single numbers
        found["distinct"] = sum(x.unique().numel() for x in parts)
        found["distinct_float64"] = sum(x.unique().numel() for x in truth)
    return found, why


def record(measured: Measured, name: str, peak_mib: float | None) -> dict[str, Any]:
    """What goes into ``extra_info`` for one implementation."""
    work, times = measured.work, measured.times
    own, bare = times[name], measured.bare
    low, high = own.quartiles
    with work.threading():
        peak, stream = peak_flops(), stream_bytes()
    if work.product is not None and bare is not None:  # seen in better weather than the large one
        z, t = work.product
        peak = max(peak, 2.0 * z.numel() * len(t) / bare.best)
    limit = max(work.flops / peak, work.moved / stream)
    goals = [goal for several in work.goals.values() for goal in several]
    limit /= max((goal.parts for goal in goals if goal.against == name), default=1)
    found: dict[str, Any] = {
        "work": work.name,
        "impl": name,
        "precision": work.precision,
        "threads": work.threads or torch.get_num_threads(),
        "flops": work.flops,
        "bytes": work.moved,
        "median_s": own.median,
        "best_s": own.best,
        "quartiles_s": [low, high],
        "rounds": len(own.seconds),
        "gflops_per_s": work.flops / own.median / 1e9,
        "gbytes_per_s": work.moved / own.median / 1e9,
        "limit_s": limit,
        "share_of_limit": limit / own.median,
        "machine_gflops_per_s": peak / 1e9,
        "machine_gbytes_per_s": stream / 1e9,
        "to": {},
        **measured.accuracy.get(name, {}),
    }
    if peak_mib is not None:
        found["peak_mib"] = peak_mib
    if bare is not None:
        found["bare_s"] = bare.median
    for other, timing in (times | ({"G*": bare} if bare is not None else {})).items():
        if other != name:
            r = ratio(own, timing)
            found["to"][other] = [r.value, r.low, r.high]
    found["goals"] = [_judged(g, measured, own, peak_mib) for g in work.goals.get(name, ())]
    return found


def _judged(goal: Goal, measured: Measured, own: Timing, peak_mib: float | None) -> dict[str, Any]:
    against = measured.bare if goal.against == "G*" else measured.times.get(goal.against)
    value = peak_mib if goal.kind == "peak MiB" else None
    if against is not None:
        if goal.kind == "slowdown":
            value = own.median / against.median
        elif goal.kind == "speedup":
            value = goal.parts * against.median / own.median
        elif goal.kind == "extra us":
            value = (own.median - against.median) * 1e6
    return {
        "kind": goal.kind,
        "least": goal.least,
        "aim": goal.aim,
        "against": goal.against,
        "parts": goal.parts,
        "value": value,
    }
