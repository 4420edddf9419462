"""How much is free on a disk or in memory, asked before hours of work and not after."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["free_disk", "free_memory", "size_text"]

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
"""Memory of the container, where there is one (control groups, version 2)."""


def free_disk(folder: Path) -> int:
    """Bytes free for this user where ``folder`` is, or will be."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int | None:
    """Bytes a new program could take without swapping; None where the system does not say."""
    found = []
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = (_GROUP / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # another system, or no limit
    return max(0, min(found)) if found else None


def size_text(count: float) -> str:
    """Bytes for a person: ``3.2 GB``.

    >>> size_text(3_211_264_000), size_text(900)
    ('3.2 GB', '900 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
