"""The errors a user can meet.

Wrong values raise ``ValueError``, wrong types ``TypeError``. The classes here cover what is wrong
with the *world* rather than with an argument. The command line turns all of them into one line and
exit code 2.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "CacheError",
    "DataError",
    "FastoodError",
    "KernelError",
    "ModelError",
    "TrainingError",
    "WeightsUnavailable",
]


class FastoodError(Exception):
    """Base of every error that is not simply a wrong argument."""


class DataError(FastoodError, ValueError):
    """A folder, list, archive or image that cannot be used as asked."""


class ModelError(FastoodError, ValueError):
    """A model that is unknown or cannot do what was asked (no local features, no text tower)."""


class WeightsUnavailable(ModelError):
    """Weights that could not be reached; the message lists what works offline."""


class CacheError(FastoodError):
    """A feature cache that cannot be read or written."""


class BuildError(FastoodError):
    """Kernels that cannot be compiled or loaded; the message has the reason and the remedy."""


class KernelError(FastoodError):
    """A GPU kernel that does not compile here; the message has the compiler's last lines."""


class TrainingError(FastoodError):
    """Training that cannot go on (a loss that is not finite); the last good state was kept."""
