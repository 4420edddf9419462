"""What the C++ extension is made of: its sources, its flags and the key of a finished build.

The one place that says so, for the compile at first use, for ``fastood build``, for ``setup.py``
(which loads this file by its path, so it needs neither torch nor the rest of fastood to be
importable) and for the tests.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastood.ops.compile import Built

__all__ = [
    "KEY_MARK",
    "Extension",
    "build",
    "build_folder",
    "cpu_extension",
    "csrc_folder",
    "cuda_extension",
    "define_key",
    "flags_for",
    "instruction_set",
    "key",
    "torch_version",
    "version_of",
]

KEY_MARK = "fastood-build-key:"
"""In every library, directly before its key, so that a file tells its key without being loaded."""

_FORMAT = 1  # of the key and of what lies in a build folder; raise it when either changes

# No -march: every instruction set is in the library, chosen at run time. No -std: Torch adds the
# one its headers need (17 up to 2.6, 20 in 2.15). No fast-math: scores have to see infinities and
# to be the same on every machine of one kind. -g0: Python's own flags would ask for debug symbols.
# -ffp-contract=off: what is to be one fused multiply-add is written as one, and nothing else is, so
# that a number does not depend on where the compiler inlined its formula.
_CFLAGS = (
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)

# -fopenmp is missing on purpose: it would add a libgomp of this machine's beside the one torch has
# loaded. What the compiler left open (GOMP_parallel, ...) resolves to torch's, whatever it is
# called (libgomp.so.1, libgomp-a34b3233.so.1, or the libomp of conda, which has the same names).
_LDFLAGS: tuple[str, ...] = ()

# For nvcc. One architecture a library, by its machine code alone: a build is found by the
# architecture of a device, and what was never compiled for it should not be translated silently.
# -Xptxas -v: registers and spills are in every log, where the tests look. No --use_fast_math: see
# above. The CUDA runtime is linked in (nvcc's default): the library then fits any torch.
_NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
)


@dataclass(frozen=True)
class Extension:
    """A library to compile: a pybind11 module, or with ``arch`` plain functions by nvcc.

    Args:
        name: its name within ``fastood``, as ``PyInit_<name>`` of a module has it.
        sources: the files to compile; no two may share a name, their objects lie in one folder.
        headers: files the sources include; part of the key, as are the sources.
        include: folders in which headers are found.
        cflags: for the compiler.
        ldflags: for the linker.
        arch: the GPU architecture it is for, ``9.0``; it then depends on neither torch nor Python.

    Raises:
        ValueError: if two sources share a name, or ``arch`` is no architecture.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    include: tuple[Path, ...] = ()
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    arch: str = ""

    def __post_init__(self) -> None:
        names = [source.stem for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: expected files of different names, got {sorted(names)}")
        if self.arch and not re.fullmatch(r"\d+\.\d[a-z]?", self.arch):
            raise ValueError(
                f"arch: expected a compute capability such as 8.0 or 9.0, got {self.arch!r}"
            )

    @property
    def label(self) -> str:
        """What people and file names call it."""
        return self.name.strip("_")


def csrc_folder() -> Path:
    """Where the C++ sources are: ``fastood/_csrc`` of a wheel, ``csrc`` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_csrc"
    return shipped if shipped.is_dir() else package.parent / "csrc"


def cpu_extension(csrc: Path | None = None) -> Extension:
    """The CPU kernels: ``csrc/bind.cpp`` and every ``csrc/cpu/*.cpp``.

    Raises:
        FileNotFoundError: if the sources are not there.
    """
    folder = csrc_folder() if csrc is None else csrc
    bind = folder / "bind.cpp"
    if not bind.is_file():
        raise FileNotFoundError(2, "no C++ sources of fastood", str(bind))
    headers = (h for h in folder.rglob("*.h") if h.relative_to(folder).parts[0] != "cuda")
    # macOS: its compiler has no omp.h; one thread there
    cflags = tuple(f for f in _CFLAGS if f != "-fopenmp" or sys.platform == "linux")
    return Extension(
        name="_cpu",
        sources=(bind, *sorted(folder.glob("cpu/*.cpp"))),
        headers=tuple(sorted(headers)),
        include=(folder,),
        cflags=cflags,
        ldflags=_LDFLAGS,
    )


def cuda_extension(arch: str, csrc: Path | None = None) -> Extension:
    """The CUDA kernels, every ``csrc/cuda/*.cu``, for one architecture.

    Args:
        arch: the compute capability of the device, ``8.0``, ``9.0``, ...

    Raises:
        FileNotFoundError: if the sources are not there.
        ValueError: if ``arch`` is no compute capability.
    """
    folder = (csrc_folder() if csrc is None else csrc) / "cuda"
    sources = tuple(sorted(folder.glob("*.cu")))
    if not sources:
        raise FileNotFoundError(2, "no CUDA sources of fastood", str(folder))
    number = arch.replace(".", "")
    return Extension(
        name="_cuda",
        sources=sources,
        headers=tuple(sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])),
        include=(folder,),
        cflags=(*_NVCC_FLAGS, "-gencode", f"arch=compute_{number},code=sm_{number}"),
        arch=arch,
    )


def key(extension: Extension) -> str:
    """20 hexadecimal digits that change with whatever a build depends on.

    Sources and headers (name and content, not place: a wheel and a checkout agree), flags, torch,
    Python, platform, C library and CPU instruction set; of one with ``arch``, that instead of
    torch, Python and the instruction set. Not the compiler: a finished build keeps working after
    its compiler has gone. Torch is not imported for it.

    Raises:
        OSError: if a source cannot be read.
    """
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)

    add(str(_FORMAT), extension.name, *_platform())
    if extension.arch:
        add("arch", extension.arch)
    else:
        add(*torch_version(), *_python(), instruction_set())
    add("cflags", *extension.cflags, "ldflags", *extension.ldflags)
    for kind, files in (("sources", extension.sources), ("headers", extension.headers)):
        add(kind)
        for file in files:
            add(file.name, file.read_bytes())
    return digest.hexdigest()[:20]


def define_key(value: str) -> str:
    """The flag that bakes the key in; ``csrc/build_info.h`` writes it behind ``KEY_MARK``."""
    return f"-DFASTOOD_BUILD_KEY=k{value}"


def flags_for(extension: Extension, compiler: str) -> list[str]:
    """The compiler flags of ``extension`` that suit a compiler, by what it says of its version.

    Clang's OpenMP calls another runtime than torch's, whose threads torch does not know: without
    ``-fopenmp``, ``csrc/parallel.h`` starts torch's own.
    """
    if extension.arch or "clang" not in compiler:
        return list(extension.cflags)
    return [flag for flag in extension.cflags if flag not in ("-fopenmp", "-Wno-psabi")]


def version_of(compiler: str) -> str:
    """What a compiler says of its version, in one line; empty if it says nothing."""
    try:
        done = subprocess.run(
            [*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False
        )
    except (OSError, ValueError):
        return ""
    return " ".join(done.stdout.split("\n")[0].split())


def build_folder() -> Path:
    """Where finished builds are kept: ``kernels`` in the folder of the feature cache."""
    chosen = os.environ.get("FASTOOD_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    from platformdirs import user_cache_path

    return user_cache_path("fastood", appauthor=False) / "kernels"


def build(extension: Extension, *, folder: Path | None = None, force: bool = False) -> Built:
    """The finished build of ``extension``, compiled now if there is none (or with ``force``).

    Args:
        extension: what to compile.
        folder: where builds are kept; default ``build_folder()``.
        force: compile even if a finished build is there.
    Raises:
        BuildError: if it cannot be compiled or kept; the message has the reason, the remedy and
            the log.
    """
    from fastood.ops.compile import build

    return build(extension, folder=build_folder() if folder is None else folder, force=force)


@cache
def torch_version() -> tuple[str, str]:
    """Version and commit of torch, read from its version file: importing it takes seconds.

    Raises:
        ImportError: if torch is not installed.
    """
    module = sys.modules.get("torch")
    spec = getattr(module, "__spec__", None) or importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("torch is not installed", name="torch")
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.MULTILINE)
    commit = re.search(r"^git_version = ['\"](.+?)['\"]", text, re.MULTILINE)
    return version[1] if version else text, commit[1] if commit else ""


def _python() -> tuple[str, str]:
    return sys.implementation.cache_tag or "", str(sysconfig.get_config_var("SOABI"))


def _platform() -> tuple[str, str, str]:
    try:  # a library built against a newer C library does not load with an older one
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        libc = ""
    return sys.platform, platform.machine(), libc


@cache
def instruction_set() -> str:
    """The widest vectors of this CPU that fastood has code for: avx512, avx2, generic.

    From the first CPU of ``/proc/cpuinfo``; ``generic`` where there is none. A home folder may be
    shared by machines of both kinds.
    """
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
            flags = next((set(s.split()) for s in lines if s.startswith("flags")), set())
    except OSError:
        flags = set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "generic"
