"""nvcc: where it is, what it says of itself, and a library made by it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fastood.errors import BuildError

__all__ = ["compile_library", "find_nvcc", "nvcc_version"]


def find_nvcc() -> str:
    """The nvcc that ``CUDACXX`` names, else that of ``CUDA_HOME``, of the path, of pip.

    Raises:
        BuildError: if there is none.
    """
    asked = os.environ.get("CUDACXX", "").strip()
    if asked:
        found = shutil.which(asked)
        got = f"CUDACXX={asked}, which is no program"
    else:
        found = next(filter(None, map(shutil.which, _places())), None)
        got = "no nvcc on the PATH nor in CUDA_HOME"
    if found:
        return found
    raise BuildError(
        f"cuda kernels: expected nvcc, got {got}; install the CUDA toolkit "
        "(conda install cuda-nvcc, pip install nvidia-cuda-nvcc) or set CUDACXX; "
        "everything works without"
    )


def _places() -> list[str]:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    spec = importlib.util.find_spec("nvidia")
    pip = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    return [
        *(str(Path(home) / "bin" / "nvcc") for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
        *(str(nvcc) for folder in pip for nvcc in sorted(folder.glob("*/bin/nvcc"))),
    ]


@cache
def nvcc_version(nvcc: str) -> str:
    """``nvcc 13.0.88``; ``nvcc`` alone if it does not say."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return "nvcc"
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return f"nvcc {found[1]}" if found else "nvcc"


def compile_library(task: dict[str, Any], folder: Path) -> None:
    """Compile and link what ``task`` says into ``folder`` and load it; what is printed is the log.

    Runs in a process of its own, whose group ends with it.
    """
    nvcc = [task["nvcc"]]
    host = os.environ.get("CUDAHOSTCXX")
    if host:
        nvcc += ["-ccbin", host]
    include = [f"-I{path}" for path in task["include"]]

    def one(source: str) -> Path:
        result = folder / (Path(source).stem + ".o")
        _call([*nvcc, *task["cflags"], *include, "-c", source, "-o", str(result)])
        return result

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(one, task["sources"]))
    library = folder / f"{task['name']}.so"
    words = [*nvcc, "-shared", *map(str, objects), *task["ldflags"], "-o", str(library)]
    _call(words)
    ctypes.CDLL(str(library))  # a library that does not load never becomes a build


def _call(words: list[str]) -> None:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = done.stdout.decode(errors="replace")
    sys.stdout.write(" ".join(words) + "\n" + text)  # in one piece: several run at a time
    sys.stdout.flush()
    if done.returncode != 0:
        raise SystemExit(done.returncode)
