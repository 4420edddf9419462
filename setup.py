"""Maps ``csrc`` into the wheel as ``fastood/_csrc``; everything else lives in pyproject.toml.

Kernels are compiled just in time, so a wheel has to carry its C++ and CUDA sources. A checkout
reads ``csrc`` where it lies. ``FASTOOD_BUILD=1 pip install --no-build-isolation .`` compiles the
CPU kernels into the wheel too, from the same sources with the same flags; only that needs torch.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup


def prebuilt():
    """The compiled CPU kernels as ``fastood._cpu``, if ``FASTOOD_BUILD=1`` asks for them."""
    if os.environ.get("FASTOOD_BUILD", "0").strip() in ("", "0"):
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "_fastood_build", root / "fastood" / "ops" / "build.py"
    )
    build = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)

    cpu = build.cpu_extension(root / "csrc")
    flags = build.flags_for(cpu, build.version_of(os.environ.get("CXX", "c++")))
    extension = CppExtension(
        f"fastood.{cpu.name}",
        [str(source.relative_to(root)) for source in cpu.sources],
        include_dirs=[str(folder) for folder in cpu.include],
        extra_compile_args=[*flags, build.define_key(build.key(cpu))],
        extra_link_args=list(cpu.ldflags),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[*find_packages(include=["fastood", "fastood.*"]), "fastood._csrc"],
    include_package_data=False,  # photographs are data; setuptools would warn of packages
    package_dir={"fastood._csrc": "csrc"},
    package_data={
        "fastood": ["py.typed"],
        "fastood.kernels": ["*.json"],
        "fastood.models": ["tiny/*"],
        "fastood.demo": ["photos/**/*", "*.json", "*.md", "*.txt"],
        "fastood.report": ["*.html", "*.css"],
        "fastood._csrc": ["*", "**/*"],
    },
    **prebuilt(),
)
