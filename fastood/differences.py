"""What differs between two JSON values, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["differences"]

_LONGEST = 200  # characters of a value


def differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """Lines ``name: saved …, now …`` for everything that differs between two JSON values.

    Of lists of equal length the first difference is told; long values are cut.
    """
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
        return differences(saved[first], now[first], f"{where}[{first}]")
    return [f"{where}: saved {_short(saved)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
