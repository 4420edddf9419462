"""Class names to text features: once per model and prompt set, then from memory or disk."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood._version import __version__
from fastood.data.prompts import check_class_names, fill, resolve_templates
from fastood.errors import ModelError
from fastood.features.conditions import product_precision
from fastood.models.base import Encoder

__all__ = [
    "ClassText",
    "TextCache",
    "clear_text_memory",
    "encode_classes",
    "encode_prompts",
    "prompts_digest",
]

_MEMORY: OrderedDict[str, Tensor] = OrderedDict()
_MEMORY_ENTRIES = 64


class TextCache(Protocol):
    """Where text features are kept between runs."""

    def get(self, key: str) -> Tensor | None:
        """The (N, D) float32 CPU tensor stored under ``key``, or None."""
        ...

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep ``tensor`` under ``key``."""
        ...


@dataclass(frozen=True)
class ClassText:
    """Text features of a list of classes, and what they were made of.

    Attributes:
        features: (K, D) float32, unit rows, on the encoder's device.
        class_names, templates: the K names and the ensemble.
        digest: ``prompts_digest`` of both.
        warnings: what the user should know: ties, cut prompts, untrained words.
        cached: True if nothing had to be encoded.
    """

    features: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    digest: str
    warnings: tuple[str, ...] = ()
    cached: bool = False


def encode_classes(
    encoder: Encoder,
    class_names: Sequence[str],
    *,
    templates: str | Iterable[str] = ("a photo of a {}",),
    cache: TextCache | None = None,
    batch_size: int = 256,
    allow_duplicates: bool = False,
) -> ClassText:
    """Text features of classes under one template or an ensemble.

    T_k = normalise( mean_t normalise( text( template_t with name_k ) ) )

    Args:
        encoder: a network with a text tower.
        class_names: K names.
        templates: a set name (``"mcm"``), one template, or several; each with one ``{}``.
        cache: where to look and keep; results are always remembered in memory as well.
        batch_size: prompts per forward pass.
        allow_duplicates: let several classes share a name (they tie exactly) with a warning.
    Returns:
        ``ClassText``; (K, D) float32 whatever dtype the tower computes in.
    Raises:
        ValueError: unusable names or templates, or an ensemble that cancels to zero.
        ModelError: if the encoder has no text tower or returns features that are not finite.
    Notes:
        Names with the same tokens are encoded once, so classes that a model cannot tell apart have
        bit-identical rows and tie exactly.
    """
    if encoder.text is None:
        raise ModelError(f"{encoder.name} has no text tower; it scores its own classes only")
    chosen = resolve_templates(templates)
    notes = check_class_names(
        class_names, allow_duplicates=allow_duplicates, tokenize=encoder.tokenize
    )
    names = tuple(class_names)
    longest = max(chosen, key=len)
    telling = [fill(longest, n) for n in names]  # every name once and every template once
    notes += encoder.warn_prompts(
        list(dict.fromkeys([*telling, *(fill(t, names[0]) for t in chosen)]))
    )
    digest = prompts_digest(names, chosen)
    key = _key(encoder, "classes", digest)
    features, cached = _recall(key, cache, (len(names), encoder.embed_dim)), True
    if features is None:
        features, cached = _class_rows(encoder, names, telling, chosen, batch_size), False
        _remember(key, features, cache)
    features = features.to(encoder.device, copy=True)  # callers may write to theirs
    return ClassText(features, names, chosen, digest, tuple(notes), cached)


