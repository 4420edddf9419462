"""An nvcc that is g++, and a CUDA library of stubs: building and loading without a toolkit."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from fastood.ops.build import Extension, csrc_folder

HERE = Path(__file__).parent


def fake_nvcc(folder: Path, *, before: str = "") -> tuple[Path, Path]:
    """A program that takes nvcc's words, and a file that gets a line for every object it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    program, calls = folder / "nvcc", folder / "calls"
    program.write_text(
        "#!/bin/sh\n"
        'case " $* " in\n'
        '*" --version "*) echo "Cuda compilation tools, release 99.1, V99.1.2"; exit 0 ;;\n'
        f'*" -c "*) echo $$ >> {calls}\n{before}\n;;\n'
        "esac\n"
        f'exec {shutil.which("g++")} -fPIC "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program, calls


def stub_extension(folder: Path, arch: str, *, value: int = 7) -> Extension:
    """As ``cuda_extension``, of stubs that a C++ compiler takes; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "value.h").exists():
        (folder / "value.h").write_text(f"#define VALUE {value}\n")
    return Extension(
        "_cuda",
        (HERE / "stub.cpp",),
        headers=(folder / "value.h",),
        include=(folder, csrc_folder() / "cuda"),
        cflags=("-O0", "-w"),
        arch=arch,
    )
