"""From the words of a command to sets, scores and class names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastood.errors import DataError

if TYPE_CHECKING:
    from fastood.data.imageset import ImageSet
    from fastood.features.featureset import FeatureSet
    from fastood.models.base import Encoder

__all__ = [
    "adapted_classes",
    "affordable",
    "literal",
    "parse_scores",
    "read_class_names",
    "read_features",
    "read_lines",
    "read_named_set",
    "read_set",
    "read_sets",
    "templates_of",
    "within",
]

_NAMED = re.compile(r"([^/\\=]+)=(.+)", re.DOTALL)
_SPLIT = re.compile(r"(.+)@(\w+)", re.DOTALL)
_LOCAL_LIMIT = 4 << 30


@dataclasses.dataclass(frozen=True)
class _Source:
    """``[NAME=]PATH[@SPLIT]`` taken apart; a path that exists as it stands is a path."""

    path: str
    name: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, text: str) -> _Source:
        if not text.strip():
            raise ValueError("expected [NAME=]PATH[@SPLIT] for an image set, got nothing")
        if Path(text).exists():
            return cls(text)
        named = _NAMED.fullmatch(text)
        name, path = (None, text) if named is None else (named[1], named[2])
        split = None if Path(path).exists() else _SPLIT.fullmatch(path)
        return cls(path, name) if split is None else cls(split[1], name, split[2])

    @property
    def is_features(self) -> bool:
        from fastood.data.paths import FEATURE_SUFFIXES

        return Path(self.path).suffix.lower() in FEATURE_SUFFIXES


def read_set(text: str, *, limit: int | None = None) -> ImageSet | FeatureSet:
    """``[NAME=]PATH[@SPLIT]``: images, or features from an npz, npy or safetensors file."""
    source = _Source.of(text)
    if source.is_features:
        return read_features(source.path, name=source.name, split=source.split, limit=limit)
    from fastood.data import load_images

    return load_images(source.path, name=source.name, split=source.split, limit=limit)


def read_features(
    path: str, *, name: str | None = None, split: str | None = None, limit: int | None = None
) -> FeatureSet:
    """Features from a file; ``limit`` keeps that many rows, evenly spaced."""
    from fastood.data import load_features

    found = load_features(path, name=name, split=split)
    n = len(found)
    if limit is None or n <= limit:
        return found
    import numpy as np
    import torch

    from fastood.features.featureset import FeatureChunk

    rows = np.array([i * n // limit for i in range(limit)])
    local = None
    if found.has_local:
        local = torch.cat([c.local for c in found.chunks if c.local is not None])[rows]
    layout = f"{found.provenance.get('layout')}; limited to {limit} of {n} images, evenly spaced"
    return dataclasses.replace(
        found,
        paths=tuple(found.paths[i] for i in rows),
        labels=None if found.labels is None else found.labels[rows],
        chunks=(FeatureChunk(0, found.image()[rows], local),),
        provenance={**found.provenance, "layout": layout, "images": limit},
    )


def read_sets(texts: Sequence[str], *, limit: int | None) -> list[ImageSet | FeatureSet]:
    """OOD sets; a folder recognised as a collection gives every OOD set in it."""
    from fastood.data import load_images, recognise

    found: list[ImageSet | FeatureSet] = []
    for text in texts:
        layout = recognise(text)
        parts = [] if layout is None else [s for s in layout.sets if s.role == "ood"]
        if len(parts) > 1:
            found += [load_images(p.source, name=p.name, split=p.split, limit=limit) for p in parts]
        else:
            found.append(read_set(text, limit=limit))
    names = [s.name for s in found]
    double = next((n for n in names if names.count(n) > 1), None)
    if double is not None:
        raise DataError(f"two OOD sets are called {double!r}; name them: --ood NAME=PATH")
    return found


def parse_scores(texts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """``mcm``, ``msp:tau=0.02``, ``sharp=delta_energy:tau=0.005,c=2`` to methods by label."""
    from fastood.pipeline.checks import check_labels

    methods: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in texts:
        entries = text.split(",") if ":" not in text else [text]
        for entry in filter(None, (e.strip() for e in entries)):
            head, _, tail = entry.partition(":")
            label, given, name = head.partition("=")
            label, name = label.strip(), (name if given else label).strip()
            if not label or not name:
                raise ValueError(f"--score {text}: expected a score or label=score, got {entry!r}")
            options: dict[str, Any] = {}
            for pair in filter(None, tail.split(",")):
                key, equals, value = pair.partition("=")
                if not equals:
                    raise ValueError(
                        f"--score {text}: expected name:option=value,option=value, got {pair!r}"
                    )
                if key.strip() == "fit":
                    raise ValueError(f"--score {text}: fit is made from --train, not given")
                if key.strip() in options:
                    raise ValueError(f"--score {text}: {key.strip()!r} is given twice")
                options[key.strip()] = literal(value.strip())
            label = label if given or not options else entry
            if label in methods:
                raise ValueError(f"--score {text}: {label!r} is asked for twice")
            methods[label] = (name, options)
    if texts and not methods:
        raise ValueError("--score: expected the name of a score, got nothing")
    check_labels(methods)
    return methods


def literal(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def templates_of(given: Sequence[str] | None) -> str | list[str]:
    """``--template``: one text, which may be the name of a set, or several; none is MCM's."""
    if not given:
        return "mcm"
    return given[0] if len(given) == 1 else list(given)