def encode_prompts(
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    cache: TextCache | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Unit text features (N, D) float32 of whole prompts, for example of negative labels."""
    if isinstance(prompts, str):
        raise TypeError("prompts: expected a list of prompts, got one string")
    prompts = list(prompts)
    blob = json.dumps(prompts, ensure_ascii=False).encode()
    key = _key(encoder, "prompts", hashlib.blake2b(blob, digest_size=16).hexdigest())
    found = _recall(key, cache, (len(prompts), encoder.embed_dim))
    if found is None:
        found = _unit_rows(encoder, prompts, batch_size)
        _remember(key, found, cache)
    return found.to(encoder.device, copy=True)


def prompts_digest(
    class_names: Sequence[str], templates: Sequence[str], negatives: Sequence[str] | None = None
) -> str:
    """Hex digest of a prompt set, order included; equal digests mean equal text features."""
    parts = [list(class_names), list(templates), None if negatives is None else list(negatives)]
    blob = json.dumps(parts, ensure_ascii=False).encode()
    return hashlib.blake2b(blob, digest_size=16).hexdigest()


def clear_text_memory() -> None:
    """Forget the text features remembered by this process."""
    _MEMORY.clear()


def _class_rows(
    encoder: Encoder,
    names: tuple[str, ...],
    telling: list[str],
    templates: tuple[str, ...],
    batch_size: int,
) -> Tensor:
    """(K, D) unit rows on the CPU; ``telling`` holds a prompt for each name."""
    tokens = encoder.tokenize(telling)
    keys: list[object] = list(telling) if tokens is None else [tuple(r) for r in tokens.tolist()]
    row = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    first = dict(zip(reversed(keys), reversed(names), strict=True))  # the first name of each key
    distinct = [first[key] for key in row]
    # template by template: a batch then has few beginnings, each of which is run once
    each = _unit_rows(encoder, [fill(t, n) for t in templates for n in distinct], batch_size)
    mean = each.view(len(templates), len(distinct), -1).mean(dim=0)
    if bool((mean.norm(dim=-1) < 1e-6).any()):
        raise ValueError("templates: the ensemble of a class cancels to zero; use fewer templates")
    features = F.normalize(mean, dim=-1) if len(templates) > 1 else each
    return features[[row[key] for key in keys]]


def _unit_rows(encoder: Encoder, prompts: list[str], batch_size: int) -> Tensor:
    """(N, D) unit float32 rows on the CPU; each distinct prompt runs once."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    distinct = list(index)
    parts = [
        encoder.encode_text(distinct[i : i + batch_size]).float().cpu()
        for i in range(0, len(distinct), batch_size)
    ]
    if not parts:
        return torch.zeros(0, encoder.embed_dim)
    features = torch.cat(parts)
    norms = features.norm(dim=-1)
    bad = ~(torch.isfinite(norms) & (norms > 0))
    if bool(bad.any()):
        first = distinct[int(bad.nonzero()[0])]
        raise ModelError(
            f"{encoder.name}: {int(bad.sum())} prompt(s) have text features that are zero or not "
            f"finite, first {first!r}; is {encoder.dtype} too narrow for this tower?"
        )
    return F.normalize(features, dim=-1)[[index[p] for p in prompts]]


def _key(encoder: Encoder, kind: str, digest: str) -> str:
    """Everything the features depend on; the device kind because its rounding differs."""
    parts = [
        kind,
        encoder.fingerprint,
        digest,
        str(encoder.dtype),
        encoder.device.type,
        product_precision(),
        torch.__version__,
        __version__,
    ]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _recall(key: str, cache: TextCache | None, shape: tuple[int, int]) -> Tensor | None:
    found = _MEMORY.get(key)
    if found is None and cache is not None:
        found = cache.get(key)
        if found is not None:
            _keep(key, found)
    if found is None or tuple(found.shape) != shape:
        return None
    _MEMORY.move_to_end(key)
    return found


def _remember(key: str, features: Tensor, cache: TextCache | None) -> None:
    _keep(key, features)
    if cache is not None:
        cache.put(key, features)


def _keep(key: str, features: Tensor) -> None:
    _MEMORY[key] = features
    _MEMORY.move_to_end(key)
    while len(_MEMORY) > _MEMORY_ENTRIES:
        _MEMORY.popitem(last=False)
