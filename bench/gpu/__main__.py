"""Measure everything that time allows: see ``python -m bench.gpu --help``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch

from bench.gpu import facts
from bench.gpu.cases import CASES, Case
from bench.gpu.ceilings import measured
from bench.gpu.clock import Clock
from bench.gpu.inputs import Target
from bench.gpu.measure import Broken, build, count_launches, measure
from bench.gpu.page import summary, template
from bench.gpu.store import Store
from bench.gpu.work import OURS

BROKEN = 75
"""Exit status of a run whose device stopped answering: ``--resume`` goes on behind the culprit."""
NO_GPU = 2

_CASE_S = (0.5, 12.0)
_HANGS_S = 75.0
_LAUNCHES_S = 8.0


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench") / "results")
    parser.add_argument("--seconds", type=float, default=200.0, help="for everything together")
    parser.add_argument("--only", default="", help="regular expression: cases to measure")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run began")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: tiny sizes")
    parser.add_argument("--warm", metavar="I/N", help="compile what every N-th case needs, only")
    parser.add_argument("--template", action="store_true", help="the page without numbers, only")
    parser.add_argument("--summary", action="store_true", help="of what is there, only")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.template:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "nvidia-h200.md"
        path.write_text(template("NVIDIA H200"), encoding="utf-8")
        print(path)
        return 0
    gpu = torch.cuda.is_available()
    if not gpu and not options.dry_run:
        print("no CUDA device: nothing to measure (--dry-run runs tiny sizes)", file=sys.stderr)
        return NO_GPU
    cases = [c for c in CASES if re.search(options.only, c.name)]
    target = Target(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    known = facts.describe()
    name = facts.file_name(known["gpu"])
    if options.summary:
        store = Store.resumed(options.out, name, known)
        begun = {row["case"] for row in store.rows}
        print("\n".join(summary(known, store.rows, [c for c in cases if c.name not in begun])))
        return 0
    torch.set_float32_matmul_precision("highest")
    if options.warm:
        return warm(cases, target, options.warm)
    store = Store.resumed(options.out, name, known) if options.resume else Store(
        options.out, name, known
    )  # fmt: skip
    return run(cases, target, store, options.seconds)


def run(cases: list[Case], target: Target, store: Store, seconds: float) -> int:
    """Measure ``cases`` in turn; 0 if all of fastood was right."""
    end = time.monotonic() + seconds
    clock = Clock(target)
    store.save()
    ceilings = measured(clock, min(4.0, seconds / 20))
    store.ceilings = ceilings.record()
    target.clear()
    reserve = min(_LAUNCHES_S, seconds / 20)
    todo = [case for case in cases if case.name not in store.started]
    for i, case in enumerate(todo):
        left = end - reserve - time.monotonic()
        if left <= 0:
            break
        share = min(_CASE_S[1], max(_CASE_S[0], 0.6 * left / (len(todo) - i)))
        share = share if target.gpu else _CASE_S[0]
        store.started.append(case.name)
        store.save()
        dog = _watch(store, case)
        try:
            torch.compiler.reset()
            rows = measure(build(case, target), clock, ceilings, share)
        except Broken as error:
            return _broken(store, case, f"the device stopped answering: {error}")
        except Exception as error:
            rows = [_failed(case, f"{type(error).__name__}: {str(error)[:300]}")]
        finally:
            dog.cancel()
        store.rows += rows
        store.save()
        _say(case, rows)
        target.clear()
    _count_launches(cases, target, store, end)
    store.facts |= facts.clocks()
    store.finished = True
    store.save()
    ours = [r for r in store.rows if r["role"] == "ours"]
    return 1 if any("wrong" in r or "failed" in r for r in ours) or not ours else 0


def _count_launches(cases: list[Case], target: Target, store: Store, end: float) -> None:
    """Of the cases that have goals for it, or that there is time for."""
    for case in sorted(cases, key=lambda c: not c.goals):
        rows = [r for r in store.rows if r["case"] == case.name]
        mark = f"launches of {case.name}"
        if time.monotonic() > end or not rows or mark in store.started:
            continue
        store.started.append(mark)
        store.save()
        dog = _watch(store, case)
        try:
            count_launches(case, rows, target)
        except Exception as error:
            print(f"launches of {case.name}: {error}", file=sys.stderr)
        finally:
            dog.cancel()
        store.save()
        target.clear()


def warm(cases: list[Case], target: Target, share: str) -> int:
    """One call of everything in every N-th case from the I-th: compilers keep what they make."""
    first, step = (int(part) for part in share.split("/"))
    for case in cases[first::step]:
        torch.compiler.reset()
        try:
            for variant in build(case, target).variants:
                if variant.role in ("ours", "optional") or variant.name == "compile":
                    _try(lambda v=variant: v.call(0), f"{case.name} {variant.name}")
            target.synchronize()
        except Exception as error:
            print(f"{case.name}: {str(error)[:300]}", file=sys.stderr)
            return 1
        target.clear()
    return 0


def _try(call, what: str) -> None:
    try:
        call()
    except Exception as error:  # it is reported where it is measured
        print(f"{what}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def _watch(store: Store, case: Case) -> threading.Timer:
    """Ends the process if a case hangs: a kernel that never ends cannot be interrupted."""

    def bark() -> None:
        _broken(store, case, f"not finished after {_HANGS_S:.0f} s")
        os._exit(BROKEN)

    timer = threading.Timer(_HANGS_S, bark)
    timer.daemon = True
    timer.start()
    return timer


def _broken(store: Store, case: Case, reason: str) -> int:
    store.rows.append(_failed(case, reason))
    store.save()
    print(f"{case.name}: {reason}", file=sys.stderr)
    return BROKEN


def _failed(case: Case, reason: str) -> dict[str, object]:
    return {"case": case.name, "variant": OURS, "role": "ours", "failed": reason}


def _say(case: Case, rows: list[dict[str, object]]) -> None:
    """One line a case, as it goes."""
    said = []
    for row in rows:
        times = row.get("gpu_us")
        what = f"{times[0]:.1f}" if isinstance(times, list) else "-"
        said.append(f"{row['variant']} {what}")
    print(f"{case.name}, us: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
