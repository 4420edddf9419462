"""Class names and prompt templates: read, cleaned, and checked before anything is encoded."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from fastood.data.openai_templates import IMAGENET_7, IMAGENET_80
from fastood.errors import DataError

__all__ = [
    "TEMPLATES",
    "ClassNames",
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


@dataclass(frozen=True)
class ClassNames:
    """Class names as a file gives them.

    Attributes:
        names: what prompts say, in class order.
        folders: the folder of each class, where the file tells, else None.
        source: the file.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...] | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def aligned(self, folders: Sequence[str]) -> tuple[str, ...]:
        """One name per folder, in the order of ``folders``.

        A file that names folders is matched by them; else names equal to the cleaned folder names
        are matched by spelling; else, the counts being equal, names are taken in the order of the
        file, with a warning.

        Raises:
            DataError: if names are missing or left over.
        """
        given = list(folders)
        if self.folders is not None:
            names = dict(zip(self.folders, self.names, strict=True))
            return self._by_key(names, given, given)
        spelled = {_key(n): n for n in self.names}
        keys = [_key(f) for f in given]
        if len(spelled) == len(self.names) and set(keys) & spelled.keys():
            return self._by_key(spelled, keys, given)
        if len(given) != len(self.names):
            raise DataError(
                f"{self.source or 'class names'}: expected a name for each of {len(given)} class "
                f"folders ({_some(given)}), got {len(self.names)} names ({_some(self.names)})"
            )
        warnings.warn(
            f"{self.source or 'class names'}: no name matches a folder, so names are taken in file "
            f"order for the folders in sorted order ({given[0]!r} is {self.names[0]!r}); a JSON "
            f"object {{folder: name}} makes this certain",
            stacklevel=2,
        )
        return self.names

    def _by_key(
        self, names: dict[str, str], keys: Sequence[str], folders: Sequence[str]
    ) -> tuple[str, ...]:
        unnamed = [f for f, k in zip(folders, keys, strict=True) if k not in names]
        if unnamed:
            raise DataError(
                f"{self.source or 'class names'}: no name for {len(unnamed)} of {len(folders)} "
                f"class folders: {_some(unnamed)}"
            )
        if self.folders is None and len(set(keys)) != len(names):
            extra = [n for k, n in names.items() if k not in set(keys)]
            raise DataError(
                f"{self.source or 'class names'}: {len(extra)} names have no class folder: "
                f"{_some(extra)}"
            )
        return tuple(names[k] for k in keys)


def read_class_names(path: str | PathLike[str]) -> ClassNames:
    """Class names from a text or JSON file.

    - text: one name a line; blank lines and surrounding blanks are ignored. If every line starts
      with a WordNet id (``n01440764 tench``, CoOp's ``classnames.txt``), ids are the folders.
    - JSON: a list of names, or an object ``{folder: name}``.

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
    parts = [_WORDNET_LINE.fullmatch(line) for line in lines]
    found = [p for p in parts if p is not None]
    if len(found) == len(lines):
        return ClassNames(tuple(p[2] for p in found), tuple(p[1] for p in found), str(path))
    return ClassNames(tuple(lines), None, str(path))


def _from_json(text: str, path: Path) -> ClassNames:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise DataError(f"class names {path}: not valid JSON ({error})") from error
    values = list(data.values()) if isinstance(data, dict) else data
    if not isinstance(values, list) or not values:
        raise DataError(
            f"class names {path}: expected a non-empty list of names or an object "
            f"{{folder: name}}, got {type(data).__name__}{' without entries' if not data else ''}"
        )
    wrong = [v for v in values if not isinstance(v, str)]
    if wrong:
        raise DataError(f"class names {path}: expected text, got {str(wrong[0])[:60]!r}")
    names = tuple(v.strip() for v in values)
    return ClassNames(names, tuple(data) if isinstance(data, dict) else None, str(path))


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
                f"Rename or merge them, or pass allow_duplicates=True to keep exact ties"
            )
        found.append(f"{what}; these classes tie exactly")
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
