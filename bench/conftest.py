"""Shared by all benchmarks: correct first, then timed, always against the neighbours.

``run(builder, impl)`` is what a benchmark calls. The first time a group's builder is seen, all its
implementations are checked and timed interleaved (``bench/timing.py``); every benchmark of the
group then records its share of that in ``extra_info``. Read ratios within a group, not
milliseconds: machines are shared and clocks move.

A run that measures something is kept in ``.benchmarks/run.json`` unless ``--benchmark-json`` says
otherwise; ``python -m bench.report`` turns it into a table and a plot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.machine import describe
from bench.peak import PeakMeter
from bench.shapes import SMOKE
from bench.suite import Measured, Work, measure, record

RUN = Path(".benchmarks") / "run.json"
_PYTEST_BENCHMARK_S = 0.01 if SMOKE else 0.2  # a benchmark; what is reported is timed before


def pytest_configure(config: Any) -> None:
    wanted = config.getoption("benchmark_only", False)
    if wanted and not SMOKE and config.getoption("benchmark_json", None) is None:
        path = config.rootpath / RUN
        path.parent.mkdir(exist_ok=True)
        # recent versions of the plugin take a name, older ones an open file
        takes_name = _version_of("pytest-benchmark") >= (5, 3)
        config.option.benchmark_json = str(path) if takes_name else path.open("wb")


def _version_of(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """In place of the plugin's own description, which has the name of the host."""
    del config
    machine_info.clear()
    machine_info.update(describe())


@pytest.fixture(scope="session")
def peak_meter() -> Iterator[PeakMeter]:
    meter = PeakMeter()
    yield meter
    meter.close()


@pytest.fixture(scope="session")
def measured_work() -> Callable[..., Measured]:
    """Measures a group once; keeps the last one, as groups run one after the other."""
    last: list[tuple[Any, Measured]] = []

    def of(builder: Callable[..., Work], *arguments: Any) -> Measured:
        if not last or last[0][0] != (builder, arguments):
            last.clear()
            torch.compiler.reset()
            last.append(((builder, arguments), measure(builder(*arguments))))
        return last[0][1]

    return of


@pytest.fixture
def run(
    benchmark: Any, measured_work: Callable[..., Measured], peak_meter: PeakMeter
) -> Callable[..., None]:
    """``run(builder, impl, *arguments)``: check, time against the others, record, time alone.

    ``peak=True`` measures memory too, of a builder whose one argument, the shape, has a default.
    """

    def run(builder: Callable[..., Work], impl: str, *arguments: Any, peak: bool = False) -> None:
        measured = measured_work(builder, *arguments)
        if impl in measured.wrong:
            pytest.fail(f"{impl} of {measured.work.name}: {measured.wrong[impl]}")
        if impl not in measured.times:
            pytest.skip(f"{impl} is not installed, or could not be built")
        weighed = peak and not SMOKE and impl in measured.work.calls and impl != "compile"
        mib = peak_meter.mib(builder, impl) if weighed else None
        benchmark.group = measured.work.name
        benchmark.extra_info.update(record(measured, impl, mib))
        benchmark.extra_info["smoke"] = SMOKE
        call = measured.calls[impl]
        once = measured.times[impl].median
        rounds = max(1 if once > 0.5 else 3, min(30, int(_PYTEST_BENCHMARK_S / max(once, 1e-6))))
        repeats = max(1, int(1e-4 / max(once, 1e-7)))
        with measured.work.threading():
            benchmark.pedantic(
                call, rounds=rounds, iterations=repeats, warmup_rounds=int(once < 0.5)
            )

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SMOKE:
        terminalreporter.write_line("FASTOOD_BENCH_SMOKE=1: tiny sizes, the times mean nothing")
    elif hasattr(os, "getloadavg"):
        terminalreporter.write_line(
            f"load average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
