"""What happened in a training run: numbers of every epoch, and where they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastood.atomic import write_text

__all__ = ["History", "Progress"]


class Progress(NamedTuple):
    """Where training is; losses and accuracy are means over the epoch so far."""

    epoch: int
    """From 1."""
    epochs: int
    step: int
    """From 1, within the epoch."""
    steps: int
    loss: float
    accuracy: float
    """Of the training images as they are trained on, before each step."""
    eta_seconds: float


@dataclass
class History:
    """A run so far.

    Attributes:
        settings: what decides about the result; a resumed run must have the same.
        environment: what may differ in a resumed run (processes, device, versions).
        data: what the training and validation data are, in words and digests.
        epochs: for each finished epoch ``epoch`` (from 1), ``loss``, ``terms``, ``accuracy``,
            ``lr``, ``images``, ``steps``, ``seconds``, ``validation`` (accuracy or None).
        select: ``"last"`` or ``"validation"``.
        selected: the epoch whose parameters the method has in the end.
        finished: False if training stopped before the last epoch.
        notes: warnings and what a reader of the numbers should know.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    select: str = "last"
    selected: int | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> History:
        """The inverse of ``as_dict``."""
        return cls(**saved)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def write(self, file: Path) -> None:
        """JSON lines: one that describes the run, then one for each epoch; atomically."""
        head = {k: v for k, v in self.as_dict().items() if k != "epochs"}
        write_text(file, "".join(f"{json.dumps(row)}\n" for row in ({"run": head}, *self.epochs)))
