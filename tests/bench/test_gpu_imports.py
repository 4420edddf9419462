"""What ``bench/gpu.sh`` runs needs torch, Triton, NumPy and pytest, and nothing else installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.fake_gpu import why_not_interpreted

ROOT = Path(__file__).parents[2]
OWN = {"bench", "fastood", "tests"}
TORCH = {
    *("torch", "torchgen", "functorch", "triton", "numpy", "typing_extensions", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "filelock", "fsspec", "nvidia", "setuptools"),
    *("_distutils_hack", "pkg_resources", "cuda", "pybind11", "ninja"),
}
PYTEST = {"pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest_benchmark"}

RUN = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
allowed = set(sys.stdlib_module_names) | {allowed!r}

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
        return None

    def find_distributions(self, context):
        known = context.name is None or context.name.replace("-", "_") in allowed
        return PathFinder.find_distributions(context) if known else []

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only()]
import torch
import fastood
from bench.gpu import __main__, facts, small, tune
device = torch.device("cpu")
calls = small.families(device)
for name in {names!r}:
    calls[name]()
x = torch.randn(5, 16)
for impl in ("reference", None):
    fastood.mcm(x, fastood.ClassBank(x), impl=impl)
print("ran", facts.describe()["torch"] == torch.__version__)
"""


@pytest.mark.skipif(why_not_interpreted() is not None, reason=f"{why_not_interpreted()}")
def test_nothing_but_torch_triton_and_numpy_is_imported():
    names = ["delta_energy fp16", "neg_label fp16", "gl_mcm fp16", "ebm_loss fp16", "low_rank"]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(allowed=TORCH | OWN, names=names)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "TRITON_INTERPRET": "1",
            "FASTOOD_JIT": "0",
            "FASTOOD_CACHE": "/nonexistent",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "ran True\n"


def gpu_test_files() -> list[Path]:
    """As the script chooses them."""
    tests, mark = ROOT / "tests", "mark." + "gpu"
    found = list((tests / "kernels").glob("*.py"))
    for folder in ("cuda", "detectors", "metrics", "ops", "scores", "tuning"):
        marked = [p for p in (tests / folder).glob("test_*.py") if mark in p.read_text("utf-8")]
        found += marked + [p for p in (tests / folder).glob("conftest.py") if marked]
    found.append(tests / "conftest.py")
    return sorted({p for p in found if "aot" not in p.name})


@pytest.mark.parametrize("path", gpu_test_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_gpu_tests_import_nothing_else(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module or "")
    allowed = sys.stdlib_module_names | TORCH | PYTEST | OWN
    assert {name for name in imported if name.split(".")[0] not in allowed} == set()
