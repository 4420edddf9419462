"""Time tile sizes and write the table the kernels take theirs from.

    python -m bench.gpu.tune --seconds 300                          # everything, as time allows
    python -m bench.gpu.tune --family rows --precision fp16 fp16x3 --width 512 768

For each family, precision, width and class of row counts: candidates near what is in the table are
compiled side by side, checked against what the table gives now, and timed against each other. The
fastest becomes an entry marked with the GPU's name; entries of what was not timed stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.cases import CASES, Case
from bench.gpu.clock import Clock
from bench.gpu.inputs import Inputs, Target
from bench.gpu.training import ours as training_call
from bench.gpu.training import step
from bench.gpu.work import Call
from fastood.atomic import write_text
from fastood.kernels import configs
from fastood.kernels.configs import Config, Entry
from fastood.kernels.precision import PRECISIONS

__all__ = ["Subject", "candidates", "merged", "subjects", "using"]

SHARED_BYTES = 232_448
"""Of one block, capability 9.0; smaller chips refuse some candidates, which are then left out."""
TOLERANCE = 1e-2
"""Between two tile sizes, relative to the largest number: a wrong kernel is off by more."""


class Subject(NamedTuple):
    """One entry to be found: a family at one precision, width and class of row counts."""

    family: str
    precision: str
    rows: int | None
    width: int
    case: Case

    @property
    def name(self) -> str:
        return f"{self.family} {self.precision} D={self.width} rows<={self.rows or 'any'}"


_PLACES = {
    # family: (work, part of the case's name, largest number of rows the entry is for)
    "rows": (("delta_energy", "S1", 2048), ("delta_energy", "S2", None)),
    "grouped": (("neg_label", "S3", None),),
    "patches": (("gl_mcm", "L", None),),
    "ebm": (("ebm_loss", "256x", 512), ("ebm_loss", "1024x", None)),
    "ebm_backward": (("ebm_loss", "1024x", None),),
    "locoop": (("locoop_loss", "32x", None),),
}


def subjects(
    families: Sequence[str], precisions: Sequence[str], widths: Sequence[int]
) -> list[Subject]:
    """Fast precisions first: a run that is cut short has those."""
    found = []
    for precision, width, family in itertools.product(precisions, widths, families):
        kind = precision if precision in ("fp16", "bf16") else "fp32"
        for work, label, rows in _PLACES[family]:
            like = next(c for c in CASES if c.work == work and c.label.startswith(label))
            shape = like.shape._replace(d=width)
            case = dataclasses.replace(like, shape=shape, features=kind, goals=())
            found.append(Subject(family, precision, rows, width, case))
    return found


def current(subject: Subject) -> Config:
    """What the table gives now."""
    rows = subject.rows or 1 << 20
    return next(
        e.config
        for e in configs.entries()
        if (e.family, e.precision) == (subject.family, subject.precision)
        and (e.rows is None or rows <= e.rows)
        and (e.width is None or subject.width <= e.width)
    )


def candidates(now: Config, precision: str, *, most: int = 32) -> list[Config]:
    """``now``; what differs from it in one number; then tiles that read least for what they
    multiply. Only what fits the chip."""
    choices: dict[str, Sequence[int]] = {
        "rows": (32, 64, 128),
        "columns": (32, 64, 128, 256),
        "depth": (32, 64, 128),
        "warps": (4, 8),
        "stages": (2, 3, 4, 5),
        "resident": (1, 2, 3),
        "splits": (0,),
    }
    fields = [name for name in choices if name in Config._fields]

    def changes(config: Config) -> int:
        return sum(getattr(config, f) != getattr(now, f) for f in fields)

    near = [
        now._replace(**dict(zip(fields, values, strict=True)))
        for values in itertools.product(*(choices[f] for f in fields))
    ]

    def promise(config: Config) -> tuple[float, ...]:
        reuse = config.rows * config.columns / (config.rows + config.columns)
        return changes(config) > 1, -reuse, abs(config.stages - 3.5), changes(config)

    near = [c for c in near if 0 < changes(c) <= 3 and _fits(c, precision)]
    return [now, *sorted(near, key=promise)][:most]


def _fits(config: Config, precision: str) -> bool:
    """Tiles in shared memory, sums in registers."""
    element = {"fp16": 2, "bf16": 2, "fp16x3": 4}.get(precision, 4)
    stage = (config.rows + config.columns) * config.depth * element
    sums = config.rows * config.columns / (32 * config.warps)
    return config.stages * stage * config.resident <= SHARED_BYTES and 8 <= sums <= 128


@contextmanager
def using(family: str, config: Config) -> Iterator[None]:
    """``configs.pick`` gives ``config`` for ``family``, the table's for all others."""
    original = configs._entry

    def entry(asked: str, precision: Any, rows: int, width: int) -> Config:
        return config if asked == family else original(asked, precision, rows, width)

    configs._entry = entry  # type: ignore[assignment]
    try:
        yield
    finally:
        configs._entry = original


def call_of(subject: Subject, target: Target) -> tuple[Call, int]:
    """What is timed, and on how many copies of its inputs."""
    from bench.gpu.scores import ours as score_call

    case = subject.case
    inputs = Inputs(case.shape, case.features, target)
    options = {} if case.features != "fp32" else {"precision": subject.precision}
    if case.work.endswith("_loss"):
        loss = training_call(case, inputs, "triton", **options)
        return step(loss, inputs.of("text")), inputs.copies
    return score_call(case.work, inputs, "triton", **options), inputs.copies


