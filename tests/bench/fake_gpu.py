"""A GPU of pretence: streams, graphs and events that keep their own time, tensors on the CPU.

A call passes the time it is said to take; captured in a graph it passes none until the graph is
replayed. So what a ``Clock`` reports is known beforehand, and what only runs with a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import fastood
from bench.gpu.inputs import Target


def why_not_interpreted() -> str | None:
    """Why kernels cannot run on the CPU, if they cannot: old interpreters and new NumPys differ."""
    try:
        from triton.runtime.errors import InterpreterError
    except ImportError:
        return "no interpreter of Triton kernels"
    x = torch.eye(2, 16)
    try:
        fastood.mcm(x, fastood.ClassBank(x, impl="reference"), impl="triton")
    except (InterpreterError, ValueError) as error:
        return str(error)[:200]
    return None


class Device:
    """Time in seconds, and the graph that is being captured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: Graph | None = None
        self.broken = False
        self.slept = 0

    def call(self, seconds: float, result: Any = None) -> Callable[[int], Any]:
        """Something that takes ``seconds`` on the device."""

        def run(_: int) -> Any:
            self.work(seconds)
            return torch.arange(3.0) if result is None else result

        return run

    def work(self, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.seconds += seconds
        else:
            self.now += seconds

    def synchronize(self, *_: Any) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")


class Graph:
    device: Device

    def __init__(self) -> None:
        self.seconds = 0.0

    def replay(self) -> None:
        self.device.now += self.seconds


class Event:
    device: Device

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


class FakeTarget(Target):
    @property
    def gpu(self) -> bool:
        return True

    @property
    def l2_bytes(self) -> int:
        return 1 << 12

    def clear(self) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[Device, Target]:
    device = Device()

    @contextmanager
    def graph(captured: Graph) -> Iterator[None]:
        device.capturing = captured
        try:
            yield
        finally:
            device.capturing = None

    def sleep(cycles: int) -> None:
        assert isinstance(cycles, int)
        device.slept += cycles

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(cuda, "CUDAGraph", type("G", (Graph,), {"device": device}))
    monkeypatch.setattr(cuda, "Event", type("E", (Event,), {"device": device}))
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "_sleep", sleep)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: 1600)
    return device, FakeTarget(torch.device("cpu"))
