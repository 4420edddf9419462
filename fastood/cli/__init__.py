"""The command line: parses, prints and exits; everything else is done by the packages below it."""

from fastood.cli.app import main

__all__ = ["main"]
