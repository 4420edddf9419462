"""The batched eigensolver's launcher, with a solver that only notes what it is asked."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastood.ops.build import csrc_folder

HERE = Path(__file__).parent
needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compiled(source: Path, target: Path, *flags: str) -> ctypes.CDLL:
    words = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wno-attributes", *flags, str(source)]
    subprocess.run([*words, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def launcher(cuda_include: Path, tmp_path: Path) -> ctypes.CDLL:
    """A launcher that has loaded no solver yet: host code, and the source is."""
    return compiled(
        csrc_folder() / "cuda" / "eigen.cu", tmp_path / "eigen.so",
        f"-I{csrc_folder() / 'cuda'}", f"-I{cuda_include}", "-x", "c++",
    )  # fmt: skip


@pytest.fixture
def solver(tmp_path: Path) -> tuple[ctypes.CDLL, bytes]:
    path = tmp_path / "libfake.so"
    fake = compiled(HERE / "fake_solver.cpp", path)
    fake.fake_seen.restype, fake.fake_stream.restype = ctypes.c_int64, ctypes.c_void_p
    return fake, str(path).encode()


def workspace(launcher: ctypes.CDLL, n: int, count: int) -> tuple[int, int, int]:
    there, here = ctypes.c_uint64(1), ctypes.c_uint64(1)
    arguments = (ctypes.c_int64(n), ctypes.c_int64(count), None, None)
    status = launcher.fastood_eigen_workspace(
        0, *arguments, ctypes.byref(there), ctypes.byref(here)
    )
    return status, there.value, here.value


def solve(launcher: ctypes.CDLL, a: torch.Tensor, device: int = 0, stream: int = 0) -> tuple:
    count, n, _ = a.shape
    values = torch.zeros(count, n, dtype=torch.float64)
    info = torch.ones(count, dtype=torch.int32)
    status = launcher.fastood_eigen(
        device, ctypes.c_int64(n), ctypes.c_int64(count), ctypes.c_void_p(a.data_ptr()),
        ctypes.c_void_p(values.data_ptr()), None, ctypes.c_uint64(11), None, ctypes.c_uint64(12),
        ctypes.c_void_p(info.data_ptr()), ctypes.c_void_p(stream),
    )  # fmt: skip
    return status, values, info


@needs_gpp
def test_the_solver_is_asked_for_vectors_of_every_matrix(launcher, solver):
    fake, path = solver
    a = torch.zeros(3, 4, 4, dtype=torch.float64)
    assert workspace(launcher, 4, 3)[0] == solve(launcher, a)[0] == -7  # no solver yet
    assert launcher.fastood_eigen_load(path) == 0 == launcher.fastood_eigen_load(b"/nothing")
    assert workspace(launcher, 4, 3) == (0, 12, 7)
    status, values, info = solve(launcher, a, stream=4711)
    assert status == 0 and a[2, 3, 3] == 5 and values[2, 3] == 6 and info[2] == 0
    # vectors, the lower half, n, lda, N, everything in float64, both workspaces
    assert [fake.fake_seen(i) for i in range(8)] == [1, 0, 4, 4, 3, 111, 11, 12]
    assert fake.fake_stream() == 4711


@needs_gpp
def test_one_handle_a_device(launcher, solver):
    fake, path = solver
    launcher.fastood_eigen_load(path)
    a = torch.zeros(1, 2, 2, dtype=torch.float64)
    for device in (0, 0, 1, 0, 1):
        assert solve(launcher, a, device)[0] == 0
    assert fake.fake_handles() == 2


@needs_gpp
def test_nothing_to_solve_and_refusals(launcher, solver):
    fake, path = solver
    assert solve(launcher, torch.zeros(0, 4, 4, dtype=torch.float64))[0] == 0
    assert solve(launcher, torch.zeros(2, 0, 0, dtype=torch.float64))[0] == 0
    assert workspace(launcher, 0, 5) == (0, 0, 0) and workspace(launcher, -1, 5)[0] == -1
    launcher.fastood_eigen_load(path)
    fake.fake_refuse(3)
    assert workspace(launcher, 2, 1)[0] == -8
    fake.fake_refuse(0)
    assert workspace(launcher, 2, 1)[0] == 0  # a handle that failed once is made again
    fake.fake_refuse(3)
    assert solve(launcher, torch.zeros(1, 2, 2, dtype=torch.float64))[0] == -8


@needs_gpp
def test_a_library_without_a_batched_solver_is_none(launcher, tmp_path):
    """That of CUDA 12.4 and before, or no library at all."""
    compiled(HERE / "fake_solver.cpp", tmp_path / "libold.so", "-DWITHOUT_BATCHED")
    assert launcher.fastood_eigen_load(str(tmp_path / "libold.so").encode()) == -7
    assert launcher.fastood_eigen_load(b"libnothing_of_this_name.so.3") == -7


@needs_gpp
def test_prototypes_are_those_of_the_header(cuda_include):
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    headers = [f.parent for p in places for f in p.glob("*/include/cusolverDn.h")]
    headers = [h for h in headers if "XsyevBatched(" in (h / "cusolverDn.h").read_text()]
    if not headers:
        pytest.skip("no cusolverDn.h of CUDA 12.6 or later")
    subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", f"-I{csrc_folder() / 'cuda'}", "-isystem",
         str(cuda_include), "-isystem", str(headers[0]), str(HERE / "prototypes.cpp")],
        check=True,
    )  # fmt: skip
