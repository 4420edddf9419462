"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Curves"]


class Curves:
    """Writes scalars below ``folder``; without the ``tensorboard`` package, says so and does not.

    Args:
        folder: of the event files.
        start: steps from here on replace what an interrupted run wrote.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            warnings.warn(
                f"no TensorBoard log is written ({error}); pip install tensorboard, or read "
                f"history.jsonl, which has the same numbers",
                stacklevel=2,
            )
            return
        writer: Any = SummaryWriter
        self._writer = writer(str(folder), purge_step=start)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point of each curve; None is left out."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        if self._writer is not None:
            self._writer.close()