def tune(subject: Subject, clock: Clock, seconds: float, most: int) -> Config | None:
    """The fastest of the candidates that work; None if none could be timed."""
    call, copies = call_of(subject, clock.target)
    wanted = _flat(call(0))
    scale = wanted.abs().max().clamp_min(1e-30)
    runners = {}
    end = time.monotonic() + seconds
    for config in candidates(current(subject), subject.precision, most=most):
        if time.monotonic() > end:
            break
        try:
            with using(subject.family, config):
                error = float((_flat(call(0)) - wanted).abs().max() / scale)
                if not error <= TOLERANCE:
                    print(f"  {tuple(config)}: differs by {error:.2g}", flush=True)
                    continue
                runners[config] = clock.runner(call, copies)
        except Exception as error:  # does not compile, or does not fit
            text = (str(error).strip() or type(error).__name__).splitlines()
            print(f"  {tuple(config)}: {text[-1][:120]}", flush=True)
    # in a few rounds the hopeless are dropped, what is left is timed properly
    timed = clock.gpu({str(i): r for i, r in enumerate(runners.values())}, seconds / 8)
    ranked = sorted(timed, key=lambda i: timed[i].median)[:6]
    order = list(runners)
    final = clock.gpu({i: runners[order[int(i)]] for i in ranked}, seconds / 4)
    if not final:
        return None
    for i in sorted(final, key=lambda i: final[i].median):
        print(f"  {1e6 * final[i].median:9.2f} us  {tuple(order[int(i)])}", flush=True)
    return order[int(min(final, key=lambda i: final[i].median))]


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([x.detach().double().flatten() for x in parts])


def merged(entries: Iterable[Entry], found: dict[Subject, Config], gpu: str) -> list[Entry]:
    """The table with what was found; narrow entries first, as the first that fits wins."""
    keep = {(e.family, e.precision, e.rows, e.width): e for e in entries}
    for s, config in found.items():
        key = (s.family, s.precision, s.rows, s.width)
        keep[key] = Entry(*key, config, gpu)
    order = list(dict.fromkeys((e.family, e.precision) for e in keep.values()))

    def place(entry: Entry) -> tuple[float, ...]:
        return (
            order.index((entry.family, entry.precision)),
            entry.rows or math.inf,
            entry.width or math.inf,
        )

    return sorted(keep.values(), key=place)


def text_of(entries: Iterable[Entry]) -> str:
    """As the table is written: one line for each entry."""

    def short(config: Config) -> dict[str, int]:
        found = config._asdict()
        defaults = Config._field_defaults
        return {k: v for k, v in found.items() if k == "splits" or defaults.get(k) != v}

    lines = [json.dumps({**e._asdict(), "config": short(e.config)}) for e in entries]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


def compiled_ahead(arguments: Sequence[str], seconds: float) -> None:
    """Let several processes compile all candidates: Triton keeps what they make."""
    workers = max(1, min(8, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "bench.gpu.tune", *arguments]
    running = [subprocess.Popen([*command, "--compile", f"{i}/{workers}"]) for i in range(workers)]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def compile_share(chosen: Sequence[Subject], target: Target, share: str, most: int) -> None:
    first, workers = (int(part) for part in share.split("/"))
    for subject in chosen:
        call, _ = call_of(subject, target)
        for config in candidates(current(subject), subject.precision, most=most)[first::workers]:
            try:
                with using(subject.family, config):
                    call(0)
                target.synchronize()
            except Exception:  # reported by the process that times
                continue
        target.clear()


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--family", nargs="+", choices=list(_PLACES), default=list(_PLACES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS,
                        default=["fp16", "fp16x3", "bf16", "tf32", "fp32"])  # fmt: skip
    parser.add_argument("--width", nargs="+", type=int, default=[512])
    parser.add_argument("--most", type=int, default=32, help="candidates for an entry")
    parser.add_argument("--out", type=Path, default=configs.TABLE)
    parser.add_argument("--compile", metavar="I/N", help="compile a share of the candidates, only")
    parser.add_argument("--list", action="store_true", help="what would be timed, only")
    options = parser.parse_args(given)
    chosen = subjects(options.family, options.precision, options.width)
    if options.list:
        for s in chosen:
            print(f"{s.name}: {len(candidates(current(s), s.precision, most=options.most))}")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to time", file=sys.stderr)
        return 2
    target = Target(torch.device("cuda", 0))
    torch.set_float32_matmul_precision("highest")
    if options.compile:
        compile_share(chosen, target, options.compile, options.most)
        return 0
    return _tune_all(chosen, target, options, given)


def _tune_all(
    chosen: Sequence[Subject], target: Target, options: argparse.Namespace, given: Sequence[str]
) -> int:
    end = time.monotonic() + options.seconds
    compiled_ahead(given, options.seconds / 2)
    clock, gpu, table = Clock(target), torch.cuda.get_device_name(0), configs.entries()
    found: dict[Subject, Config] = {}
    write: Callable[[], object] = lambda: write_text(  # noqa: E731
        options.out, text_of(merged(table, found, gpu))
    )
    for i, subject in enumerate(chosen):
        left = end - time.monotonic()
        if left <= 0:
            print(f"no time for {len(chosen) - i} of {len(chosen)} entries")
            break
        print(subject.name, flush=True)
        best = tune(subject, clock, left / (len(chosen) - i), options.most)
        if best is not None:
            found[subject] = best
            write()
        target.clear()
    print(f"{len(found)} entries timed: {options.out}")
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
