"""Results on disk: written anew after every case, whole or not at all, so a killed run keeps them.

``started`` names the cases that were begun. With ``--resume`` they are not begun again: the last of
them is what left the device unusable, or hung.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.page import page
from fastood.atomic import write_text

__all__ = ["Store"]


@dataclass
class Store:
    """What is known so far of this machine."""

    folder: Path
    name: str
    facts: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @classmethod
    def resumed(cls, folder: Path, name: str, facts: dict[str, Any]) -> Store:
        """What an earlier run left, or an empty one."""
        store = cls(folder, name, facts)
        try:
            found = json.loads(store.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return store
        store.ceilings, store.started, store.rows = (
            found[key] for key in ("ceilings", "started", "rows")
        )
        return store

    def save(self) -> None:
        write_text(self.path, self.text())
        write_text(self.folder / f"{self.name}.md", page(self.facts, self.ceilings, self.rows))

    def text(self) -> str:
        """JSON, one line for each record, five digits of every number."""
        head = {
            "facts": self.facts,
            "ceilings": self.ceilings,
            "finished": self.finished,
            "started": self.started,
        }
        lines = [f"{json.dumps(k)}: {json.dumps(_short(v))}," for k, v in head.items()]
        rows = ",\n".join(json.dumps(_short(row), ensure_ascii=False) for row in self.rows)
        return "{" + "\n".join(lines) + f'\n"rows": [\n{rows}\n]}}\n'


def _short(x: Any) -> Any:
    if isinstance(x, float):
        # JSON has no infinity: an error that is not a number is none
        return float(f"{x:.5g}") if abs(x) < float("inf") else None
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    return [_short(v) for v in x] if isinstance(x, (list, tuple)) else x
