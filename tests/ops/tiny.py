"""An extension of six lines that compiles in a moment, and compilers that can be watched."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from fastood.ops.build import KEY_MARK, Extension

SOURCE = f"""
#include <Python.h>
#include "value.h"
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)
__attribute__((used)) static const char key[] = "{KEY_MARK}" TEXT(FASTOOD_BUILD_KEY);
static PyModuleDef def = {{PyModuleDef_HEAD_INIT, "tiny", 0, -1, 0, 0, 0, 0, 0}};
extern "C" __attribute__((visibility("default"))) PyObject* JOIN(PyInit_, TORCH_EXTENSION_NAME)() {{
    PyObject* module = PyModule_Create(&def);
    PyModule_AddIntConstant(module, "value", VALUE);
    return module;
}}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def tiny_extension(folder: Path, *, value: int = 1, name: str = "_cpu") -> Extension:
    """A module with one number, which comes from a header; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("tiny.cpp", SOURCE), ("value.h", f"#define VALUE {value}\n")):
        if not (folder / file).exists():
            (folder / file).write_text(text)
    return Extension(
        name,
        (folder / "tiny.cpp",),
        headers=(folder / "value.h",),
        include=(folder,),
        cflags=("-O0", "-fvisibility=hidden"),
    )


def watched_compiler(folder: Path, *, before: str = "") -> tuple[Path, Path]:
    """A g++ that adds a line to a file for every object it makes; and that file.

    Args:
        folder: where both go.
        before: shell commands to run before an object is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program, calls = folder / "g++", folder / "calls"
    program.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo $$ >> {calls}\n{before}\n;; esac\n'
        f'exec {shutil.which("g++")} "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program, calls


def lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []
