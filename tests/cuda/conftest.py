"""The CUDA sources on this machine: compiled for GPUs where there is nvcc, emulated without one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from fastood.errors import BuildError
from fastood.ops.build import build, csrc_folder, cuda_extension
from fastood.ops.buildstore import Built
from fastood.ops.nvcc import find_nvcc

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def nvcc() -> str:
    try:
        return find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cuda_include(nvcc: str) -> Path:
    """The toolkit's headers."""
    for folder in (Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include")):
        if (folder / "cuda_fp16.h").is_file():
            return folder
    pytest.skip("no cuda_fp16.h beside nvcc")


@pytest.fixture(scope="session", params=["8.0", "9.0"])
def built(request: pytest.FixtureRequest, nvcc: str) -> Built:
    """The library as it is shipped, for each architecture, in the cache of this machine."""
    del nvcc
    return build(cuda_extension(request.param))


@pytest.fixture(scope="session")
def emulated(cuda_include: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as host code (``emulator.h``)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-w",
         f"-I{csrc_folder() / 'cuda'}", "-isystem", str(cuda_include),
         str(HERE / "emulated.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))
