"""Finding the images of a saved evaluation again, for its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastood.errors import DataError

__all__ = ["opener"]


def opener(results: Mapping[str, Any]) -> Callable[[str, str], bytes | None]:
    """(set name, path) to bytes, or None where the file is gone."""
    roots = {s["name"]: Path(s["root"]) for s in [results["id"], *results["ood"]] if s.get("root")}
    listed: dict[str, dict[str, Callable[[], bytes]]] = {}

    def open_image(set_name: str, path: str) -> bytes | None:
        root = roots.get(set_name)
        if root is None:
            return None
        direct = root / path
        if Path(path).is_absolute() or ".." in Path(path).parts:
            return None  # results from elsewhere show pictures of their sets only
        try:
            if root.is_dir() and direct.is_file():
                return direct.read_bytes()
            if set_name not in listed:  # lists and archives: ask the loader once
                from fastood.data import load_images

                listed[set_name] = {item.path: item.read for item in load_images(root)}
            read = listed[set_name].get(path)
            return None if read is None else read()
        except (OSError, DataError):
            listed.setdefault(set_name, {})
            return None

    return open_image
