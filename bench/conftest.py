"""Shared by all benchmarks: sizes, provenance, and one rule: correct first, then timed.

Groups compare implementations of one thing on one shape; ``extra_info`` says what ran. Read
ratios within a group, not milliseconds: machines are shared and clocks move.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch

SMOKE = os.environ.get("FASTOOD_BENCH_SMOKE") == "1"
"""Tiny sizes: proves that the benchmarks run, measures nothing."""


@pytest.fixture(autouse=True)
def provenance(benchmark: Any) -> None:
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        machine=platform.processor() or platform.machine(),
        smoke=SMOKE,
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SMOKE:
        terminalreporter.write_line("FASTOOD_BENCH_SMOKE=1: tiny sizes, the times mean nothing")
