"""The package as a user meets it: import cost, public names, the wheel, the README."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastood

ROOT = Path(fastood.__file__).parent.parent
README = ROOT / "README.md"


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_brings_nothing_heavy_and_prints_nothing():
    heavy = "'open_clip', 'transformers', 'matplotlib', 'timm', 'datasets', 'pyarrow', 'jinja2'"
    out = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastood; fastood.mcm; fastood.ClassBank; fastood.ebm_loss; fastood.calibrate\n"
        "fastood.metrics.evaluate; fastood.detectors\n"
        f"print([m for m in ({heavy}) if m in sys.modules])"
    )
    assert out == "[]\n"
    assert python("import sys, fastood; print('torch' in sys.modules)") == "False\n"


def test_import_costs_at_most_as_many_modules_as_it_needs():
    """A stand-in for the 0.3 s promise that does not depend on the machine's mood."""
    out = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastood\n"
        "print(len([m for m in set(sys.modules) - before if not m.startswith('fastood')]))"
    )
    assert int(out) <= 2


@pytest.mark.parametrize("name", fastood.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(fastood, name)
    if callable(value):
        assert value.__doc__ and len(value.__doc__) > 20


def packages() -> list[str]:
    found = pkgutil.walk_packages(fastood.__path__, "fastood.")
    return ["fastood", *(m.name for m in found if m.ispkg)]


@pytest.mark.parametrize("name", packages())
def test_no_module_hides_a_name_that_is_loaded_on_first_use(name):
    """Importing ``package.search`` makes ``package.search`` that module, whatever it was before."""
    package = importlib.import_module(name)
    modules = getattr(package, "_MODULES", {})
    taken = {m.name for m in pkgutil.iter_modules(package.__path__)}
    assert taken.isdisjoint(n for names in modules.values() for n in names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mmc'"):
        _ = fastood.mmc
    assert "mcm" in dir(fastood)


@pytest.mark.slow
def test_the_wheel_carries_everything(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    # a copy: setuptools builds in place and would leave a build folder behind
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "fastood/py.typed",
        "fastood/_csrc/README.md",
        "fastood/models/tiny/model.safetensors",
        "fastood/models/tiny/MODEL_CARD.md",
        "fastood/report/template.html",
        "fastood/report/report.css",
        "fastood/demo/manifest.json",
        "fastood/demo/photos/LICENCES.md",
    ):
        assert part in names, part
    photos = [n for n in names if n.startswith("fastood/demo/photos/") and n.endswith(".jpg")]
    assert len(photos) >= 150
    assert any(n.endswith("licenses/LICENSE") for n in names)


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", range(len(readme_blocks()) if README.is_file() else 0))
def test_the_python_examples_of_the_readme_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    exec(compile(readme_blocks()[block], f"README block {block}", "exec"), {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_package_can_be_imported_first():
    """None works only because another happened to be imported before it."""
    root = Path(fastood.__file__).parent
    names = sorted(f"fastood.{p.parent.name}" for p in root.glob("*/__init__.py"))
    names.remove("fastood.kernels")  # wants Triton
    failed = python(
        "import importlib, os, torch, open_clip\n"
        f"for name in {names!r}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except ImportError as error:\n"
        "            print(name, error, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    assert failed == ""
