"""Time on the GPU and time from Python, of several calls against each other.

**GPU time.** A CUDA graph holds one call for every copy of the inputs; a replay between two events,
divided by the copies, is the time of a call. It includes the gaps between kernels of a graph, no
Python and no launching from the host. Copies together are larger than the L2, so inputs come from
memory; before the first event a buffer twice the L2 is written (cold also for the first copy), and
the stream is kept busy while the host launches the graph. Calls that cannot be captured run from
Python between the events instead (``captured`` says so).

**Wall time.** Calls in a row from an idle stream to the end of the last, divided by their number:
what a loop pays, the longer of Python and GPU. **Latency.** One call and waiting for it.

All calls take turns, in an order drawn anew each round; ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.inputs import Target
from bench.gpu.work import Call
from bench.timing import Timing

__all__ = ["Clock", "Runner", "Times"]

_ROUNDS = (3, 50)
_WALL_S = 2e-3  # of one sample of calls in a row
_CYCLES_A_SECOND = 2e9


class Runner(NamedTuple):
    """Something that runs ``calls`` calls, and what it costs the host to start it."""

    run: Callable[[], Any]
    calls: int
    host_s: float
    captured: bool
    note: str = ""


class Times(NamedTuple):
    gpu: Timing
    wall: Timing
    latency: Timing


class Clock:
    """Times calls on ``target``; on a CPU all three times are of the host."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._flush: Tensor | None = None
        if target.gpu:
            self._flush = torch.empty(2 * target.l2_bytes, dtype=torch.int8, device=target.device)

    # ---------------------------------------------------------------------- preparing

    def once(self, call: Call, copy: int = 0) -> tuple[Any, float]:
        """The result of one call and its seconds, waited for."""
        self.target.synchronize()
        start = time.perf_counter()
        result = call(copy)
        self.target.synchronize()
        return result, time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int | None:
        """Memory a call takes at its height, beside what was there and what it returns."""
        if not self.target.gpu:
            return None
        device = self.target.device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call(0)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(0, peak - sum(x.nbytes for x in _tensors(result)))

    def runner(self, call: Call, copies: int, *, capturable: bool = True) -> Runner:
        """``call`` on every copy: as a graph where that is possible."""
        for i in range(copies):  # what is prepared at first use is prepared outside the graph
            call(i)
        self.target.synchronize()
        note = "not capturable"
        if self.target.gpu and capturable:
            try:
                return self._graph(call, copies)
            except Exception as error:
                note = f"not captured: {_first_line(error)}"
                torch.cuda.synchronize(self.target.device)

        def run() -> None:
            for i in range(copies):
                call(i)

        return Runner(run, copies, 0.0, False, note if self.target.gpu else "no GPU")

    def _graph(self, call: Call, copies: int) -> Runner:
        device = self.target.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for i in range(min(2, copies)):
                call(i)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = call(0)  # kept: nothing else may be written there
            for i in range(1, copies):
                call(i)
        graph.replay()  # the first uploads it
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        graph.replay()
        host_s = time.perf_counter() - start
        torch.cuda.synchronize(device)
        note = "" if _same(first, call(0)) else "a replay does not give what the call gives"
        torch.cuda.synchronize(device)
        return Runner(graph.replay, copies, host_s, True, note)

    # ---------------------------------------------------------------------- timing

    def gpu(self, runners: Mapping[str, Runner], seconds: float) -> dict[str, Timing]:
        """Seconds of one call of each, on the GPU."""
        if not self.target.gpu:
            return _rounds(runners, seconds, lambda r: self._host(r.run, lambda: None) / r.calls)
        collected: dict[str, list[float]] = {name: [] for name in runners}
        for order in _orders(runners, seconds):
            events = [(name, self._between_events(runners[name])) for name in order]
            torch.cuda.synchronize(self.target.device)
            for name, (start, end) in events:
                collected[name].append(1e-3 * start.elapsed_time(end) / runners[name].calls)
        return {name: Timing(tuple(values)) for name, values in collected.items()}

    def _between_events(self, runner: Runner) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the host gets ahead: what it takes to launch the graph is over before the GPU is there
        wait = min(1.5 * runner.host_s + 3e-5, 1e-2)
        torch.cuda._sleep(int(_CYCLES_A_SECOND * wait))
        assert self._flush is not None
        self._flush.zero_()
        start.record()
        runner.run()
        end.record()
        return start, end

    def wall(
        self, calls: Mapping[str, tuple[Call, int, float]], seconds: float
    ) -> dict[str, Timing]:
        """Seconds of one call among many in a row; ``calls``: call, copies, seconds expected."""

        def sample(entry: tuple[Call, int, float]) -> float:
            call, copies, expected = entry
            n = max(1, min(200, math.ceil(_WALL_S / max(expected, 1e-6))))
            n = n if self.target.gpu else 1

            def run() -> None:
                for j in range(n):
                    call(j % copies)

            return self._host(run, self.target.synchronize) / n

        return _rounds(calls, seconds, sample)

    def latency(self, calls: Mapping[str, tuple[Call, int, float]], seconds: float):
        """Seconds of one call and waiting for its end."""
        return _rounds(
            calls, seconds, lambda e: self._host(lambda: e[0](0), self.target.synchronize)
        )

    def _host(self, run: Callable[[], Any], wait: Callable[[], None]) -> float:
        self.target.synchronize()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start


def _rounds(
    entries: Mapping[str, Any], seconds: float, sample: Callable[[Any], float]
) -> dict[str, Timing]:
    collected: dict[str, list[float]] = {name: [] for name in entries}
    for order in _orders(entries, seconds):
        for name in order:
            collected[name].append(sample(entries[name]))
    return {name: Timing(tuple(values)) for name, values in collected.items()}


def _orders(entries: Mapping[str, Any], seconds: float) -> Iterator[list[str]]:
    """An order for each round, until the time is over; the first round warms up and counts too."""
    low, high = _ROUNDS
    shuffle, start = random.Random(0), time.perf_counter()
    order = list(entries)
    with _uncollected():
        for done in range(high if order else 0):
            used = time.perf_counter() - start
            if used >= seconds and (done >= low or (used >= 2 * seconds and done >= 2)):
                return
            shuffle.shuffle(order)
            yield order


@contextmanager
def _uncollected() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [x for part in result for x in _tensors(part)]
    return []


def _same(first: Any, second: Any) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