def adapted_classes(files: Sequence[str] | None) -> tuple[str, ...] | None:
    """The classes that the last of some adaptations brings along; None if class prompts do."""
    if not files:
        return None
    from fastood.tuning.state import read_header

    header = read_header(files[-1])
    return tuple(header.class_names) if header.has_head else None


def within(names: Sequence[str], own: Sequence[str]) -> bool:
    """Whether ``own`` has all of ``names``, however they are spelled."""
    from fastood.data.classes import plain_name

    return {plain_name(n) for n in names} <= {plain_name(n) for n in own}


def read_named_set(
    text: str, file: str | None, *, match: str, limit: int | None
) -> tuple[ImageSet | FeatureSet, tuple[str, ...] | None]:
    """The ID set and its class names: from a file, paired with the set's folders, or from those.

    ``match="order"`` pairs the i-th name with the i-th folder; otherwise spelling decides.
    """
    from fastood.data import load_images
    from fastood.data.prompts import clean_name

    found = read_set(text, limit=limit)
    if file is None:
        names = found.class_names and tuple(clean_name(n) for n in found.class_names)
    else:
        names = read_class_names(file)
        if found.class_names is not None:
            given = _mapping_or_list(file)
            source = _Source.of(text)
            if source.is_features:
                if len(names) != len(found.class_names):
                    raise DataError(
                        f"{file}: expected {len(found.class_names)} class names as in "
                        f"{source.path}, got {len(names)}"
                    )
            else:
                found = load_images(
                    source.path,
                    name=source.name,
                    split=source.split,
                    limit=limit,
                    class_names=given,
                    match=match,
                )
                names = found.class_names
    if names is not None and found.class_names is not None:
        found = dataclasses.replace(found, class_names=tuple(names))
    return found, names


def read_class_names(file: str) -> tuple[str, ...]:
    """The names in a class-name file, in its order."""
    given = _mapping_or_list(file)
    return tuple(given.values() if isinstance(given, dict) else given)


def _mapping_or_list(file: str) -> list[str] | dict[str, str]:
    from fastood.data import prompts

    return prompts.read_class_names(file)


def read_lines(file: str) -> list[str]:
    """Non-empty lines of a text file."""
    try:
        lines = [
            line.strip() for line in Path(file).expanduser().read_text("utf-8-sig").splitlines()
        ]
    except OSError as error:
        raise DataError(
            f"{file}: expected a text file with one prompt a line: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text with one prompt a line: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{file}: expected one prompt a line, the file is empty")
    return lines


def affordable(encoder: Encoder | None, sets: Sequence[ImageSet | FeatureSet]) -> bool:
    """Whether patch features of all sets stay small enough to be computed without being asked."""
    if encoder is None:
        return all(getattr(s, "has_local", False) for s in sets)
    if encoder.no_local is not None or encoder.num_patches is None:
        return False
    images = sum(len(s) for s in sets)
    return images * encoder.num_patches * encoder.embed_dim * 2 <= _LOCAL_LIMIT
