"""Thresholds on disk: a small JSON file that is either read exactly or refused.

Strict JSON (no ``NaN`` or ``Infinity`` literals), one schema number, no unknown fields, and a
digest over the other fields, which notices an edit or a damaged copy. The digest is no signature:
it does not protect against somebody who recomputes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastood.atomic import replacing
from fastood.calibration.threshold import Threshold
from fastood.errors import DataError

__all__ = ["read", "to_dict", "write"]

_KIND = "fastood.threshold"
_SCHEMA = 1
_MAX_BYTES = 1_000_000
_INFINITE = {"inf": math.inf, "-inf": -math.inf}
_NUMBERS = ("threshold", "interval")


def to_dict(threshold: Threshold) -> dict[str, Any]:
    """All fields as JSON values."""
    found = {part.name: getattr(threshold, part.name) for part in fields(Threshold)}
    found.update((name, _encode_number(found[name])) for name in _NUMBERS)
    found["acceptance"] = list(found["acceptance"])
    found["options"] = _encode_options(found["options"])
    return found


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _encode_number(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode_number(one) for one in value]
    return ("inf" if value > 0 else "-inf") if _infinite(value) else value


def _encode_options(value: Any) -> Any:
    # Unlike in a field that holds numbers only, a word may be a word here: mark the number.
    if isinstance(value, dict):
        return {key: _encode_options(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_encode_options(one) for one in value]
    return {"$float": _encode_number(value)} if _infinite(value) else value


def _decode_number(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode_number(one) for one in value)
    return _INFINITE.get(value, value) if isinstance(value, str) else value


def _decode_options(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$float"} and value["$float"] in _INFINITE:
            return _INFINITE[value["$float"]]
        return {key: _decode_options(one) for key, one in value.items()}
    return [_decode_options(one) for one in value] if isinstance(value, list) else value


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write(threshold: Threshold, path: Path) -> Path:
    """Write a threshold; readers see the old file or the whole new one, never a part.

    Args:
        threshold: what to write.
        path: file to create or replace; its folder must exist.

    Returns:
        the path.

    Raises:
        DataError: if the folder is missing or not writable.
    """
    content = {"kind": _KIND, "schema": _SCHEMA, **to_dict(threshold)}
    content["digest"] = _digest(content)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write threshold {path}: {error.strerror or error}") from error
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read threshold {path}: {error.strerror or error}") from error
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{path} is no fastood threshold: larger than {_MAX_BYTES} bytes")
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no fastood threshold: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DataError(
            f'{path} is no fastood threshold: expected "kind": "{_KIND}"; '
            f"thresholds are written by Threshold.save or fastood calibrate"
        )
    return content


def read(path: Path) -> Threshold:
    """Read a threshold and check all of it.

    Raises:
        DataError: for a missing, foreign, edited or damaged file, or one of a newer fastood.
    """
    content = _parse(path)
    if content.get("schema") != _SCHEMA:
        raise DataError(
            f"{path}: expected schema {_SCHEMA}, got {content.get('schema')!r}; "
            f"was it saved by another version of fastood ({content.get('version')!r})?"
        )
    parts = {part.name: part for part in fields(Threshold)}
    expected = {"kind", "schema", "digest", *parts}
    missing, unknown = sorted(expected - content.keys()), sorted(content.keys() - expected)
    if missing or unknown:
        raise DataError(f"{path}: damaged threshold: missing fields {missing}, unknown {unknown}")
    digest = content.pop("digest")
    if digest != _digest(content):
        raise DataError(
            f"{path}: the content does not match its digest, so it was edited or damaged after "
            f"saving; calibrate again instead of editing"
        )
    given = {name: content[name] for name in parts}
    given.update((name, _decode_number(given[name])) for name in _NUMBERS)
    given["options"] = _decode_options(given["options"])
    try:
        return Threshold(**given)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged threshold: {error}") from error
