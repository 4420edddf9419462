"""The shipped demonstration: photographs, their classes, and nothing learned from them.

``id`` and ``calibration`` hold a folder per ID class, ``near`` one per near-OOD class, and the
far-OOD sets lie flat. Licences: ``photos/LICENCES.md``; source and checksum of every picture:
``manifest.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastood.errors import DataError

__all__ = [
    "CALIBRATION",
    "FAR_OOD",
    "ID",
    "ID_CLASSES",
    "NEAR_OOD",
    "NEAR_OOD_CLASSES",
    "OOD",
    "manifest",
    "photo_folder",
]

ID_CLASSES = ("dress", "longsleeve", "pants", "shoes", "t-shirt")
"""In-distribution clothing classes. Fixed before the tiny model was trained."""

NEAR_OOD_CLASSES = ("hat", "outwear", "shirt", "shorts", "skirt")
"""Near-OOD clothing classes: the rest of the same collection. No photograph of any of them, in any
split, was seen in training; neither was any photograph shipped here."""

ID = "id"
CALIBRATION = "calibration"
"""ID photographs of another split than ``ID``: the threshold is set on these alone."""
NEAR_OOD = "near"
FAR_OOD = ("far-scikit-image", "far-omniglot")
OOD = (NEAR_OOD, *FAR_OOD)

_HERE = Path(__file__).parent


def photo_folder(part: str | None = None) -> Path:
    """Folder of one part (``ID``, ``CALIBRATION`` or one of ``OOD``), or of all of them.

    Raises:
        ValueError: for a part there is not.
        DataError: if the pictures are missing from the installation.
    """
    parts = (ID, CALIBRATION, *OOD)
    if part is not None and part not in parts:
        raise ValueError(f"part: expected one of {', '.join(parts)}, got {part!r}")
    folder = _HERE / "photos" / (part or "")
    if not folder.is_dir():
        raise DataError(
            f"demo photographs: {folder} is missing; the installation is incomplete, "
            f"reinstall fastood"
        )
    return folder


def manifest() -> dict[str, Any]:
    """Seed, count, and for each picture path, SHA-256, size, source and licence."""
    return json.loads((_HERE / "manifest.json").read_text(encoding="utf-8"))
