"""``python -m fastood`` is the ``fastood`` command."""

from fastood.cli import main

main()
