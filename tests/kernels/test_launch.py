"""Starting kernels: where, with what, and what a compiler's refusal becomes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastood.errors import KernelError
from fastood.kernels import launch as module
from fastood.kernels.launch import launch, processors, usable

CPU = torch.device("cpu")


class Kernel:
    """Notes its calls, or fails."""

    __name__ = "_kernel"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple] = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append((grid, arguments, options))
            if self.error is not None:
                raise self.error

        return run


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, with nothing failed yet."""
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_failed", {})


def triton_error(text: str) -> Exception:
    from triton.errors import TritonError

    class CompilationError(TritonError):
        pass

    return CompilationError(text)


def test_arguments_and_options_arrive(compiled):
    kernel = Kernel()
    launch(kernel, (3, 2), "x", 7, device=CPU, D=64, num_warps=4)
    (grid, arguments, options) = kernel.calls[0]
    assert (grid, arguments) == ((3, 2), ("x", 7))
    assert options == {"D": 64, "num_warps": 4, "enable_fp_fusion": True}


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0)])
def test_an_empty_grid_is_not_started(grid, compiled):
    kernel = Kernel()
    launch(kernel, grid, device=CPU)
    assert kernel.calls == []


def test_the_tensors_device_is_made_current_and_left_again(compiled, monkeypatch):
    entered = []

    @contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Kernel()
    launch(kernel, (1,), device=torch.device("cuda", 0))
    assert entered == []
    launch(kernel, (1,), device=torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1), "left"]
    assert len(kernel.calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        triton_error("\n".join(f"line {i}" for i in range(20))),
        subprocess.CalledProcessError(
            1, "gcc", stderr="\n".join(f"line {i}" for i in range(20)).encode()
        ),
        RuntimeError("\n".join([*(f"line {i}" for i in range(19)), "PassManager::run failed 19"])),
    ],
    ids=["triton", "compiler of the launcher", "pass"],
)
def test_what_does_not_compile_is_reported_with_the_last_lines(error, compiled):
    with pytest.raises(KernelError) as caught:
        launch(Kernel(error), (1,), device=CPU, D=64)
    text = str(caught.value)
    assert "_kernel" in text and "19" in text.splitlines()[-1]
    assert "line 14" in text and "line 13" not in text
    assert caught.value.__cause__ is error


def test_it_is_not_compiled_again_and_other_options_are(compiled):
    kernel = Kernel(triton_error("shared memory"))
    with pytest.raises(KernelError) as first:
        launch(kernel, (1,), device=CPU, D=64)
    with pytest.raises(KernelError) as second:
        launch(kernel, (9,), device=CPU, D=64)
    assert len(kernel.calls) == 1
    assert str(second.value) == str(first.value)
    kernel.error = None
    launch(kernel, (1,), device=CPU, D=32)
    launch(Kernel(), (1,), device=CPU, D=64)
    assert len(kernel.calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        TypeError("missing a required argument: 'K'"),
    ],
    ids=["memory access", "assert", "out of memory", "arguments"],
)
def test_what_a_running_kernel_did_is_not_taken_for_a_compiler_error(error, compiled):
    kernel = Kernel(error)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            launch(kernel, (1,), device=CPU, D=64)
        assert caught.value is error
    assert len(kernel.calls) == 2


def test_interpreted_kernels_raise_what_they_raise(compiled, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", True)
    error = triton_error("of the interpreter")
    with pytest.raises(type(error)):
        launch(Kernel(error), (1,), device=CPU)


_REFUSED = """
    import sys
    import torch, triton, triton.language as tl
    from fastood.errors import KernelError
    from fastood.kernels import aot
    from fastood.kernels.launch import launch
    from triton.runtime import driver

    @triton.jit
    def of_triton(x, N: tl.constexpr):
        tl.static_assert(N < 0, "the reason is that N is not negative")
        tl.store(x, N)

    @triton.jit
    def of_ptxas(x, N: tl.constexpr):
        v = tl.inline_asm_elementwise("no.such.instruction $0, $1;", "=r,r", [tl.arange(0, N)],
                                      dtype=tl.int32, is_pure=False, pack=1)
        tl.store(x + tl.arange(0, N), v)

    driver.set_active(aot._Driver(90))
    x = torch.zeros(32, dtype=torch.int32)
    for kernel, words in ((of_triton, "not negative"), (of_ptxas, "Unknown modifier")):
        for _ in range(2):
            try:
                launch(kernel, (1,), x, device=x.device, N=32)
            except KernelError as error:
                assert kernel.__name__ in str(error) and words in str(error), error
            else:
                sys.exit("compiled?")
    print("refused")
"""


def test_refusals_of_the_real_compilers(tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(textwrap.dedent(_REFUSED), encoding="utf-8")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr


class TestUsable:
    @pytest.fixture(autouse=True)
    def fresh(self):
        module._installed.cache_clear()
        module._device.cache_clear()
        yield
        module._installed.cache_clear()
        module._device.cache_clear()

    def on_gpu(self, dtype=torch.float32, index=0):
        device = SimpleNamespace(index=index, type="cuda")
        return SimpleNamespace(dtype=dtype, is_cuda=True, is_cpu=False, device=device)

    def test_the_cpu_only_interpreted(self, monkeypatch):
        monkeypatch.setattr(module, "INTERPRETED", True)
        assert usable(torch.zeros(1), None, torch.zeros(1, dtype=torch.float16)) is None
        monkeypatch.setattr(module, "INTERPRETED", False)
        assert "CUDA tensors, got one on cpu" in usable(torch.zeros(1))
        assert usable(None) is None

    def test_float64_never(self, monkeypatch):
        monkeypatch.setattr(module, "INTERPRETED", True)
        assert "float64" in usable(torch.zeros(1), torch.zeros(1, dtype=torch.float64))

    def test_old_gpus_are_named(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index]
        )
        assert usable(self.on_gpu(index=0)) is None
        reason = usable(self.on_gpu(index=0), self.on_gpu(index=1))
        assert "Old GPU" in reason and "7.5" in reason and "8.0" in reason

    def test_gpus_of_others(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert "NVIDIA" in usable(self.on_gpu())

    @pytest.mark.parametrize(
        ("version", "good"), [("3.3.0", True), ("3.2.0", False), ("4.0", True)]
    )
    def test_old_triton(self, version, good, monkeypatch):
        monkeypatch.setattr(module, "INTERPRETED", True)
        monkeypatch.setattr(module.metadata, "version", lambda name: version)
        reason = usable(torch.zeros(1))
        assert (reason is None) == good
        if not good:
            assert version in reason and "3.3" in reason

    def test_no_triton(self, monkeypatch):
        def missing(name):
            raise module.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(module, "INTERPRETED", True)
        monkeypatch.setattr(module.metadata, "version", missing)
        assert usable(torch.zeros(1)) == "Triton is not installed"


def test_processors_of_the_cpu():
    assert processors(CPU) == 1
