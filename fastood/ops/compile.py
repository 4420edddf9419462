"""Compiling an extension: once, in a process of its own, whatever is interrupted or killed.

``build`` looks for a finished build, takes the lock, looks again, and has a second Python
(``python -m fastood.ops.compile <folder>``) compile in a private folder, through
``torch.utils.cpp_extension`` or, for a GPU, by nvcc itself. That process also loads the result, so
that a library which does not load is an error there and never becomes the finished build; this one
then loads it exactly once, which matters because operators register while it loads. The private
folder is renamed when everything is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastood._version import __version__
from fastood.errors import BuildError
from fastood.ops.build import (
    Extension,
    define_key,
    flags_for,
    instruction_set,
    key,
    torch_version,
    version_of,
)
from fastood.ops.buildstore import BuildStore, Built, unwritable
from fastood.ops.nvcc import compile_library, find_nvcc, nvcc_version

__all__ = ["Built", "build", "find_compiler"]

_INSTEAD = "the reference works without (FASTOOD_IMPL=reference keeps this quiet)"


def build(extension: Extension, *, folder: Path, force: bool = False) -> Built:
    """See ``fastood.ops.build.build``."""
    try:
        wanted = key(extension)
    except (OSError, ImportError) as error:
        raise BuildError(f"{extension.label} kernels: {error}") from error
    store = BuildStore(folder, extension.label)
    found = None if force else store.find(wanted)
    if found is not None:
        return found
    compiler = find_nvcc() if extension.arch else find_compiler(extension.label)
    asked = time.time()
    note = f"waiting for fastood's {_label(extension)} kernels, which another process compiles"
    with store.lock(waiting=lambda: _say(note)):
        found = None if force else store.find(wanted)
        if found is not None:
            return found
        _stop_if_just_failed(extension.label, store.failed_log(wanted), asked)
        store.prune(wanted)
        try:
            scratch = store.scratch(wanted)
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            return _compile(extension, wanted, compiler, store, scratch)
        except OSError as error:  # a full disk
            raise unwritable(folder, error) from error
        finally:
            for left in (scratch, *folder.glob(f".building-{extension.label}-{wanted}-*")):
                shutil.rmtree(left, ignore_errors=True)


def find_compiler(label: str) -> str:
    """The C++ compiler as ``CXX`` names it, else c++, g++ or clang++ from the path.

    Raises:
        BuildError: if there is none.
    """
    asked = os.environ.get("CXX", "").strip()
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return name
    got = f"CXX={asked}, which is no program" if asked else "no c++, g++ or clang++ on the PATH"
    raise BuildError(
        f"{label} kernels: expected a C++ compiler, got {got}; install g++ "
        f"(apt install g++, conda install gxx) or set CXX; {_INSTEAD}"
    )


def _compile(
    extension: Extension, wanted: str, compiler: str, store: BuildStore, scratch: Path
) -> Built:
    log = scratch / "build.log"
    takes = "a minute" if extension.arch else "30 s"
    _say(f"compiling fastood's {_label(extension)} kernels, once, about {takes}: log {log}")
    start = time.monotonic()
    version = nvcc_version(compiler) if extension.arch else version_of(compiler)
    cflags = flags_for(extension, version)
    task = {
        "name": extension.name,
        "sources": [str(source) for source in extension.sources],
        "include": [str(folder) for folder in extension.include],
        "cflags": [*cflags, define_key(wanted)],
        "ldflags": list(extension.ldflags),
        "nvcc": compiler if extension.arch else None,
    }
    (scratch / "task.json").write_text(json.dumps(task), encoding="utf-8")
    code = _run(scratch, log, compiler)
    library = scratch / f"{extension.name}.so"
    said = scratch / "result.json"
    if code != 0 or not library.is_file() or not said.is_file():
        kept = store.failed_log(wanted)
        reason = _reason(log, code)
        with log.open("a", encoding="utf-8") as end:
            end.write(f"\nfastood: {reason}\n")
        log.replace(kept)
        raise BuildError(_failed(extension.label, reason, kept))
    if key(extension) != wanted:
        raise BuildError(f"{extension.label} kernels: the sources changed while they were compiled")
    info: dict[str, Any] = {
        "key": wanted,
        "fastood": __version__,
        **_made_for(extension),
        "compiler": version,
        "cflags": cflags,
        "ldflags": list(extension.ldflags),
        "sources": sorted(source.name for source in extension.sources),
        "seconds": round(time.monotonic() - start, 1),
        **json.loads(said.read_bytes()),
    }
    for file in scratch.iterdir():
        if file not in (library, log):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return store.publish(scratch, library.name, info)


def _made_for(extension: Extension) -> dict[str, str]:
    if extension.arch:
        return {"arch": extension.arch}
    return {
        "torch": torch_version()[0],
        "python": sys.version.split()[0],
        "instruction_set": instruction_set(),
    }


def _run(scratch: Path, log: Path, compiler: str) -> int:
    """The exit code of the second Python, which ends when this process ends, however that does."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise BuildError(f"kernels: expected a Python to compile with, got none; {_INSTEAD}")
    folders = [str(Path(sys.executable).parent)]  # a ninja from pip, in an environment not on PATH
    with contextlib.suppress(ImportError):
        import ninja

        folders.append(str(ninja.BIN_DIR))
    env = {
        **os.environ,
        "CXX": _one_word(compiler, scratch),
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]),
        "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p),
        "LC_ALL": "C",
    }
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "fastood.ops.compile", str(scratch)],
            cwd=scratch,
            env=env,
            stdin=subprocess.PIPE,  # never written: its end tells the child that we are gone
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the compilers it starts go with it
        )
        try:
            return child.wait()
        finally:
            if child.stdin is not None:
                child.stdin.close()
            _end(child)


