"""The real kernels: their threads, and each way they get onto a machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastood.ops.build import cpu_extension, cuda_extension, key
from tests.ops.tiny import needs_compiler

ROOT = Path(__file__).parents[2]

pytestmark = needs_compiler


def fresh(code: str, **environment: str) -> str:
    """What a new process prints; its kernels are those of this machine's cache."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUNTIMES = (
    "import json, torch\n"
    "torch.set_num_threads(2)\n"
    "{first}\n"
    "module = loader.cpu()\n"
    "threads = module.parallel_threads()\n"
    "{last}\n"
    "mapped = {{l.split()[-1] for l in open('/proc/self/maps') if '/' in l}}\n"
    "names = [m for m in mapped if any(n in m for n in ('libgomp', 'libomp', 'libiomp'))]\n"
    "print(json.dumps([module.openmp, threads, names]))"
)
TORCH_WORK = "torch.rand(512, 512).exp_().sum().item()"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["torch first", "kernels first"])
def test_one_openmp_runtime_and_both_threads_work(order):
    """A second libgomp has threads of its own; without -fopenmp there would be one thread."""
    loading = "from fastood.ops import loader"
    parts = (f"{TORCH_WORK}\n{loading}", "") if order == "torch first" else (loading, TORCH_WORK)
    openmp, threads, runtimes = json.loads(
        fresh(RUNTIMES.format(first=parts[0], last=parts[1]), OMP_NUM_THREADS="2")
    )
    assert openmp is True and threads == [0, 1]
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
def test_a_forked_single_threaded_child_runs_the_kernels():
    """As DataLoader workers do; a parallel region would wait there for threads that are gone."""
    out = fresh(
        "import os, torch\n"
        "from fastood.ops import loader\n"
        "torch.set_num_threads(2)\n"
        "assert loader.cpu().parallel_threads() == [0, 1]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if loader.cpu().parallel_threads() == [0] else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        OMP_NUM_THREADS="2",
    )
    assert out == "0\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: setuptools builds in place and would leave folders behind."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("checkout") / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def install(source: Path, *words: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_wheel_and_archive_carry_every_source(source, tmp_path):
    extension = cpu_extension()
    csrc = extension.include[0]
    gpu = cuda_extension("9.0")
    files = (*extension.sources, *extension.headers, *gpu.sources, *gpu.headers)
    wanted = {str(f.relative_to(csrc)) for f in files}
    install(source, "wheel", "-q", "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wanted <= {n.removeprefix("fastood/_csrc/") for n in names}

    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = [n.split("/", 1)[-1] for n in content.getnames()]
    assert wanted <= {n.removeprefix("csrc/") for n in names}


@pytest.mark.slow
def test_fastood_build_1_installs_kernels_that_are_picked_up(source, tmp_path):
    install(source, "install", "-q", "--target", str(tmp_path / "site"), FASTOOD_BUILD="1")
    state = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import fastood, json\n"
        "from fastood.ops import loader\n"
        "before = loader.status()\n"
        "{ask}\n"
        "print(json.dumps([fastood.__file__, before.kind, before.key, str(before.why)]))"
    )
    environment = {"FASTOOD_CACHE": str(tmp_path / "cache"), "FASTOOD_JIT": "0"}
    ask = "assert loader.cpu().build_key == before.key"
    file, kind, found, _ = json.loads(fresh(state.format(ask=ask), **environment))
    assert Path(file).is_relative_to(tmp_path) and kind == "prebuilt"
    assert found == key(cpu_extension())  # a checkout, a wheel and setup.py agree
    assert not (tmp_path / "cache").exists()

    with (tmp_path / "site" / "fastood" / "_csrc" / "bind.cpp").open("a") as bind:
        bind.write("\n")
    _, kind, _, why = json.loads(fresh(state.format(ask=""), **environment))
    assert kind is None and "prebuilt for other sources" in why
