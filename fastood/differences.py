"""What differs between two JSON values, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["differences"]


def differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """Lines ``name: saved …, now …`` for everything that differs between two JSON values."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        lines = []
        for key in [*saved, *(k for k in now if k not in saved)]:
            name = f"{where}.{key}" if where else str(key)
            lines += differences(saved.get(key), now.get(key), name)
        return lines
    if saved == now:
        return []
    if isinstance(saved, list) and isinstance(now, list):
        if len(saved) != len(now):
            return [f"{where}: saved {len(saved)} entries, now {len(now)}"]
        first = next(i for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b)
        return [f"{where}[{first}]: saved {saved[first]!r}, now {now[first]!r}"]
    return [f"{where}: saved {saved!r}, now {now!r}"]
