"""The folder results go to: checked before any work, written atomically, never lost by accident."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastood.atomic import write_text
from fastood.errors import DataError

__all__ = ["OutputFolder", "read_results"]

_FILE_SUFFIXES = (".csv", ".html", ".json", ".parquet")


class OutputFolder:
    """A folder that can be written, found out now rather than after an hour of encoding.

    Args:
        path: made if missing, by ``make`` when there is something to write.
        overwrite: replace the results of another evaluation. A repetition of the same evaluation
            always may.

    Raises:
        DataError: if the folder cannot be created or written, or is named like a file.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path).expanduser(), overwrite
        if self.path.suffix.lower() in _FILE_SUFFIXES and not self.path.exists():
            raise DataError(
                f"output folder {self.path}: expected a folder, which the files are written into, "
                f"got a name that ends in {self.path.suffix}"
            )
        above = [self.path, *self.path.absolute().parents]
        missing = [folder for folder in above if not folder.exists()]
        self.make()
        for folder in missing:  # an attempt that fails later leaves no empty folders behind
            with contextlib.suppress(OSError):
                folder.rmdir()

    def make(self) -> None:
        """Make the folder and try to write in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            reason = "a file" if self.path.is_file() else error.strerror or error
            raise DataError(
                f"output folder {self.path}: expected a folder that can be written, got: {reason}"
            ) from error

    def check(self, results: Mapping[str, Any]) -> None:
        """Refuse to replace the results of something else.

        Args:
            results: may still lack the metrics; model, prompts, scores and sets decide.
        """
        old_file = self.path / "results.json"
        if self.overwrite or not old_file.exists():
            return
        try:
            old = read_results(self.path)
        except DataError:
            old = {}
        if _identity(old) != _identity(results):
            raise DataError(
                f"output folder {self.path}: holds the results of another evaluation "
                f"({old.get('created', 'unknown')}); choose another folder or allow overwriting "
                "(--overwrite, overwrite=True)"
            )

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write ``content`` to ``name`` atomically; NaN and infinities are refused."""
        return write_text(
            self.path / name,
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        )


def read_results(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a folder.

    Raises:
        DataError: if it is missing, not JSON, or of another schema.
    """
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: expected the results of an evaluation (results.json), found none"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise DataError(f"{file}: expected results of schema 1, got {_schema(results)}")
    return results


def _schema(results: Any) -> Any:
    return results.get("schema") if isinstance(results, dict) else type(results).__name__


def _identity(results: Mapping[str, Any]) -> Any:
    model, prompts = results.get("model") or {}, results.get("prompts") or {}
    scores = results.get("scores") or {}
    sets = [results.get("id"), *(results.get("ood") or []), results.get("calibration")]
    return (
        model.get("fingerprint"),
        prompts.get("digest"),
        json.dumps({k: [v["name"], v["options"]] for k, v in scores.items()}, sort_keys=True),
        [s and [s.get("name"), s.get("root"), s.get("layout")] for s in sets],
        results.get("settings") or {},
    )
