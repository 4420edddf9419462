"""What ran where: processor, instruction sets, threads and versions; no names of hosts or users."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "file_name"]

_PACKAGES = ("torch", "numpy", "scikit-learn", "pytorch-ood")


def describe() -> dict[str, Any]:
    from fastood import __version__
    from fastood.ops import loader

    module = loader.try_cpu()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "fastood_isa": module.active_instruction_set() if module is not None else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastood": __version__,
        "packages": {name: _installed(name) for name in _PACKAGES},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def file_name(machine: dict[str, Any]) -> str:
    """A short name such as ``intel-xeon-avx512-2-threads``."""
    cpu = re.sub(r"\((R|TM|tm|r)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", machine["cpu"])
    words = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"
    return f"{words}-{machine['fastood_isa']}-{machine['threads']}-threads"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