def _one_word(compiler: str, scratch: Path) -> str:
    """``ccache g++`` as a program: several versions of torch take ``CXX`` for one file name."""
    words = shlex.split(compiler)
    if len(words) == 1:
        return words[0]
    program = scratch / "c++"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return str(program)


def _end(child: subprocess.Popen[bytes], patience: float = 2.0) -> None:
    """End the second Python and what it started, if it has not ended by itself.

    Ninja gives every compiler a process group of its own and ends them when it is asked to end
    (SIGTERM); killed, it would leave them running.
    """
    if child.poll() is not None:
        return
    patient = time.monotonic() + patience
    late = False
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        while not late:
            late = time.monotonic() > patient
            os.killpg(child.pid, signal.SIGKILL if late else signal.SIGTERM)
            child.poll()
            time.sleep(0.02)
    child.wait()


def _stop_if_just_failed(label: str, log: Path, asked: float) -> None:
    """Eight processes that all want what cannot be compiled find out once, not one by one."""
    with contextlib.suppress(OSError):
        if log.stat().st_mtime >= asked:
            reason = log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")[-1]
            raise BuildError(_failed(label, reason.removeprefix("fastood: "), log))


def _failed(label: str, reason: str, log: Path) -> str:
    return f"{label} kernels do not compile: {reason}; log: {log}; {_INSTEAD}"


_CAUSES = (
    re.compile(r"^(?:.*?: )?((?:fatal )?error: .+)$", re.MULTILINE),  # gcc, clang, ninja
    re.compile(r"^((?:nvcc|ptxas) (?:fatal|error)\s*: .+)$", re.MULTILINE),
    re.compile(r"^.*?(undefined (?:symbol|reference).+)$", re.MULTILINE),
    re.compile(r"^((?:/bin/)?sh: .+)$", re.MULTILINE),
    re.compile(r"^(?!Runtime|subprocess)((?:\w+\.)*\w*Error: .+)$", re.MULTILINE),  # Python
)


def _reason(log: Path, code: int) -> str:
    """The line of the log that says most."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for cause in _CAUSES:
        found = cause.search(text)
        if found:
            return found[1].strip()[:300]
    if code < 0:
        return f"the compiling process was ended by signal {-code}"
    last = text.strip().split("\n")[-1].strip()
    return last[:300] or f"the compiling process ended with exit code {code}"


def _label(extension: Extension) -> str:
    return " ".join([extension.label.upper(), *([extension.arch] if extension.arch else [])])


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed or absent stderr
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _child(folder: Path) -> None:
    """Compile and load what ``task.json`` says; everything printed here is the log."""
    import threading

    def end_with_parent() -> None:
        os.read(0, 1)
        os.killpg(os.getpgrp(), signal.SIGTERM)  # ninja ends its compilers, then itself

    threading.Thread(target=end_with_parent, daemon=True).start()

    task = json.loads((folder / "task.json").read_bytes())
    if task["nvcc"]:
        compile_library(task, folder)
        (folder / "result.json").write_text("{}", encoding="utf-8")
        return

    from torch.utils import cpp_extension

    module = cpp_extension.load(
        task["name"],
        task["sources"],
        extra_cflags=task["cflags"],
        extra_ldflags=task["ldflags"],
        extra_include_paths=task["include"],
        build_directory=str(folder),
        with_cuda=False,
        verbose=True,
    )
    result = {"openmp": getattr(module, "openmp", None)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
