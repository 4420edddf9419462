"""The compiled kernels of this process: prebuilt, else built earlier, else compiled now.

``cpu()`` and ``cuda()`` raise when there are none, ``try_cpu()`` and ``try_cuda()`` warn once and
return None. Either way the answer is settled once a process (and GPU architecture): what was
loaded stays, a failure is not tried again. Importing this module does nothing.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastood.errors import BuildError
from fastood.ops import cudalib
from fastood.ops.build import KEY_MARK, Extension, build_folder, cpu_extension, key
from fastood.ops.buildstore import BuildStore, Built
from fastood.ops.cudalib import Library, cuda_build

__all__ = [
    "Status",
    "baked_key",
    "cpu",
    "cpu_build",
    "cuda",
    "cuda_arch",
    "cuda_build",
    "cuda_status",
    "may_compile",
    "status",
    "try_cpu",
    "try_cuda",
]

_module: ModuleType | None = None
_where: tuple[str, Path] | None = None  # "prebuilt" or "built", and the library
_failure: str | None = None
_refused: str | None = None
_warned = False
_warned_of: set[str] = set()  # GPU architectures
_lock = threading.Lock()


def cpu() -> ModuleType:
    """The compiled CPU kernels, compiled at the first call on this machine.

    Raises:
        BuildError: if there are none and none can be made; from then on at every call.
    """
    module = _module
    if module is not None:
        return module
    return _first()


def try_cpu() -> ModuleType | None:
    """The compiled CPU kernels, or None after one warning with reason and remedy."""
    module = _module
    if module is not None:
        return module
    global _warned
    try:
        return _first()
    except BuildError as error:
        if not _warned:
            _warned = True
            warnings.warn(f"{error}", RuntimeWarning, stacklevel=2)
        return None


def cuda_arch(device: int | None = None) -> str:
    """The architecture of a CUDA device, ``9.0``; of the current one by default.

    Raises:
        BuildError: if there is no such device.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError("cuda kernels: torch finds no CUDA device here")
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def cuda(device: int | None = None, *, arch: str | None = None) -> Library:
    """The CUDA kernels for a device (or architecture), compiled at the first call on this machine.

    Raises:
        BuildError: if there are none and none can be made; from then on at every call.
    """
    return cudalib.load(cuda_arch(device) if arch is None else arch)


def try_cuda(device: int | None = None, *, arch: str | None = None) -> Library | None:
    """The same, or None after one warning for an architecture, with reason and remedy."""
    try:
        return cuda(device, arch=arch)
    except BuildError as error:
        if str(error) not in _warned_of:
            _warned_of.add(str(error))
            warnings.warn(f"{error}", RuntimeWarning, stacklevel=2)
        return None


def cpu_build(*, force: bool = False) -> Built:
    """The finished build of the CPU kernels, compiled now if there is none; loads nothing.

    Raises:
        BuildError: if it cannot be compiled.
    """
    from fastood.ops.build import build

    return build(_extension(), force=force)


def _first() -> ModuleType:
    global _module, _where, _failure
    with _lock:
        if _module is not None:
            return _module
        if _failure is not None:
            raise BuildError(_failure)
        if _refused is not None:
            raise ValueError(_refused)
        try:
            _where, module = _load()
        except BuildError as error:
            _failure = str(error)
            raise
        _choose_instruction_set(module)
        _module = module
        return module


def _choose_instruction_set(module: ModuleType) -> None:
    """``FASTOOD_ISA``: the same numbers on different machines, or a comparison."""
    global _refused
    chosen = os.environ.get("FASTOOD_ISA")
    if chosen:
        try:
            module.choose_instruction_set(chosen)
        except ValueError as error:
            # kept: a second attempt would load the library, and register its operators, again
            _refused = f"FASTOOD_ISA: {error}"
            raise ValueError(_refused) from None


def _load() -> tuple[tuple[str, Path], ModuleType]:
    extension = _extension()
    wanted = _key(extension)
    prebuilt = _prebuilt(extension)
    if prebuilt is not None and baked_key(prebuilt) == wanted:
        try:
            return ("prebuilt", prebuilt), _import(extension, prebuilt)
        except ImportError as error:
            raise BuildError(
                f"{extension.label} kernels: {prebuilt} does not load: {error}; install fastood "
                "again, or without FASTOOD_BUILD=1"
            ) from error
    store = BuildStore(build_folder(), extension.label)
    built = store.find(wanted)
    if built is None:
        if not may_compile():
            raise BuildError(
                f"{extension.label} kernels: not compiled yet, and FASTOOD_JIT=0 forbids it at "
                "first use; run fastood build, or unset FASTOOD_JIT"
            )
        from fastood.ops.build import build

        built = build(extension)
    try:
        module = _import(extension, built.path)
    except ImportError as error:
        raise BuildError(
            f"{extension.label} kernels: {built.path} does not load: {error}; fastood build "
            "--force compiles it again"
        ) from error
    store.used(built)
    return ("built", built.path), module


