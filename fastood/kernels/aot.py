"""Compiles every committed configuration without a GPU, and says what each needs of one.

    python -m fastood.kernels.aot [--arch 80] [--arch 90] [--family rows] [--precision fp16]
        [--width 512] [--calls 2] [--jobs 2] [--json FILE]

Signatures are not written down a second time. Each family's own launchers are called with tensors
of the CPU while a stand-in for the driver names the GPU: arguments go through Triton's own binder,
which finds types, alignments and constants just as for a real launch; the kernel is compiled and
not started. What a family (a module named like the ``family`` of its entries, or like the part of
it before the first underscore) has to define for this::

    def specialisations(
        precision: Precision, rows: int, width: int
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        image = torch.empty(rows, width, dtype=...)
        text = Operand(precision, ...)
        for c in (1, 2, 4, 8):
            yield f"c={c}", partial(statistics, image, text, taus=(0.01,), c=c, ...)

that is, the most demanding first: a label and a call for everything public that launches another
kernel, or the same one with other constants, at the sizes the entry is for: ``rows`` images (or
B P patches) of ``width``, and as many classes as it takes for every splitting and merging kernel
(1,000 will do). The calls take plain CPU tensors, uninitialised ones are good enough (nothing is
computed: outputs keep what ``torch.empty`` left in them, so nothing may depend on their values);
``pick`` answers from the table and ``processors`` as on an A100 or H100. Entries that no call picks
are reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor

from fastood.kernels import configs, launch
from fastood.kernels.configs import Config, Entry
from fastood.kernels.operands import Operand, native, prepare
from fastood.kernels.precision import PRECISIONS, Precision

__all__ = [
    "SHARED",
    "Compiled",
    "Unit",
    "compile_all",
    "compile_unit",
    "recording",
    "specialisations_of",
    "units",
]

SHARED = {80: 166_912, 90: 232_448}
"""Shared memory of one block, bytes, by compute capability."""

_SHARED_OF_PROCESSOR = {80: 167_936, 90: 233_472}  # of which each program takes 1 KiB more
_PROCESSORS = {80: 108, 90: 132}
_WIDTHS = (512, 768)
_WIDEST = 1024  # for families whose entries differ by width
_ROWS = 8192  # when an entry is for any number
_OF_INTEREST = ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDL", "STL")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


Call = tuple[str, Callable[[], object]]
Specialisations = Callable[[Precision, int, int], Iterable[Call]]


class Unit(NamedTuple):
    """One entry of the table at one width for one GPU."""

    entry: Entry
    rows: int
    width: int
    arch: int


@dataclass
class Compiled:
    """What one kernel needs."""

    family: str
    precision: str
    config: Config
    width: int
    arch: int
    label: str
    kernel: str = ""
    warps: int = 0
    stages: int = 0
    shared: int = 0
    """Bytes of a block."""
    registers: int = 0
    stack: int = 0
    """Bytes of a thread; registers that do not fit are kept there."""
    instructions: dict[str, int] = field(default_factory=dict)
    """How many there are, all and those of interest; LDL and STL read and write the stack."""
    seconds: float = 0.0
    """Of processors, not of the clock; almost nothing if Triton's cache has it."""
    digest: str = ""
    error: str = ""

    @property
    def problems(self) -> list[str]:
        """Why this must not be committed; empty if it may."""
        found = [self.error] if self.error else []
        if self.shared > SHARED.get(self.arch, self.shared):
            found.append(f"{self.shared} bytes of shared memory, there are {SHARED[self.arch]}")
        moves = self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)
        if moves or self.stack:
            found.append(f"spills: {self.stack} bytes of stack, {moves} moves")
        return found

    @property
    def resident(self) -> int:
        """Programs that fit a processor side by side: its registers, shared memory and threads."""
        threads = 32 * self.warps
        if not threads * self.registers:
            return 0
        registers = -(-self.registers // 8) * 8
        of_shared = _SHARED_OF_PROCESSOR[self.arch] // (self.shared + 1024)
        return min(32, 2048 // threads, 65536 // (registers * threads), of_shared)

    @property
    def record(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "resident": self.resident, "problems": self.problems}

    @property
    def line(self) -> str:
        """For people."""
        mix = " ".join(f"{k} {v}" for k, v in self.instructions.items() if v)
        return (
            f"sm_{self.arch} {self.family} {self.precision} D={self.width} {self.label}: "
            f"{self.kernel} {tuple(self.config)} warps {self.warps} stages {self.stages} "
            f"shared {self.shared} registers {self.registers} resident {self.resident} {mix} "
            f"({self.seconds:.1f} s)" + "".join(f"\n    !! {problem}" for problem in self.problems)
        )


class _Driver:
    """What Triton asks of a driver before it starts a kernel, where there is no GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


Seen = Callable[[Any, "Any | None", float, str], None]


@contextmanager
def recording(arch: int, seen: Seen) -> Iterator[None]:
    """Inside, kernels are compiled for ``arch`` and handed to ``seen(function, compiled, seconds,
    error)`` instead of being started."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        start = _spent()
        compiled, error = None, ""
        try:
            compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        except Exception as e:  # whatever a compiler says is what is asked for
            error = "\n".join(f"{type(e).__name__}: {e}".strip().splitlines()[-6:])
        seen(self, compiled, _spent() - start, error)

    before = dict(vars(driver))
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for name, module in list(sys.modules.items()):
            if name.startswith("fastood.kernels.") and hasattr(module, "processors"):
                patches.enter_context(
                    mock.patch.object(module, "processors", lambda device: _PROCESSORS[arch])
                )
        driver.set_active(_Driver(arch))
        try:
            yield
        finally:
            vars(driver).update(before)


def _global_scores(precision: Precision, rows: int, width: int) -> Iterator[Call]:
    """As ``specialisations`` of ``fastood.kernels.rows``."""
    from fastood.kernels import rows as family
    from fastood.ops.requests import Kind, Request

    text = family_text(precision, 1000, width)
    own = torch.empty(rows, width, dtype=native(precision))

    def delta(image: Tensor, c: int, taus: Sequence[float] = (0.01,), **options: Any) -> Call:
        requests = tuple(Request(Kind.DELTA_ENERGY, tau, c) for tau in taus)
        options = {"normalize": True, **options}
        label = f"{image.dtype} c={c} taus={len(taus)} {options}".removeprefix("torch.")
        return label, partial(family.scores, requests, image, text, **options)

    several = (0.01, 0.1, 1.0, 2.0)
    yield delta(own, 8)
    yield delta(own, 8, several)
    yield delta(own, 1, several, normalize=False)
    yield delta(own, 1, several)
    yield delta(own, 8, [0.01 * (i + 1) for i in range(16)])
    yield from (delta(own, c) for c in (1, 2, 4))
    if own.dtype != torch.float32:  # asked for with float32 features
        yield from (delta(own.float(), c) for c in (8, 1))
    statistics = partial(family.statistics, own, text, taus=(0.01,), normalize=True)
    yield "statistics", partial(statistics, c=2, moments=False)
    yield "moments", partial(statistics, c=1, moments=True)


def _given_scores(precision: Precision, rows: int, width: int) -> Iterator[Call]:
    """The same of similarities: ``width`` classes."""
    from fastood.kernels import rows as family
    from fastood.ops.requests import Kind, Request

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for c in (8, 1):
            requests = (Request(Kind.DELTA_ENERGY, 0.01, c), Request(Kind.NEG_ENTROPY, 1.0))
            similarity = torch.empty(rows, width, dtype=dtype)
            label = f"{dtype} c={c}".removeprefix("torch.")
            yield label, partial(family.similarity_scores, requests, similarity)


def family_text(precision: Precision, classes: int, width: int) -> Operand:
    """Classes as ``prepare`` returns them."""
    return prepare(torch.empty(classes, width), precision, normalize=True)


_CALLS: dict[str, Specialisations] = {"rows": _global_scores, "given": _given_scores}


def specialisations_of(family: str) -> Specialisations:
    """The function described above."""
    if family in _CALLS:
        return _CALLS[family]
    for name in (family, family.split("_")[0]):
        if importlib.util.find_spec(f"fastood.kernels.{name}") is not None:
            module = importlib.import_module(f"fastood.kernels.{name}")
            calls: Specialisations = module.specialisations
            return calls
    raise ModuleNotFoundError(f"configs.json names the family {family!r}, which has no module")


def units(
    archs: Iterable[int] = (80, 90), families: Iterable[str] = (), precisions: Iterable[str] = ()
) -> list[Unit]:
    """Everything to compile, at rows and widths for which the table gives just that entry."""
    of_families, of_precisions = set(families), set(precisions)
    table = [
        e
        for e in configs.entries()
        if (not of_families or e.family in of_families)
        and (not of_precisions or e.precision in of_precisions)
    ]
    by_width = {e.family for e in table if e.width is not None}
    found = []
    for e in table:
        rows = e.rows if e.rows is not None else _ROWS
        for width in (*_WIDTHS, _WIDEST) if e.family in by_width else _WIDTHS:
            if configs._entry(e.family, e.precision, rows, width) is e.config:
                found += [Unit(e, rows, width, arch) for arch in archs]
    return found


def compile_unit(unit: Unit, calls: int | None = None) -> list[Compiled]:
    """Every kernel that the calls of the unit's family launch, or the first ``calls`` of them."""
    entry = unit.entry
    precision = cast(Precision, entry.precision)
    found: dict[str, Compiled] = {}
    picked: set[Config] = set()
    label = ""

    def new(**what: Any) -> Compiled:
        return Compiled(
            entry.family, entry.precision, entry.config, unit.width, unit.arch, label, **what
        )

    def seen(function: Any, compiled: Any | None, seconds: float, error: str) -> None:
        name = function.fn.__name__
        if compiled is None:
            found[f"{name} {label}"] = new(kernel=name, seconds=seconds, error=error)
        elif compiled.hash not in found:
            meta = compiled.metadata
            found[compiled.hash] = new(
                kernel=name,
                warps=meta.num_warps,
                stages=meta.num_stages,
                shared=meta.shared,
                seconds=seconds,
                digest=compiled.hash,
                **_of_binary(compiled.asm["cubin"]),
            )

    original = configs._entry

    def noted(*key: Any) -> Config:
        config = original(*key)
        if key[0] == entry.family:
            picked.add(config)
        return config

    try:
        with recording(unit.arch, seen), mock.patch.object(configs, "_entry", noted):
            every = specialisations_of(entry.family)(precision, unit.rows, unit.width)
            for label, call in islice(every, calls):  # noqa: B007
                call()
        if entry.config not in picked:
            found["unpicked"] = new(error="no call picks this entry")
    except Exception as e:
        found["calls"] = new(error=f"{type(e).__name__}: {e}")
    return list(found.values())


def _spent() -> float:
    """Seconds of processors that this process and what it started have taken."""
    return sum(os.times()[:4])


def _of_binary(binary: bytes) -> dict[str, Any]:
    """Registers, stack and instructions of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", "-sass", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = {name: int(number) for name, number in _RESOURCE.findall(text)}
    opcodes = Counter(_OPCODE.findall(text))
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "instructions": {
            "all": opcodes.total(),
            **{name: opcodes[name] for name in _OF_INTEREST if opcodes[name]},
        },
    }


def _tool(name: str) -> str:
    import triton.backends.nvidia as backend

    path = Path(next(iter(backend.__path__))) / "bin" / name
    return str(path) if path.exists() else name


def compile_all(
    work: Sequence[Unit], jobs: int = 1, calls: int | None = None
) -> Iterator[Compiled]:
    """The units' kernels, each once."""
    one = partial(compile_unit, calls=calls)
    digests = set()
    with ExitStack() as stack:
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context))
            results: Iterable[list[Compiled]] = pool.map(one, work)
        else:
            results = map(one, work)
        for result in results:
            for compiled in result:
                if not compiled.digest or compiled.digest not in digests:
                    digests.add(compiled.digest)
                    yield compiled


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 1 if a kernel does not compile, does not fit or spills."""
    parser = argparse.ArgumentParser(prog="python -m fastood.kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED))
    families = sorted({entry.family for entry in configs.entries()})
    parser.add_argument("--family", action="append", choices=families, default=[])
    parser.add_argument("--precision", action="append", choices=PRECISIONS, default=[])
    parser.add_argument("--width", type=int, action="append", default=[])
    parser.add_argument("--calls", type=int, help="only the first, most demanding ones")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 turns kernels into NumPy: unset it")
    found = []
    work = units(options.arch or (80, 90), options.family, options.precision)
    work = [unit for unit in work if unit.width in (options.width or [unit.width])]
    if not work:
        parser.error("no entry of the table is of this family, precision and width")
    for compiled in compile_all(work, options.jobs, options.calls):
        print(compiled.line, flush=True)
        found.append(compiled)
    failed = sum(bool(compiled.problems) for compiled in found)
    print(f"{len(found)} kernels, {failed} with problems")
    if options.json:
        text = json.dumps([c.record for c in found], indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
