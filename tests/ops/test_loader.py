"""Which compiled kernels a process gets, and what it says when there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastood.errors import BuildError
from fastood.ops import loader
from fastood.ops.build import Extension, build, build_folder, key
from tests.ops.tiny import lines, needs_compiler, tiny_extension, watched_compiler

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not asked for kernels yet."""
    for name, value in (("_module", None), ("_where", None), ("_failure", None)):
        monkeypatch.setattr(loader, name, value)
    monkeypatch.setattr(loader, "_warned", False)
    monkeypatch.delenv("FASTOOD_JIT", raising=False)
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)


@pytest.fixture
def calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None, capfd: pytest.CaptureFixture[str]
) -> Path:
    """The loader with a tiny extension and an empty cache; one line for each compiled object."""
    extension = tiny_extension(tmp_path / "csrc", value=7)
    monkeypatch.setattr(loader, "cpu_extension", lambda: extension)
    monkeypatch.setattr(loader, "_prebuilt", lambda _: None)
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    program, file = watched_compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(program))
    return file


@pytest.fixture
def extension(calls: Path) -> Extension:
    return loader.cpu_extension()


@needs_compiler
def test_compiled_once_loaded_once(calls, fresh):
    assert loader.status().state == "to compile" and not lines(calls)
    module = loader.cpu()
    assert module.value == 7 and loader.cpu() is module and loader.try_cpu() is module
    found = loader.status()
    assert (found.state, found.kind) == ("loaded", "built")
    assert found.path == Path(module.__file__) and found.info["compiler"]
    assert found.path.is_relative_to(build_folder()) and len(lines(calls)) == 1


@needs_compiler
def test_a_build_of_another_process_is_loaded_without_a_compiler(calls, extension, monkeypatch):
    built = build(extension)
    monkeypatch.setenv("CXX", "/nothing")
    monkeypatch.setenv("FASTOOD_JIT", "0")
    assert loader.status().state == "ready" and loader.status().path == built.path
    assert loader.cpu().value == 7


def test_without_a_compiler_one_warning_and_no_second_try(calls, monkeypatch):
    monkeypatch.setenv("CXX", "/nothing/c++")
    assert loader.status().state == "unavailable" and "/nothing/c++" in loader.status().why
    with pytest.warns(RuntimeWarning, match=r"expected a C\+\+ compiler.*install g\+\+") as seen:
        assert loader.try_cpu() is None
    assert len(seen) == 1 and seen[0].filename == __file__
    monkeypatch.setenv("CXX", "g++")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.try_cpu() is None
    with pytest.raises(BuildError, match="/nothing/c"):
        loader.cpu()
    assert loader.status().state == "unavailable" and "/nothing/c++" in loader.status().why


def test_who_asked_and_was_refused_is_warned_later_all_the_same(calls, monkeypatch):
    monkeypatch.setenv("CXX", "/nothing")
    with pytest.raises(BuildError):
        loader.cpu()
    with pytest.warns(RuntimeWarning, match="/nothing"):
        assert loader.try_cpu() is None


@needs_compiler
def test_fastood_jit_0_compiles_nothing(calls, monkeypatch):
    monkeypatch.setenv("FASTOOD_JIT", "0")
    assert "FASTOOD_JIT=0" in loader.status().why
    with pytest.raises(BuildError, match=r"FASTOOD_JIT=0 forbids it.*fastood build"):
        loader.cpu()
    assert not lines(calls)


@needs_compiler
def test_a_damaged_build_is_compiled_again(calls, extension):
    built = build(extension)
    built.path.write_bytes(b"")
    assert loader.cpu().value == 7 and len(lines(calls)) == 2


@needs_compiler
def test_loading_notes_the_time_of_use(calls, extension):
    stamp = build(extension).path.parent / "build.json"
    os.utime(stamp, (1, 1))
    loader.cpu()
    assert stamp.stat().st_mtime > 1


@needs_compiler
def test_a_prebuilt_library_goes_first_if_its_key_fits(calls, extension, monkeypatch, tmp_path):
    prebuilt = tmp_path / "package" / "_cpu.so"
    prebuilt.parent.mkdir()
    shutil.copy(build(extension, folder=tmp_path / "elsewhere").path, prebuilt)
    assert loader.baked_key(prebuilt) == key(extension)
    monkeypatch.setattr(loader, "_prebuilt", lambda _: prebuilt)
    assert loader.status().kind == "prebuilt" and loader.status().state == "ready"
    assert loader.cpu().__file__ == str(prebuilt)
    assert not build_folder().exists() and loader.status().kind == "prebuilt"


@needs_compiler
def test_a_prebuilt_library_for_something_else_is_left_alone(
    calls, extension, monkeypatch, tmp_path
):
    prebuilt = tmp_path / "_cpu.so"
    shutil.copy(build(extension, folder=tmp_path / "elsewhere").path, prebuilt)
    monkeypatch.setattr(loader, "_prebuilt", lambda _: prebuilt)
    extension.headers[0].write_text("#define VALUE 8\n")
    found = loader.status()
    assert found.state == "to compile" and "prebuilt for other sources" in found.why
    assert loader.cpu().value == 8 and "prebuilt for other" in loader.status().why


@pytest.mark.parametrize("content", [b"", b"ELF", b"fastood-build-key:kzzz\0"])
def test_a_file_without_a_key_has_none(content, tmp_path):
    (tmp_path / "x.so").write_bytes(content)
    assert loader.baked_key(tmp_path / "x.so") is None
    assert loader.baked_key(tmp_path / "missing.so") is None


def test_an_installation_without_sources_says_so(fresh, monkeypatch, tmp_path):
    def missing() -> None:
        raise FileNotFoundError(2, "no C++ sources of fastood", str(tmp_path / "bind.cpp"))

    monkeypatch.setattr(loader, "cpu_extension", missing)
    assert "incomplete" in loader.status().why
    with pytest.raises(BuildError, match=r"bind\.cpp: no C\+\+ sources"):
        loader.cpu()


def test_an_interrupted_build_is_no_failure(calls, monkeypatch):
    from fastood.ops import build as spec

    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spec, "build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loader.try_cpu()
    assert loader.status().state == "to compile"


@needs_compiler
def test_a_forked_child_may_be_the_first_to_ask(tmp_path):
    """... while another thread of its parent is in the middle of loading."""
    tiny_extension(tmp_path / "csrc", value=7)
    code = (
        "import os, sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from fastood.ops import loader\n"
        "from tests.ops.tiny import tiny_extension\n"
        "loader.cpu_extension = lambda: tiny_extension(Path(sys.argv[2]))\n"
        "loader._lock.acquire()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(loader.cpu().value)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "csrc")],
        env={**os.environ, "FASTOOD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "7\n", done.stderr


def test_importing_the_loader_compiles_and_prints_nothing(tmp_path):
    code = "import fastood.ops.loader, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTOOD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("False\n", "") and not (tmp_path / "cache").exists()
