"""What ran where: GPU, driver, clocks, compilers and versions; no names of hosts or users."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastood import __version__

__all__ = ["describe", "file_name", "main"]

_QUERY = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {
        "gpu": None,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "nvcc": _nvcc(),
        "fastood": __version__,
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            **_smi(),
        }
    return found


def file_name(gpu: str | None) -> str:
    """A short name such as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "no-gpu").lower()).strip("-")


def clocks() -> dict[str, str]:
    """Clocks and temperature as they are now."""
    found = _smi()
    return {k: found[k] for k in ("sm_mhz", "memory_mhz", "temperature_c") if k in found}


def _smi() -> dict[str, str]:
    text = _output(
        ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_QUERY.values())}",
         "--format=csv,noheader,nounits"]
    )  # fmt: skip
    values = [v.strip() for v in text.splitlines()[0].split(",")] if text.strip() else []
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


def _nvcc() -> str | None:
    found = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]))
    return found.group(1) if found else None


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Print the facts; 2 if there is no GPU."""
    found = describe()
    for name, value in found.items():
        print(f"{name:>14}  {value}")
    print(f"{'sanitizer':>14}  {shutil.which('compute-sanitizer')}")
    return 0 if found["gpu"] else 2


if __name__ == "__main__":
    raise SystemExit(main())
