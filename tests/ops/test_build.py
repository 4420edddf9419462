"""Compiling an extension: keys, one build for many processes, and everything that can go wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastood.errors import BuildError
from fastood.ops import build as spec
from fastood.ops import compile as compiling
from fastood.ops.build import Extension, build, cpu_extension, key
from fastood.ops.buildstore import UNUSED_SECONDS, BuildStore
from tests.ops.tiny import lines, needs_compiler, tiny_extension, watched_compiler

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds until a test gives up on another process


@pytest.fixture
def tiny(tmp_path: Path) -> Extension:
    return tiny_extension(tmp_path / "csrc")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One line for every object that is compiled."""
    program, file = watched_compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(program))
    return file


def start(source: Path, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Another process that builds the tiny extension."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from fastood.ops.build import build\n"
        "from tests.ops.tiny import tiny_extension\n"
        "print(build(tiny_extension(Path(sys.argv[2])), folder=Path(sys.argv[3])).path)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(source), str(folder)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(happened, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"waited in vain until {what}")
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def private(folder: Path) -> list[Path]:
    return list(folder.glob(".building-*"))


# --- what is built, and its key -------------------------------------------------------------------


def test_the_key_follows_everything_a_build_depends_on(tiny, monkeypatch):
    keys = [key(tiny)]

    def changed() -> None:
        keys.append(key(tiny))
        assert len(set(keys)) == len(keys)

    tiny.sources[0].write_text(tiny.sources[0].read_text() + "\n")
    changed()
    tiny.headers[0].write_text("#define VALUE 2\n")
    changed()
    keys.append(key(replace(tiny, cflags=(*tiny.cflags, "-g"))))
    keys.append(key(replace(tiny, ldflags=("-lm",))))
    keys.append(key(replace(tiny, cflags=tiny.cflags[:-1], ldflags=tiny.cflags[-1:])))
    keys.append(key(replace(tiny, name="_gpu")))
    for name, value in (
        ("torch_version", ("2.99.0", "abc")),
        ("instruction_set", "sse9"),
        ("_python", ("cpython-399", "x")),
        ("_platform", ("linux", "riscv64", "glibc 9")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(spec, name, lambda value=value: value)
            changed()
    assert len(set(keys)) == len(keys) == 11


def test_the_key_does_not_depend_on_the_place(tmp_path):
    assert key(tiny_extension(tmp_path / "a")) == key(tiny_extension(tmp_path / "b" / "c"))


def test_the_key_and_the_file_itself_need_neither_torch_nor_fastood():
    """setup.py loads the file by its path; ``fastood info`` should not wait for torch."""
    code = (
        "import importlib.util, sys, pathlib\n"
        f"path = {str(ROOT / 'fastood' / 'ops' / 'build.py')!r}\n"
        "s = importlib.util.spec_from_file_location('by_path', path)\n"
        "m = sys.modules['by_path'] = importlib.util.module_from_spec(s)\n"
        "s.loader.exec_module(m)\n"
        "print(len(m.key(m.Extension('_x', ()))))\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('torch', 'fastood')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout == "20\n[]\n"


def test_the_torch_version_that_is_read_is_the_one_that_is_imported():
    import torch

    assert spec.torch_version()[0] == torch.__version__


def test_the_cpu_extension_names_what_is_there():
    extension = cpu_extension()
    assert extension.sources[0].name == "bind.cpp" and extension.headers
    assert all(file.is_file() for file in (*extension.sources, *extension.headers))
    assert not any(flag.startswith(("-march", "-std", "-ffast")) for flag in extension.cflags)
    assert "-fopenmp" not in extension.ldflags  # it would link a second libgomp


def test_clang_does_not_bring_its_own_openmp():
    """Its threads would all be thread 0 to torch, and ranges would be computed twice or never."""
    extension = cpu_extension()
    assert "-fopenmp" in spec.flags_for(extension, "g++ (Debian 12.2.0) 12.2.0")
    assert "-fopenmp" not in spec.flags_for(extension, "Debian clang version 16.0.6")
    assert spec.version_of("/nothing/c++") == ""


def test_cuda_headers_do_not_change_the_cpu_key(tmp_path):
    for name in ("bind.cpp", "cpu/a.cpp", "cpu/a.h", "common/b.h", "cuda/c.h", "cuda/c.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    extension = cpu_extension(tmp_path)
    assert [f.name for f in extension.sources] == ["bind.cpp", "a.cpp"]
    assert sorted(f.name for f in extension.headers) == ["a.h", "b.h"]


def test_no_sources_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bind\.cpp"):
        cpu_extension(tmp_path)


def test_objects_that_would_overwrite_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="different names"):
        Extension("_x", (tmp_path / "a.cpp", tmp_path / "b" / "a.cpp"))


# --- building -------------------------------------------------------------------------------------


@needs_compiler
def test_a_build_is_whole_and_is_found_again(tiny, calls, tmp_path, capfd):
    folder = tmp_path / "kernels"
    built = build(tiny, folder=folder)
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("compiling fastood's CPU kernels, once")
    assert said.err.count("\n") == 1
    assert sorted(f.name for f in built.path.parent.iterdir()) == [
        "_cpu.so",
        "build.json",
        "build.log",
    ]
    assert "-DFASTOOD_BUILD_KEY=k" + built.key in built.log.read_text()
    assert built.info["compiler"] and built.info["bytes"] == built.path.stat().st_size
    assert built.path.parent.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777
    assert build(tiny, folder=folder) == built and len(lines(calls)) == 1
    assert capfd.readouterr() == ("", "")
    assert private(folder) == []

    tiny.headers[0].write_text("#define VALUE 2\n")
    assert build(tiny, folder=folder).path != built.path and len(lines(calls)) == 2


@needs_compiler
def test_force_compiles_again_in_place(tiny, calls, tmp_path):
    folder = tmp_path / "kernels"
    first = build(tiny, folder=folder)
    again = build(tiny, folder=folder, force=True)
    assert again.path == first.path and len(lines(calls)) == 2
    assert private(folder) == []


@needs_compiler
def test_eight_processes_at_once_build_once(calls, tmp_path):
    folder = tmp_path / "kernels"
    tiny_extension(tmp_path / "csrc")
    processes = [start(tmp_path / "csrc", folder) for _ in range(8)]
    found = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, found
    assert len({out for out, _ in found}) == 1
    assert len(lines(calls)) == 1
    assert sum("compiling fastood's" in err for _, err in found) == 1
    assert private(folder) == []


@needs_compiler
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_ended_half_way_leaves_nothing_in_the_way(how, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    slow, busy = watched_compiler(tmp_path / "slow", before="sleep 1000")
    process = start(tmp_path / "csrc", folder, CXX=str(slow))
    until(lambda: lines(busy), "the compiler runs")
    process.send_signal(how)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    compiler = int(lines(busy)[0])
    until(lambda: ended(compiler), "the compiler of a dead process ends too")
    assert BuildStore(folder, "cpu").find(key(tiny)) is None

    program, calls = watched_compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(program))
    assert build(tiny, folder=folder).path.is_file()
    assert len(lines(calls)) == 1 and private(folder) == []


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "one byte", "no library", "no description"])
def test_a_damaged_build_is_compiled_again(damage, tiny, calls, tmp_path):
    built = build(tiny, folder=tmp_path)
    content = built.path.read_bytes()
    match damage:
        case "truncated":
            built.path.write_bytes(content[: len(content) // 2])
        case "one byte":
            built.path.write_bytes(content[:-100] + b"\xff" + content[-99:])
        case "no library":
            built.path.unlink()
        case "no description":
            (built.path.parent / "build.json").write_text("{")
    assert BuildStore(tmp_path, "cpu").find(built.key) is None
    again = build(tiny, folder=tmp_path)
    assert len(lines(calls)) == 2 and BuildStore(tmp_path, "cpu").find(built.key) == again


@needs_compiler
def test_what_does_not_compile_names_the_error_and_keeps_the_log(tiny, tmp_path):
    tiny.headers[0].write_text("#define VALUE no_such_thing\n")
    with pytest.raises(BuildError) as caught:
        build(tiny, folder=tmp_path / "kernels")
    message = str(caught.value)
    log = BuildStore(tmp_path / "kernels", "cpu").failed_log(key(tiny))
    assert "no_such_thing" in message and "\n" not in message
    assert str(log) in message and "FASTOOD_IMPL=reference" in message
    assert "no_such_thing" in log.read_text()
    assert private(tmp_path / "kernels") == []


@needs_compiler
def test_what_compiles_but_does_not_load_never_becomes_a_build(tiny, tmp_path):
    """Loading happens in the compiling process first, so that a crash there is an error here."""
    tiny.sources[0].write_text('extern "C" int missing();\nint f() { return missing(); }\n')
    with pytest.raises(BuildError, match="undefined symbol: missing"):
        build(tiny, folder=tmp_path)
    tiny.sources[0].write_text(
        "#include <cstdlib>\n__attribute__((constructor)) static void f() { abort(); }\n"
    )
    with pytest.raises(BuildError, match="signal 6"):
        build(tiny, folder=tmp_path)
    assert not list(tmp_path.glob("cpu-*/"))


@needs_compiler
def test_those_who_waited_for_a_failure_do_not_repeat_it(tiny, tmp_path, monkeypatch):
    go, said, errors = tmp_path / "go", [], []
    waiting = f"while [ ! -e {go} ]; do sleep 0.05; done"
    program, calls = watched_compiler(tmp_path / "bin", before=waiting)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(compiling, "_say", said.append)
    tiny.headers[0].write_text("#define VALUE no_such_thing\n")

    def work() -> None:
        try:
            build(tiny, folder=tmp_path / "kernels")
        except BuildError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: sum(s.startswith("waiting") for s in said) == 2, "two wait for the third")
    go.touch()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(errors) == 3 and len(set(errors)) == 1 and "no_such_thing" in errors[0]
    assert len(lines(calls)) == 1
    with pytest.raises(BuildError):  # who comes later may have mended something
        build(tiny, folder=tmp_path / "kernels")
    assert len(lines(calls)) == 2


@needs_compiler
def test_sources_that_change_meanwhile_are_not_kept_under_the_old_key(tiny, tmp_path, monkeypatch):
    edit = f"echo '// edited' >> {tiny.headers[0]}"
    monkeypatch.setenv("CXX", str(watched_compiler(tmp_path / "bin", before=edit)[0]))
    with pytest.raises(BuildError, match="changed while"):
        build(tiny, folder=tmp_path / "kernels")
    assert not list((tmp_path / "kernels").glob("cpu-*/"))


@needs_compiler
def test_a_compiler_with_a_launcher_works(tiny, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"/usr/bin/env {os.environ['CXX']}")
    build(tiny, folder=tmp_path / "kernels")
    assert len(lines(calls)) == 1


# --- no compiler, no folder -----------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["CXX", "PATH"])
def test_no_compiler_is_one_clear_error(gone, tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(gone, str(tmp_path / "nothing"))
    with pytest.raises(BuildError, match=r"expected a C\+\+ compiler, got .*; install g\+\+"):
        build(tiny, folder=tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()


@needs_compiler
def test_a_finished_build_outlives_its_compiler(tiny, tmp_path, monkeypatch):
    built = build(tiny, folder=tmp_path / "kernels")
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", "")
    assert build(tiny, folder=tmp_path / "kernels") == built


def test_a_folder_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # any program: it is not reached
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"file/kernels: expected .* FASTOOD_CACHE"):
        build(tiny, folder=tmp_path / "file" / "kernels")


@needs_compiler
def test_a_read_only_folder_with_a_finished_build_works(tiny, tmp_path, monkeypatch):
    built = build(tiny, folder=tmp_path)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "here")

    for name in ("open", "mkdir", "utime", "rename", "unlink", "replace"):
        monkeypatch.setattr(os, name, refuse)
    found = build(tiny, folder=tmp_path)
    assert found == built
    BuildStore(tmp_path, "cpu").used(found)
    with pytest.raises(BuildError, match="Read-only file system; choose another"):
        build(tiny, folder=tmp_path, force=True)


# --- the store ------------------------------------------------------------------------------------


@needs_compiler
def test_old_builds_go_and_others_stay(tiny, tmp_path, monkeypatch):
    other = build(tiny, folder=tmp_path)
    gpu = build(replace(tiny, name="_cuda"), folder=tmp_path)
    tiny.headers[0].write_text("#define VALUE 2\n")
    recent = build(tiny, folder=tmp_path)
    long_ago = time.time() - UNUSED_SECONDS - 60
    for built in (other, gpu, recent):
        os.utime(built.path.parent / "build.json", (long_ago, long_ago))
    BuildStore(tmp_path, "cpu").used(recent)
    (tmp_path / ".building-cpu-dead").mkdir()
    (tmp_path / ".building-cuda-alive").mkdir()
    (tmp_path / "cpu-x.failed.log").write_text("")
    os.utime(tmp_path / "cpu-x.failed.log", (long_ago, long_ago))
    (tmp_path / "something else").write_text("")
    tiny.headers[0].write_text("#define VALUE 3\n")
    newest = build(tiny, folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name != "csrc"} == {
        recent.path.parent.name,
        newest.path.parent.name,
        gpu.path.parent.name,
        ".building-cuda-alive",
        "something else",
        "cpu.lock",
        "cuda.lock",
    }


def test_who_waits_too_long_is_told(tmp_path):
    store, told = BuildStore(tmp_path, "cpu"), []
    with (
        store.lock(waiting=lambda: None),
        pytest.raises(BuildError, match="another process has been compiling"),
        store.lock(waiting=lambda: told.append(1), timeout=0.8),
    ):
        pass
    assert told == [1]
    with store.lock(waiting=lambda: None):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A DataLoader worker forked while another thread builds lives as long as its loader."""
    store = BuildStore(tmp_path, "cpu")
    read, write = os.pipe()
    with store.lock(waiting=lambda: None):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with store.lock(waiting=lambda: None, timeout=2.0):
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)
