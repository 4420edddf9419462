"""Peak memory of one call, by the high-water mark of a fresh process.

torch's own statistics do not see malloc. One helper process imports everything, starts no thread
and forks a child for each question; the child builds the inputs, warms the libraries up on a tiny
shape, resets its mark, calls once and reports how far the mark rose: outputs, temporaries and
scratch. Linux only.

    python -m bench.peak      # then lines "<module> <builder> <implementation>"
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["PeakMeter"]


class PeakMeter:
    """Asks the helper process; started at the first question, ended by ``close``."""

    def __init__(self) -> None:
        self._helper: subprocess.Popen[str] | None = None
        self._known: dict[str, float | None] = {}

    def mib(self, builder: Any, name: str) -> float | None:
        """MiB of one call of implementation ``name`` of ``builder(shape)``, None if unknown."""
        question = f"{builder.__module__} {builder.__qualname__} {name}"
        if question not in self._known:
            self._known[question] = self._ask(question)
        return self._known[question]

    def close(self) -> None:
        if self._helper is not None:
            self._helper.communicate("")
            self._helper = None

    def _ask(self, question: str) -> float | None:
        if sys.platform != "linux":
            return None
        if self._helper is None:
            # large blocks go back to the system when freed, so that they cannot hide a new one
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            self._helper = subprocess.Popen(
                [sys.executable, "-m", "bench.peak"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).resolve().parent.parent,
                env=environment,
            )
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(question + "\n")
        self._helper.stdin.flush()
        answer = self._helper.stdout.readline().strip()
        return float(answer) if answer else None


def _answer(question: str) -> float:
    module, builder, name = question.split(" ", 2)
    from bench.shapes import TINY

    build = getattr(importlib.import_module(module), builder)
    build(TINY).calls[name]()
    call = build().calls[name]
    before = _reset_mark()
    kept = call()
    after = _mark()
    del kept
    return (after - before) / 1024


def _reset_mark() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _mark()


def _mark() -> int:
    """KiB"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status")


def main() -> None:
    from fastood.ops import loader

    loader.try_cpu()
    for line in sys.stdin:
        question = line.strip()
        importlib.import_module(question.split(" ", 1)[0])
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(writable, f"{_answer(question):.1f}".encode())
                status = 0
            except Exception as error:
                print(f"peak memory of {question}: {error!r}", file=sys.stderr)
            os._exit(status)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
