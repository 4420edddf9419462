"""The CUDA library of a GPU architecture: found built, or compiled now, loaded through ctypes.

Its functions are ``csrc/cuda/api.h``; the structures here mirror ``csrc/cuda/rows.h``. Importing
this module does nothing. ``fastood.ops.loader`` has the functions to call.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

from fastood.errors import BuildError
from fastood.ops.build import Extension, build_folder, cuda_extension, key
from fastood.ops.buildstore import BuildStore, Built

__all__ = [
    "MAX_REQUESTS",
    "MAX_TAUS",
    "MAX_TOPS",
    "Library",
    "Request",
    "RowJob",
    "RowPlan",
    "cuda_build",
    "find_cuda",
    "load",
    "own_key",
    "settled",
]

MAX_TAUS, MAX_TOPS, MAX_REQUESTS = 16, 16, 32


class Request(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("tau", ctypes.c_int32),
        ("c", ctypes.c_int32),
        ("flag", ctypes.c_int32),
        ("reset", ctypes.c_double),
    )


class RowJob(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("B", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("c", ctypes.c_int32),
        ("T", ctypes.c_int32),
        ("R", ctypes.c_int32),
        ("moments", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("neg_entropy", ctypes.c_void_p),
        ("variance", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("taus", ctypes.c_double * MAX_TAUS),
        ("requests", Request * MAX_REQUESTS),
    )


class RowPlan(ctypes.Structure):
    _fields_ = (
        ("list", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("grid", ctypes.c_int64),
        ("segment", ctypes.c_int64),
        ("workspace_bytes", ctypes.c_int64),
    )


_P, _I, _L, _U = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_FUNCTIONS = {
    "fastood_rows_plan": (_I, (_P, _P)),
    "fastood_rows": (_I, (_P, _P)),
    "fastood_eigen_load": (_I, (ctypes.c_char_p,)),
    "fastood_eigen_workspace": (_I, (_I, _L, _L, _P, _P, _P, _P)),
    "fastood_eigen": (_I, (_I, _L, _L, _P, _P, _P, _U, _P, _U, _P, _P)),
    "fastood_message": (ctypes.c_char_p, (_I,)),
    "fastood_layout": (_L, (_I,)),
    "fastood_key": (ctypes.c_char_p, ()),
}


class Library:
    """The functions of ``csrc/cuda/api.h`` in a library file.

    Raises:
        OSError: if it does not load.
        BuildError: if its structures are not those of this Python code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        expected = (ctypes.sizeof(RowJob), ctypes.sizeof(RowPlan), ctypes.sizeof(Request))
        found = tuple(self.functions.fastood_layout(i) for i in range(3))
        if found != expected or self.functions.fastood_layout(4) != RowJob.requests.offset:
            raise BuildError(f"cuda kernels: {path} has other structures than fastood: {found}")
        self.rows_plan = self.functions.fastood_rows_plan
        self.rows = self.functions.fastood_rows

    @property
    def key(self) -> str:
        return str(self.functions.fastood_key().decode())

    def message(self, status: int) -> str:
        """A status in words."""
        return str(self.functions.fastood_message(status).decode())


@dataclass(frozen=True)
class _Failed:
    reason: str


_found: dict[str, Library | _Failed] = {}  # by architecture of the device
_lock = threading.RLock()


def load(arch: str) -> Library:
    """The library for devices of ``arch``, compiled at the first call on this machine.

    Raises:
        BuildError: if there is none and none can be made; from then on at every call.
    """
    found = _found.get(arch)
    if found is None:
        with _lock:
            found = _found.get(arch)
            if found is None:
                try:
                    found = _load(arch)
                except BuildError as error:
                    found = _Failed(str(error))
                _found[arch] = found
    if isinstance(found, _Failed):
        raise BuildError(found.reason)
    return found


def _load(arch: str) -> Library:
    from fastood.ops.loader import may_compile

    built = find_cuda(arch)
    if built is None:
        if not may_compile():
            raise BuildError(
                f"cuda kernels: not compiled yet for {arch}, and FASTOOD_JIT=0 forbids it at first "
                "use; run fastood build --cuda, or unset FASTOOD_JIT"
            )
        built = cuda_build(arch)
    try:
        library = Library(built.path)
    except (OSError, AttributeError) as error:
        raise BuildError(
            f"cuda kernels: {built.path} does not load: {error}; fastood build --cuda --force "
            "compiles it again"
        ) from error
    BuildStore(build_folder(), "cuda").used(built)
    return library


def cuda_build(arch: str, *, force: bool = False) -> Built:
    """The finished build for ``arch``, compiled now if there is none; loads nothing.

    Raises:
        BuildError: if it cannot be compiled.
        ValueError: if ``arch`` is no compute capability.
    """
    from fastood.ops.build import build

    return build(_extension(arch), force=force)


def find_cuda(arch: str) -> Built | None:
    """A finished build that runs on ``arch``: its own, else of an earlier one of its generation.

    Machine code for 8.0 runs on 8.6 and 8.9.
    """
    major, _, minor = arch.partition(".")
    store = BuildStore(build_folder(), "cuda")
    for lower in range(int(minor), -1, -1) if minor.isdigit() else ():
        extension = _extension(f"{major}.{lower}")
        found = store.find(_key(extension))
        if found is not None:
            return found
    return None if minor.isdigit() else store.find(_key(_extension(arch)))


def own_key(arch: str) -> str:
    """The key of a build for ``arch`` itself.

    Raises:
        BuildError: if the sources are not there.
    """
    return _key(_extension(arch))


def settled(arch: str) -> Library | str | None:
    """What ``load`` has found for ``arch``, or why it failed; None if nobody asked yet."""
    found = _found.get(arch)
    return found.reason if isinstance(found, _Failed) else found


def _extension(arch: str) -> Extension:
    try:
        return cuda_extension(arch)
    except OSError as error:
        raise BuildError(
            f"cuda kernels: {error.filename}: {error.strerror}; the installation of fastood is "
            "incomplete"
        ) from error


def _key(extension: Extension) -> str:
    try:
        return key(extension)
    except OSError as error:
        raise BuildError(f"cuda kernels: {error}") from error


def after_fork() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
