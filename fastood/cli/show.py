"""What a person sees: errors in one line, warnings once, progress with rate and time left."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from fastood.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from fastood.features.encode import Progress

__all__ = [
    "command",
    "console",
    "duration",
    "error",
    "line",
    "note",
    "plain_warnings",
    "print_json",
    "progress",
    "typed",
]

_COMMAND: ContextVar[str | None] = ContextVar("command", default=None)


@contextmanager
def command(words: Sequence[str]) -> Iterator[None]:
    """While the block runs, ``typed()`` is the command with these words."""
    token = _COMMAND.set(visible(shlex.join(["fastood", *words])))
    try:
        yield
    finally:
        _COMMAND.reset(token)


def typed() -> str | None:
    """The command as it was typed, for the record."""
    return _COMMAND.get()


def console(*, stderr: bool = False) -> Console:
    """A console; results go to stdout, everything else to stderr."""
    from rich.console import Console

    # a pipe or a log file has no width of its own; rich would assume 80 and fold the tables
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Console(stderr=stderr, highlight=False, width=width)


def line(text: str) -> None:
    """A line on stdout; names that are not UTF-8 show as escapes."""
    sys.stdout.write(visible(text) + "\n")


def error(message: str) -> None:
    from rich.text import Text

    text = _one_line(message)
    console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def note(message: str) -> None:
    from rich.text import Text

    text = _one_line(message)
    console(stderr=True).print(Text.assemble(("note: ", "bold yellow"), text), soft_wrap=True)


def _one_line(text: str) -> str:
    """Line breaks and control characters of messages and file names do not reach the terminal."""
    text = " ".join(visible(text).splitlines())
    return "".join(ch if ch.isprintable() else ascii(ch)[1:-1] for ch in text)


def print_json(content: Mapping[str, Any] | list[Any]) -> None:
    """Machine-readable output: one JSON document on stdout, nothing else there."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def plain_warnings() -> None:
    """Show each of our warnings once, as a line, without the source line Python adds."""
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del filename, lineno, file, line
        text = str(message)
        if issubclass(category, (UserWarning, RuntimeWarning)) and text not in seen:
            seen.add(text)
            note(text)

    warnings.showwarning = show


def duration(seconds: float) -> str:
    """``1:02:03``, or ``-:--`` where it is not known."""
    if not 0 <= seconds < 1e7:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar per image set, with images per second and time left."""
    if quiet:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def update(done: int, total: int, name: str) -> None:
        from rich.markup import escape

        if not tasks:  # a command that fails before leaves no empty line behind
            bars.start()
        if name not in tasks:
            tasks[name] = bars.add_task(escape(name), total=total, rate="")
        task = bars.tasks[tasks[name]]
        speed = task.finished_speed or task.speed
        bars.update(tasks[name], completed=done, rate=f"{speed:.0f} img/s" if speed else "")

    try:
        yield update
    finally:
        if tasks:
            bars.stop()
