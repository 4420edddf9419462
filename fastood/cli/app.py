"""The ``fastood`` command and what its exit codes mean."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fastood.cli import show
from fastood.cli.about import cache_app, info, models
from fastood.cli.build import build
from fastood.cli.evaluate import demo, evaluate, report
from fastood.cli.screen import calibrate, score
from fastood.cli.search import search_app
from fastood.cli.train import train
from fastood.errors import FastoodError

__all__ = ["app", "main", "run"]

# typer brought its own copy of click at some point: take the classes from typer, whichever they are
_USAGE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")

_INTERRUPTED = 130

app = typer.Typer(
    name="fastood",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Out-of-distribution detection for vision-language models.",
    epilog=(
        "Exit codes: 0 done, 1 a fault of fastood itself, 2 wrong or unusable input, "
        "3 out-of-distribution images found (only with --fail-on-ood), 130 interrupted; "
        "the same command then continues where it stopped."
    ),
)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("score")(score)
app.command("calibrate")(calibrate)
app.command("train")(train)
app.command("demo")(demo)
app.command("models")(models)
app.command("build")(build)
app.command("info")(info)
app.add_typer(search_app, name="search")
app.add_typer(cache_app, name="cache")


def _version(value: bool) -> None:
    if value:
        from fastood._version import __version__

        typer.echo(f"fastood {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Python's warning filters are left as found."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("FASTOOD_DEBUG") == "1"
    with warnings.catch_warnings(), show.command(words):
        show.plain_warnings()
        try:
            # standalone_mode=False hands errors and codes to us instead of printing and exiting
            code: Any = app(args=words, prog_name="fastood", standalone_mode=False)
            sys.stdout.flush()
            if code == _INTERRUPTED:  # typer turns Ctrl-C into this code
                raise KeyboardInterrupt
            return code if isinstance(code, int) else 0
        except _USAGE as error:
            return _usage(error)
        except (KeyboardInterrupt, typer.Abort):
            kept = "; what was computed is kept, the same command continues from there"
            show.error("interrupted" + ("" if "--no-cache" in words else kept))
            return _INTERRUPTED
        except typer.Exit as done:
            return int(done.exit_code)
        except (BrokenPipeError, SystemExit) as gone:
            # The reader has gone, as with `fastood models | head`; typer and rich make that a
            # SystemExit. What is still buffered goes nowhere, or Python would complain at exit.
            if isinstance(gone, SystemExit) and gone.code not in (0, 1, None):
                raise
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ValueError, TypeError, FastoodError) as error:
            if debug:
                raise
            show.error(str(error))
            return 2
        except OSError as error:
            if debug:
                raise
            show.error(f"{error.filename or 'input or output'}: {error.strerror or error}")
            return 2
        except Exception as error:
            if debug:
                raise
            show.error(
                f"unexpected {type(error).__name__}: {error} (a fault of fastood; "
                "FASTOOD_DEBUG=1 shows where)"
            )
            return 1


def _usage(error: Any) -> int:
    """A command that could not be understood: one line, and where help is."""
    if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help already
        path = "fastood" if error.ctx is None else error.ctx.command_path
        show.error(f"{error.format_message()} (see {path} --help)")
    return 2
