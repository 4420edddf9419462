"""Which CUDA library a GPU gets, and what is said when there is none; no toolkit, no GPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from fastood.errors import BuildError
from fastood.ops import build as spec
from fastood.ops import cudalib, loader
from fastood.ops.build import build, build_folder, cpu_extension, cuda_extension, key
from fastood.ops.nvcc import find_nvcc, nvcc_version
from tests.cuda.stubs import fake_nvcc, stub_extension
from tests.ops.tiny import lines, needs_compiler


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and stubs for sources; one line for every object that is compiled."""
    monkeypatch.setattr(cudalib, "_found", {})
    monkeypatch.setattr(loader, "_warned_of", set())
    monkeypatch.setattr(
        cudalib, "cuda_extension", lambda arch: stub_extension(tmp_path / "csrc", arch)
    )
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTOOD_JIT", raising=False)
    program, file = fake_nvcc(tmp_path / "bin")
    monkeypatch.setenv("CUDACXX", str(program))
    return file


# --- what is built --------------------------------------------------------------------------------


def test_the_extension_names_what_is_there():
    extension = cuda_extension("9.0")
    assert {s.name for s in extension.sources} >= {"rows.cu", "eigen.cu", "info.cu"}
    assert {h.name for h in extension.headers} >= {"api.h", "rows_kernel.cuh"}
    assert extension.cflags[-1] == "arch=compute_90,code=sm_90" and extension.label == "cuda"
    assert not any("fast" in flag and "math" in flag for flag in extension.cflags)
    assert cuda_extension("9.0a").cflags[-1] == "arch=compute_90a,code=sm_90a"
    with pytest.raises(FileNotFoundError, match="no CUDA sources"):
        cuda_extension("9.0", Path("/nothing"))


@pytest.mark.parametrize("arch", ["90", "sm_90", "9", "9.0x1", "", "nine"])
def test_an_architecture_is_a_number(arch):
    if not arch:
        assert spec.Extension("_x", ()).arch == ""
        return
    with pytest.raises(ValueError, match=r"arch: expected a compute capability such as 8\.0"):
        cuda_extension(arch)


def test_the_key_is_of_the_architecture_and_of_neither_torch_nor_python(monkeypatch):
    wanted = key(cuda_extension("9.0"))
    assert wanted != key(cuda_extension("8.0"))
    cpu = key(cpu_extension())
    for name, value in (
        ("torch_version", ("2.99.0", "abc")), ("instruction_set", "sse9"),
        ("_python", ("cpython-399", "x")),
    ):  # fmt: skip
        monkeypatch.setattr(spec, name, lambda value=value: value)
    assert key(cuda_extension("9.0")) == wanted and key(cpu_extension()) != cpu
    monkeypatch.setattr(spec, "_platform", lambda: ("linux", "riscv64", "glibc 9"))
    assert key(cuda_extension("9.0")) != wanted


# --- nvcc -----------------------------------------------------------------------------------------


