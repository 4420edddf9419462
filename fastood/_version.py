"""The version of fastood, and of what it runs on."""

from __future__ import annotations

__version__ = "0.1.0"


def installed(package: str) -> str | None:
    """The version of an installed package, found without importing it; None if it is absent."""
    from importlib import metadata  # twenty modules, which `import fastood` does without

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
