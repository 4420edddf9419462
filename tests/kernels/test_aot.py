"""Every committed configuration compiles for A100 and H100, fits, and keeps to its registers.

Compilers run in processes without TRITON_INTERPRET, one for each GPU, each with the calls its
families name as the most demanding; ``python -m fastood.kernels.aot`` compiles all of them, at all
widths.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fastood.kernels import aot, configs

GPUS = {90: 512, 80: 768}
"""A width for each, so that both are seen."""
CALLS = 1

KERNELS = Path(aot.__file__).parent


def compiling() -> dict[str, str]:
    """The environment of a process that compiles."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


def run(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(path)], env=compiling(), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, Any]]:
    """What is known of every kernel."""
    folder = tmp_path_factory.mktemp("aot")
    started = []
    for arch, width in GPUS.items():
        command = [sys.executable, "-m", "fastood.kernels.aot", "--arch", arch, "--width", width]
        command += ["--calls", CALLS, "--json", folder / f"{arch}.json"]
        with (folder / f"{arch}.txt").open("w") as out:
            started.append(
                subprocess.Popen(
                    [str(c) for c in command],
                    env=compiling(),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    found = []
    for arch, process in zip(GPUS, started, strict=True):
        assert process.wait() in (0, 1), (folder / f"{arch}.txt").read_text()[-3000:]
        found += json.loads((folder / f"{arch}.json").read_text())
    return found


def name(c: dict[str, Any]) -> str:
    of = f"sm_{c['arch']} {c['family']} {c['precision']} {c['config']} D={c['width']} {c['label']}"
    return f"{of}: {c['kernel']}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_everything_compiles_fits_and_does_not_spill(arch, compiled):
    problems = [f"{name(c)}: {c['problems']}" for c in compiled if c["arch"] == arch]
    problems = [p for p in problems if not p.endswith("[]")]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_no_entry_is_left_out(arch, compiled):
    seen = {
        (c["family"], c["precision"], configs.Config(*c["config"]))
        for c in compiled
        if c["arch"] == arch
    }
    left = {(e.family, e.precision, e.config) for e in configs.entries()} - seen
    assert not left


@pytest.mark.slow
def test_products_use_the_matrix_units_of_each_gpu(compiled):
    """Asynchronous ones (HGMMA) on H100 for large tiles; none for fp32."""
    for c in compiled:
        mix = c["instructions"]
        products = mix.get("HGMMA", 0) + mix.get("HMMA", 0)
        if c["precision"] == "fp32" or c["family"] == "given":
            assert products == 0, name(c)
        elif c["family"] == "rows" and c["kernel"] == "_states":
            assert mix.get("HGMMA" if c["arch"] == 90 else "HMMA", 0) > 0, name(c)


@pytest.mark.slow
def test_as_many_programs_share_a_processor_as_the_table_counts_on(compiled):
    checked = 0
    for c in compiled:
        resident = configs.Config(*c["config"]).resident
        if c["arch"] == 90 and c["instructions"].get("HGMMA", 0) and resident > 1:
            assert c["resident"] >= resident, name(c)
            checked += 1
    assert checked or all(e.config.resident == 1 for e in configs.entries())


def test_every_kernel_that_is_launched_is_compiled(tmp_path):
    launched = set()
    for path in KERNELS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        started = set(re.findall(r"\blaunch\(\s*(\w+),", text))
        launched |= started & set(re.findall(r"@triton\.jit\b.*\ndef (\w+)", text))
    script = """
        from unittest import mock
        from triton.runtime.jit import JITFunction
        from fastood.kernels import aot, configs

        names = set()
        note = lambda self, *arguments, **options: names.add(self.fn.__name__)
        with mock.patch.object(JITFunction, "run", note):
            for e in configs.entries():
                with mock.patch.object(configs, "processors", lambda device: 132):
                    calls = aot.specialisations_of(e.family)(e.precision, 1024, 64)
                    for label, call in calls:
                        call()
        print(*names)
    """
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert launched, "nothing looks like launch(kernel, ...)"
    assert not launched - set(done.stdout.split())


def made(**what: Any) -> aot.Compiled:
    config = configs.Config(64, 128, 64, 4, 4)
    return aot.Compiled(
        "rows", "fp16", config, 512, 90, "c=1", **{"warps": 4, "registers": 64, **what}
    )


class TestProblems:
    def test_none(self):
        fits = made(shared=232_448, registers=255, instructions={"all": 3, "HGMMA": 1})
        assert fits.problems == []
        assert "!!" not in fits.line

    def test_shared_memory(self):
        (problem,) = made(shared=232_449).problems
        assert "232449" in problem and "232448" in problem
        a100 = made(shared=166_913)
        a100.arch = 80
        assert "166912" in a100.problems[0]

    @pytest.mark.parametrize(
        "what", [{"instructions": {"LDL": 1}}, {"instructions": {"STL": 2}}, {"stack": 8}]
    )
    def test_spills(self, what):
        (problem,) = made(**what).problems
        assert "spills" in problem and "spills" in made(**what).line

    def test_what_the_compiler_said(self):
        assert made(error="PTXASError: no").problems == ["PTXASError: no"]

    def test_programs_side_by_side(self):
        assert made(shared=98_304, registers=202).resident == 2  # shared memory for two
        assert made(shared=1024, registers=255).resident == 2  # registers for two
        assert made(shared=1024, registers=255, warps=8).resident == 1
        assert made(shared=0, registers=16, warps=1).resident == 32
        assert made(registers=0).resident == 0


def test_binaries_are_read_and_faults_reported(tmp_path):
    script = """
        import types
        import torch, triton, triton.language as tl
        from fastood.kernels import aot, configs
        from fastood.kernels.launch import launch

        @triton.jit
        def product(x, out, N: tl.constexpr):
            at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
            a = tl.load(x + at)
            tl.store(out + at, tl.dot(a, a))

        @triton.jit
        def crowded(x, out, N: tl.constexpr):
            at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
            a = tl.load(x + at).to(tl.float32)
            top = tl.max(tl.max(a, axis=1), axis=0)  # all of them are needed twice
            tl.store(out + at, tl.exp(a - top))

        @triton.jit
        def refused(x, N: tl.constexpr):
            tl.static_assert(N < 0, "N is not negative")

        def calls(precision, rows, width):
            x, out = torch.empty(64, 64, dtype=torch.float16), torch.empty(64, 64)
            size = {"device": x.device, "num_warps": 4, "num_stages": 2}
            yield "good", lambda: launch(product, (1,), x, out, 64, **size)
            yield "crowded", lambda: launch(crowded, (1,), x, out, 64, maxnreg=24, **size)
            yield "refused", lambda: launch(refused, (1,), x, 64, **size)

        aot.specialisations_of = lambda family: calls
        entry = configs.entries()[0]
        for arch in (80, 90):
            found = aot.compile_unit(aot.Unit(entry, 64, 64, arch))
            good, spilling, failed, unpicked = found
            assert not good.problems, good
            assert good.warps == 4 and good.stages == 2 and good.shared > 0
            assert 32 < good.registers < 256 and good.instructions["all"] > 50
            assert ("HGMMA" if arch == 90 else "HMMA") in good.instructions
            assert "spills" in spilling.problems[0], spilling
            assert "N is not negative" in failed.error and failed.kernel == "refused"
            assert "no call picks" in unpicked.error
        def broken(precision, rows, width):
            raise RuntimeError("of the launcher")
        aot.specialisations_of = lambda family: broken
        (fault,) = aot.compile_unit(aot.Unit(entry, 64, 64, 90))
        assert "of the launcher" in fault.error
        print("read")
    """
    done = run(tmp_path, script)
    assert done.returncode == 0 and "read" in done.stdout, done.stdout + done.stderr


def test_interpreted_kernels_cannot_be_compiled():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fastood.kernels.aot"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--family", "rowz"), "invalid choice: 'rowz'"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
        (("--family", "given", "--precision", "bf16"), "no entry of the table"),
    ],
)
def test_a_command_that_compiles_nothing_says_why(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(aot.launch, "INTERPRETED", False)
    with pytest.raises(SystemExit) as stopped:
        aot.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