def test_nvcc_is_found_in_its_usual_places(tmp_path, monkeypatch):
    program, _ = fake_nvcc(tmp_path / "home" / "bin")
    for name in ("CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc() == str(program) and nvcc_version(find_nvcc()) == "nvcc 99.1.2"
    other, _ = fake_nvcc(tmp_path / "other")
    monkeypatch.setenv("CUDACXX", str(other))
    assert find_nvcc() == str(other)
    monkeypatch.setenv("CUDACXX", "/nothing/nvcc")
    with pytest.raises(BuildError, match=r"expected nvcc, got CUDACXX=/nothing/nvcc.*install"):
        find_nvcc()


# --- loading --------------------------------------------------------------------------------------


@needs_compiler
def test_compiled_once_for_each_architecture(calls, capfd):
    assert loader.cuda_status("9.0").state == "to compile" and not lines(calls)
    library = loader.cuda(arch="9.0")
    assert "compiling fastood's CUDA 9.0 kernels, once" in capfd.readouterr().err
    assert loader.cuda(arch="9.0") is library is loader.try_cuda(arch="9.0")
    assert library.message(0) == "stub" and library.key == loader.cuda_status("9.0").key
    found = loader.cuda_status("9.0")
    assert found.state == "loaded" and found.path == library.path
    assert found.info["arch"] == "9.0" and found.info["compiler"] == "nvcc 99.1.2"
    assert found.path.is_relative_to(build_folder()) and len(lines(calls)) == 1
    assert loader.cuda(arch="8.0") is not library and len(lines(calls)) == 2


@needs_compiler
def test_what_is_built_for_8_0_runs_on_8_9_and_not_on_9_0(calls, tmp_path, monkeypatch):
    built = build(stub_extension(tmp_path / "csrc", "8.0"))
    monkeypatch.setenv("FASTOOD_JIT", "0")
    assert loader.cuda(arch="8.9").path == built.path
    assert loader.cuda_status("9.0").state == "unavailable"
    with pytest.raises(BuildError, match=r"FASTOOD_JIT=0 forbids it.*fastood build --cuda"):
        loader.cuda(arch="9.0")
    monkeypatch.delenv("FASTOOD_JIT")
    assert loader.cuda(arch="8.6").path == built.path  # found, so nothing is compiled
    assert len(lines(calls)) == 1


def test_without_nvcc_one_warning_and_no_second_try(calls, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nothing/nvcc")
    assert loader.cuda_status("9.0").state == "unavailable"
    with pytest.warns(RuntimeWarning, match=r"expected nvcc.*install the CUDA toolkit") as seen:
        assert loader.try_cuda(arch="9.0") is None
    assert len(seen) == 1 and seen[0].filename == __file__
    monkeypatch.setenv("CUDACXX", "g++")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.try_cuda(arch="9.0") is None
    with pytest.raises(BuildError, match="/nothing/nvcc"):
        loader.cuda(arch="9.0")
    assert "/nothing/nvcc" in loader.cuda_status("9.0").why


@needs_compiler
@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("nvcc fatal   : Unsupported gpu architecture 'compute_35'", "Unsupported gpu arch"),
        ('rows.cu(12): error: identifier \\"x\\" is undefined', "identifier .x. is undefined"),
        ("ptxas error   : Entry function uses too much shared data", "too much shared data"),
    ],
)
def test_what_does_not_compile_names_the_error(calls, tmp_path, monkeypatch, says, found):
    program, _ = fake_nvcc(tmp_path / "bad", before=f'echo "{says}"; exit 1')
    monkeypatch.setenv("CUDACXX", str(program))
    with pytest.raises(BuildError, match=rf"cuda kernels do not compile: .*{found}.*; log: "):
        loader.cuda(arch="9.0")
    (log,) = build_folder().glob("cuda-*.failed.log")
    assert "-c" in log.read_text()
    assert not [p for p in build_folder().iterdir() if p.name.startswith(".building")]


@needs_compiler
def test_a_library_of_other_structures_is_refused(calls, tmp_path):
    stub_extension(tmp_path / "csrc", "9.0", value=8)
    with pytest.raises(BuildError, match="has other structures"):
        loader.cuda(arch="9.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_is_no_architecture():
    with pytest.raises(BuildError, match="finds no CUDA device"):
        loader.cuda()
    assert loader.cuda_arch.__doc__


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def command():
    from typer.testing import CliRunner

    from fastood.cli.app import app

    return lambda *words: CliRunner().invoke(app, list(words))


@needs_compiler
def test_build_cuda_compiles_ahead(calls, monkeypatch, command):
    import json

    monkeypatch.setenv("FASTOOD_JIT", "0")  # about first use; who asks gets it
    words = ("build", "--cuda", "--arch", "8.0, 9.0")
    first = command(*words)
    assert first.exit_code == 0 and "compiled for 8.0" in first.output, first.output
    assert "compiled for 9.0" in first.output and len(lines(calls)) == 2
    assert "nothing to compile for 9.0" in command(*words).output
    again = json.loads(command(*words, "--json").stdout)
    assert [(b["arch"], b["compiled"]) for b in again] == [("8.0", False), ("9.0", False)]
    assert command(*words, "--force").exit_code == 0 and len(lines(calls)) == 4
    cuda = json.loads(command("info", "--json").stdout)["kernels"]["cuda"]
    if not torch.cuda.is_available():
        assert [(c["arch"], c["state"]) for c in cuda] == [("8.0", "ready"), ("9.0", "ready")]
        assert "CUDA 9.0: ready" in command("info").output


def test_build_cuda_without_nvcc_is_one_line(calls, monkeypatch, command):
    monkeypatch.setenv("CUDACXX", "/nothing/nvcc")
    done = command("build", "--cuda", "--arch", "9.0")
    assert done.exit_code != 0
    assert "expected nvcc" in done.output + str(done.exception)
