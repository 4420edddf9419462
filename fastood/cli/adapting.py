"""Adaptations of a command line: put on the model before the work, named in what is printed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastood.cli import show

if TYPE_CHECKING:
    import os

    from fastood.models.base import Encoder

__all__ = ["changed", "say_how_to_use"]


def changed(encoder: Encoder, files: Sequence[str] | None) -> Encoder:
    """``encoder`` with the files of ``--adapt``, to train or search on.

    Raises:
        ValueError: a file with classes of its own among them.
    """
    if not files:
        return encoder
    from fastood.tuning.adaptation import adapt

    found = adapt(encoder, files)
    if found.head is not None:
        raise ValueError(
            f"--adapt {files[-1]}: expected files that change towers, got one with classes of its "
            "own; nothing can be trained or searched on top of it"
        )
    return found.encoder


def say_how_to_use(
    files: Sequence[str | os.PathLike[str] | None],
    *,
    model: str,
    pretrained: str | None,
    checkpoint: str | None,
    allow_pickle: bool,
    dtype: str = "float32",
) -> None:
    """Print the command that evaluates with ``files``, on the model as it was named here."""
    words = ["--model", model]
    for option, value in (("pretrained", pretrained), ("checkpoint", checkpoint)):
        words += [] if value is None else [f"--{option}", value]
    words += ["--allow-pickle"] * allow_pickle
    words += [] if dtype == "float32" else ["--dtype", dtype]
    for file in files:
        words += ["--adapt", str(file)]
    show.line(f"use it: fastood eval {shlex.join(words)} --id ... --ood ...")
