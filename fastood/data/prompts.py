"""Class names and prompt templates: read, cleaned, and checked before anything is encoded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from fastood.data.openai_templates import IMAGENET_7, IMAGENET_80
from fastood.errors import DataError

__all__ = [
    "TEMPLATES",
    "check_class_names",
    "check_templates",
    "clean_name",
    "fill",
    "read_class_names",
    "resolve_templates",
]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "mcm": ("a photo of a {}",),
    "coop": ("a photo of a {}.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "food": ("a photo of {}, a type of food.",),
    "dtd": ("{} texture.",),
    "openai-imagenet-7": IMAGENET_7,
    "openai-imagenet-80": IMAGENET_80,
}
"""Template sets by name. MCM, GL-MCM and SeTAR write no full stop, the CoOp family does; the
choice moves AUROC by points, so results record it."""

_WORDNET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


def read_class_names(path: str | PathLike[str]) -> list[str] | dict[str, str]:
    """Class names from a text or JSON file, as ``load_images(class_names=...)`` takes them.

    - text: one name a line; blank lines and surrounding blanks are ignored. If every line starts
      with a WordNet id (``n01440764 tench``, CoOp's ``classnames.txt``), ids are the folders.
    - JSON: a list of names, or an object ``{folder: name}``.

    Returns:
        A list of names in class order, or a mapping from folder to name where the file tells.
    Raises:
        DataError: if the file is missing, empty, or holds anything else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class names {path}: cannot be read ({error})") from error
    if path.suffix.lower() == ".json":
        return _from_json(text, path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"class names {path}: expected one name a line, got an empty file")
    parts = [p for p in map(_WORDNET_LINE.fullmatch, lines) if p is not None]
    if len(parts) == len(lines):
        return _mapping([(p[1], p[2]) for p in parts], path)
    return lines


def _from_json(text: str, path: Path) -> list[str] | dict[str, str]:
    try:
        # pairs instead of an object, so that a repeated folder is seen and not overwritten
        data = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise DataError(f"class names {path}: not valid JSON ({error})") from error
    if not isinstance(data, list) or not data:
        got = "nothing in it" if data in ([], _Pairs()) else repr(data)[:60]
        raise DataError(
            f"class names {path}: expected a non-empty list of names or an object "
            f"{{folder: name}}, got {got}"
        )
    if isinstance(data, _Pairs):
        return _mapping([(f, _text(n, path)) for f, n in data], path)
    return [_text(n, path) for n in data]


class _Pairs(list[Any]):
    """The pairs of a JSON object, in order."""


def _text(value: object, path: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"class names {path}: expected a name, got {str(value)[:60]!r}")
    return value.strip()


def _mapping(pairs: list[tuple[str, str]], path: Path) -> dict[str, str]:
    twice = [folder for folder, count in Counter(f for f, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"class names {path}: folders named more than once: {_some(twice)}")
    return dict(pairs)


def clean_name(name: str) -> str:
    """A folder name as words: underscores become spaces, runs of blanks become one.

    >>> clean_name("german_shorthaired")
    'german shorthaired'
    """
    return " ".join(name.replace("_", " ").split())


def check_class_names(
    names: Sequence[str],
    *,
    allow_duplicates: bool = False,
    tokenize: Callable[[list[str]], Tensor | None] | None = None,
) -> list[str]:
    """Refuse unusable class names; report those a model cannot tell apart.

    Args:
        names: one per class.
        allow_duplicates: report repeated names (OpenAI's ImageNet list repeats "missile") instead
            of refusing them; such classes tie exactly.
        tokenize: an encoder's ``tokenize``; without it names are compared ignoring case.
    Returns:
        Warnings, possibly none.
    Raises:
        ValueError: no names, an empty name, or a repeated one.
        TypeError: a single string instead of a list, or a name that is not text.
    """
    if isinstance(names, str):
        raise TypeError("class_names: expected a list of names, got one string")
    if not len(names):
        raise ValueError("class_names: expected at least one class, got none")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"class_names[{i}]: expected text, got {type(name).__name__}")
        if not name.strip():
            raise ValueError(f"class_names[{i}]: expected a name, got {name!r}")
    repeated = [f"{n!r} ({k} times)" for n, k in Counter(names).items() if k > 1]
    found = []
    if repeated:
        what = f"class_names: {len(repeated)} name(s) stand for several classes: {_some(repeated)}"
        if not allow_duplicates:
            raise ValueError(
                f"{what}; their prompts are identical and the classes cannot be told apart. "
                "Rename or merge them, or keep exact ties by allow_duplicates=True "
                "(--allow-duplicates)"
            )
        found.append(f"{what}; these classes tie exactly")
    joined = [n for n in dict.fromkeys(names) if "_" in n]
    if joined:
        found.append(
            f"class_names: {len(joined)} name(s) contain underscores ({_some(joined)}); prompts "
            f"are trained on words, clean_name() turns underscores into spaces"
        )
    alike = _look_alike(list(dict.fromkeys(names)), tokenize)
    if alike:
        shown = _some([" = ".join(map(repr, group)) for group in alike])
        found.append(
            f"class_names: {len(alike)} group(s) of names are the same words to the text tower: "
            f"{shown}; these classes tie exactly"
        )
    return found


def _look_alike(
    names: list[str], tokenize: Callable[[list[str]], Tensor | None] | None
) -> list[list[str]]:
    tokens = tokenize(names) if tokenize is not None else None
    keys: list[object]
    if tokens is None:
        keys = [_key(n) for n in names]
    else:
        keys = [tuple(row) for row in tokens.tolist()]
    groups: dict[object, list[str]] = {}
    for key, name in zip(keys, names, strict=True):
        groups.setdefault(key, []).append(name)
    return [g for g in groups.values() if len(g) > 1]


def resolve_templates(templates: str | Iterable[str]) -> tuple[str, ...]:
    """Templates from the name of a set in ``TEMPLATES``, one template, or several.

    >>> resolve_templates("mcm")
    ('a photo of a {}',)
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{}" not in templates:
            raise ValueError(
                f"templates: expected one with {{}} for the class name, or a set name "
                f"({', '.join(TEMPLATES)}), got {templates!r}"
            )
        return check_templates((templates,))
    return check_templates(tuple(templates))


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates, if each has exactly one ``{}``.

    Raises:
        ValueError: none given, or one without or with several places for the name.
    """
    if not templates:
        raise ValueError("templates: expected at least one, got none")
    for t in templates:
        if not isinstance(t, str) or t.count("{}") != 1:
            raise ValueError(f"templates: expected exactly one {{}} for the class name, got {t!r}")
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """The prompt. Other braces, in either, stay as they are."""
    return template.replace("{}", name, 1)


def _key(name: str) -> str:
    return clean_name(name).lower()


def _some(items: Sequence[str], count: int = 5) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
