"""``fastood build``, and the kernels in ``fastood info``, with an extension of six lines."""

from __future__ import annotations

import pytest

from fastood.ops import loader
from tests.ops.tiny import lines, needs_compiler, tiny_extension, watched_compiler


@pytest.fixture
def calls(tmp_path, monkeypatch):
    for name, value in (("_module", None), ("_where", None), ("_failure", None)):
        monkeypatch.setattr(loader, name, value)
    monkeypatch.setattr(loader, "_prebuilt", lambda _: None)
    monkeypatch.setattr(loader, "_warned", False)
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    monkeypatch.delenv("FASTOOD_JIT", raising=False)
    extension = tiny_extension(tmp_path / "csrc")
    monkeypatch.setattr(loader, "cpu_extension", lambda: extension)
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    program, file = watched_compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(program))
    return file


@needs_compiler
def test_build_compiles_ahead_once(fastood, calls, monkeypatch):
    assert "compiled at first use" in fastood("info").out
    monkeypatch.setenv("FASTOOD_JIT", "0")  # about first use; who asks gets it
    first = fastood("build")
    assert first.code == 0 and "compiled in" in first.out and "_cpu.so" in first.out
    again = fastood("build", "--json").json
    assert not again["compiled"] and again["path"] in first.out.replace("\n", "")
    assert "nothing to compile" in fastood("build").out
    assert len(lines(calls)) == 1
    forced = fastood("build", "--force", "--json").json
    assert forced["compiled"] and forced["path"] == again["path"] and len(lines(calls)) == 2


@needs_compiler
def test_info_shows_the_kernels(fastood, calls):
    fastood("build")
    kernels = fastood("info", "--json").json["kernels"]
    assert kernels["active"] == "cpu" and kernels["state"] == "ready"
    assert kernels["key"] in kernels["path"] and kernels["bytes"] > 0 and kernels["compiler"]
    assert kernels["key"] in fastood("info").out.replace("\n", "").replace(" ", "")


def test_no_compiler_is_one_line_and_code_2(fastood, calls, monkeypatch):
    monkeypatch.setenv("CXX", "/nothing")
    done = fastood("build")
    assert done.code == 2 and "expected a C++ compiler" in done.error
    kernels = fastood("info", "--json").json["kernels"]
    assert kernels["active"] == "reference" and "expected a C++ compiler" in kernels["why"]


def test_what_a_person_forced_is_what_info_says(fastood, calls, monkeypatch):
    monkeypatch.setenv("FASTOOD_IMPL", "reference")
    kernels = fastood("info", "--json").json["kernels"]
    assert kernels["active"] == "reference" and "FASTOOD_IMPL=reference" in kernels["why"]


def test_info_says_what_every_score_will_refuse(fastood, calls, monkeypatch):
    monkeypatch.setenv("FASTOOD_IMPL", "fastest")
    kernels = fastood("info", "--json").json["kernels"]
    assert kernels["active"] == "none" and "FASTOOD_IMPL" in kernels["why"]


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_info_says_that_kernels_of_a_gpu_are_forced_where_there_is_none(
    fastood, calls, monkeypatch, forced
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("FASTOOD_IMPL", forced)
    kernels = fastood("info", "--json").json["kernels"]
    assert kernels["active"] == "none"
    assert f"FASTOOD_IMPL={forced}, but there is no CUDA device" in kernels["why"]