def _extension() -> Extension:
    try:
        return cpu_extension()
    except OSError as error:
        raise BuildError(
            f"cpu kernels: {error.filename}: {error.strerror}; the installation of fastood is "
            "incomplete"
        ) from error


def _key(extension: Extension) -> str:
    try:
        return key(extension)
    except (OSError, ImportError) as error:
        raise BuildError(f"{extension.label} kernels: {error}") from error


def _import(extension: Extension, path: Path) -> ModuleType:
    """Load a library as the module of that name; torch's libraries have to be there first."""
    import torch

    del torch
    spec = importlib.util.spec_from_file_location(f"fastood.{extension.name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no extension module: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prebuilt(extension: Extension) -> Path | None:
    """The library that ``FASTOOD_BUILD=1 pip install`` put beside the package, if it did."""
    spec = importlib.util.find_spec(f"fastood.{extension.name}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def baked_key(library: Path) -> str | None:
    """The key written into a library, found without loading it (another torch might crash it)."""
    pattern = re.compile(re.escape(KEY_MARK.encode()) + rb"k([0-9a-f]{20})\0")
    try:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = pattern.search(content)
            return found[1].decode() if found else None
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None


def may_compile() -> bool:
    """Whether ``FASTOOD_JIT`` lets kernels be compiled at first use."""
    return os.environ.get("FASTOOD_JIT", "1").strip() != "0"


@dataclass(frozen=True)
class Status:
    """What this process uses, or would use, for CPU kernels.

    Args:
        state: ``loaded``, ``ready`` (finished, not loaded), ``to compile`` (at first use) or
            ``unavailable``.
        why: one line a person understands.
        kind: ``prebuilt`` or ``built`` where there is a library.
        path: the library.
        key: what a build has to be named to be used.
        info: what is known of how it was built (compiler, flags, seconds, bytes).
    """

    state: str
    why: str
    kind: str | None = None
    path: Path | None = None
    key: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


def status() -> Status:
    """What is loaded or would be, and why; compiles and loads nothing.

    Whether a compile at first use would succeed is not known before; that there is a compiler is.
    """
    try:
        extension = _extension()
        wanted = _key(extension)
    except BuildError as error:
        return Status("unavailable", str(error))
    aside = ""
    found: tuple[str, Path, dict[str, Any]] | None = None
    prebuilt = _prebuilt(extension)
    if prebuilt is not None:
        if baked_key(prebuilt) == wanted:
            found = ("prebuilt", prebuilt, {"bytes": prebuilt.stat().st_size})
        else:
            aside = (
                f"; {prebuilt.name} was prebuilt for other sources, torch, Python or CPU: ignored"
            )
    folder = build_folder()
    built = None if found else BuildStore(folder, extension.label).find(wanted)
    if built is not None:
        found = ("built", built.path, built.info)
    if _module is not None and _where is not None:
        kind, path = _where
        known = found[2] if found is not None and found[1] == path else {}
        return Status("loaded", f"{kind}{aside}", kind, path, wanted, known)
    if _failure is not None:
        return Status("unavailable", _failure + aside, key=wanted)
    if found is not None:
        kind, path, info = found
        why = "installed with fastood" if kind == "prebuilt" else "compiled earlier"
        return Status("ready", why + aside, kind, path, wanted, info)
    if not may_compile():
        why = "not compiled, and FASTOOD_JIT=0 forbids it at first use; run fastood build"
        return Status("unavailable", why + aside, key=wanted)
    from fastood.ops.compile import find_compiler

    try:
        compiler = find_compiler(extension.label)
    except BuildError as error:
        return Status("unavailable", f"{error}{aside}", key=wanted)
    why = f"compiled at first use, with {compiler}, into {folder}{aside}"
    return Status("to compile", why, key=wanted)


def cuda_status(arch: str) -> Status:
    """What devices of ``arch`` use or would use, and why; compiles and loads nothing."""
    try:
        wanted = cudalib.own_key(arch)
        built = cudalib.find_cuda(arch)
    except BuildError as error:
        return Status("unavailable", str(error))
    loaded = cudalib.settled(arch)
    if isinstance(loaded, str):
        return Status("unavailable", loaded, key=wanted)
    if built is not None:
        state = "ready" if loaded is None else "loaded"
        why = "built" if loaded is not None else "compiled earlier"
        return Status(state, why, "built", built.path, wanted, built.info)
    if not may_compile():
        why = "not compiled, and FASTOOD_JIT=0 forbids it at first use; run fastood build --cuda"
        return Status("unavailable", why, key=wanted)
    from fastood.ops.nvcc import find_nvcc

    try:
        nvcc = find_nvcc()
    except BuildError as error:
        return Status("unavailable", str(error), key=wanted)
    return Status("to compile", f"compiled at first use, with {nvcc}", key=wanted)


def _after_fork() -> None:
    """Another thread of the parent may have held the lock, and will not let go of it here."""
    global _lock
    _lock = threading.Lock()
    cudalib.after_fork()


if hasattr(os, "register_at_fork") and sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
