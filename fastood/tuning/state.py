"""Trained methods on disk: one safetensors file that says what it is and what it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastood._version import __version__
from fastood.atomic import replacing
from fastood.data.paths import refuse_folder
from fastood.errors import DataError, ModelError
from fastood.setar.recipe import RECIPE, Recipe, is_recipe
from fastood.tuning.registry import METHODS, method_class

if TYPE_CHECKING:
    from fastood.models.base import Encoder
    from fastood.tuning.method import Method

__all__ = [
    "ADAPTATION",
    "FORMAT",
    "VERSION",
    "Header",
    "load_method",
    "read_header",
    "save_method",
]

FORMAT, VERSION = "fastood-adaptation", 1
ADAPTATION = "adaptation.safetensors"
"""What a training run calls its result."""

_SETAR = "setar"
"""What a SeTAR recipe is called among methods; it has nothing trained."""

_KEYS = ("format", "version", "method", "settings", "class_names", "encoder", "digest")


@dataclass(frozen=True)
class Header:
    """What a saved method says of itself.

    Attributes:
        method: its name in ``METHODS``; ``"setar"`` for a recipe.
        settings: with which ``Method.build`` makes it again; of a recipe what it drops.
        class_names: the K classes, in order; a recipe has none.
        encoder: name, fingerprint, embed_dim, logit_scale and dtype of the network it was trained
            on.
        training: what the training loop noted: recipe, seed, history; or a search.
        digest: of the saved numbers.
        created: UTC, ISO 8601.
        fastood: version that wrote the file.
    """

    method: str
    settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    encoder: Mapping[str, Any]
    training: Mapping[str, Any]
    digest: str
    created: str = ""
    fastood: str = ""

    @property
    def has_head(self) -> bool:
        """Whether it scores its own classes; otherwise it changes towers, for any classes."""
        return self.method != _SETAR and not method_class(self.method).changes_towers

    def summary(self) -> dict[str, Any]:
        """JSON values for provenance: everything but the names, of which the number."""
        found = {**asdict(self), "classes": len(self.class_names)}
        del found["class_names"]
        return found


def save_method(
    path: str | os.PathLike[str],
    method: Method,
    *,
    encoder: Encoder | None = None,
    history: Any = None,
) -> Path:
    """Write a method: what it trained, its settings, classes and encoder.

    The file appears whole or not at all.

    Args:
        encoder: the network it was trained on; default ``method.encoder``.
        history: of the training loop, for the record: a mapping, a dataclass, or an object with
            ``as_dict()``; JSON values.
    Raises:
        ValueError: numbers that are not finite, or a history that JSON cannot hold.
        DataError: if no file can be written there.
    """
    from safetensors.torch import save

    encoder = method.encoder if encoder is None else encoder
    # copies: safetensors refuses tensors that share memory, as views of one weight do
    tensors = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in method.state_dict().items()
    }
    broken = [
        name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"method: expected finite numbers, found NaN or Inf in {', '.join(broken)}; "
            "did the training diverge?"
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "method": method.name,
        "settings": method.settings(),
        "class_names": list(method.class_names),
        "encoder": _describe(encoder),
        "training": _plain(history),
        "digest": _digest(tensors),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastood": __version__,
    }
    try:
        text = json.dumps(header, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings, history: expected JSON values ({error})") from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata={"format": FORMAT, "header": text})
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return target


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a saved method, or a SeTAR recipe, says of itself; no model is needed.

    Raises:
        DataError: a file that is missing, damaged, none of ours or from a newer version.
    """
    return _of_recipe(Recipe.read(path)) if is_recipe(path) else _read(path)[0]


def load_method(
    path: str | os.PathLike[str],
    encoder: Encoder,
    *,
    class_names: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Method:
    """A saved method on the network it was trained on.

    Args:
        class_names: the caller's classes; they must be the file's, in the same order.
        settings: the caller's settings; those given must be the file's.
    Returns:
        The method as it was saved: its similarities are bit-identical on the same machine.
    Raises:
        DataError: as ``read_header``, and numbers that do not fit the settings.
        ModelError: another backbone, other classes or settings; both sides are printed.
    """
    header, tensors = _read(path)
    _check_encoder(path, header, encoder)
    if class_names is not None:
        _check_classes(path, header.class_names, tuple(class_names))
    if settings is not None:
        _check_settings(path, header, settings)
    try:
        method = method_class(header.method).build(encoder, header.class_names, **header.settings)
        method.restore(tensors)
    except (TypeError, ValueError) as error:
        raise DataError(f"{os.fspath(path)}: what it holds does not fit: {error}") from error
    return method


# ------------------------------------------------------------------------------ reading


def _of_recipe(recipe: Recipe) -> Header:
    return Header(
        method=_SETAR,
        settings={
            "picks": [[p.tower, p.kind, p.layer, p.ratio] for p in recipe.changes],
            "part": recipe.part,
            "seed": recipe.seed,
        },
        class_names=(),
        encoder=recipe.model,
        training={"objective": recipe.objective, "search": recipe.search},
        digest=recipe.digest,
        created=str(recipe.search.get("created", "")),
        fastood=recipe.fastood,
    )


def _read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    refuse_folder(path, "a saved method", [ADAPTATION, RECIPE])
    shown = os.fspath(path)
    try:
        with safe_open(shown, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(f"{shown}: expected a saved method, found no such file") from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{shown}: expected a saved method, but it is damaged, cut short or no safetensors "
            f"file ({error})"
        ) from error
    header = _header(shown, metadata)
    if _digest(tensors) != header.digest:
        raise DataError(f"{shown}: its numbers were changed or damaged after it was saved")
    return header, tensors


def _header(path: str, metadata: Mapping[str, str]) -> Header:
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path}: expected a method saved by fastood (format {FORMAT!r}), got a safetensors "
            f"file of format {metadata.get('format')!r}; weights of other tools cannot be read"
        )
    try:
        found = json.loads(metadata["header"])
        version = found["version"]
        if isinstance(version, int) and version > VERSION:
            raise DataError(
                f"{path}: written in version {version} of the format by fastood "
                f"{found.get('fastood')}; this is fastood {__version__}, which reads up to "
                f"{VERSION}; update it"
            )
        missing = [key for key in _KEYS if key not in found]
        if missing or version != VERSION or not isinstance(found["settings"], dict):
            raise ValueError(f"version {version}, without {', '.join(missing) or 'settings'}")
        names = found["class_names"]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError("class_names is no list of names")
        if not isinstance(found["encoder"], dict) or "fingerprint" not in found["encoder"]:
            raise ValueError("encoder has no fingerprint")
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its header is damaged ({error})") from error
    if not isinstance(found["method"], str) or found["method"] not in METHODS:
        raise DataError(
            f"{path}: holds the method {found['method']!r}, which this fastood ({__version__}) "
            f"does not have; it has {', '.join(METHODS)}"
        )
    return Header(
        method=found["method"],
        settings=found["settings"],
        class_names=tuple(names),
        encoder=found["encoder"],
        training=found.get("training") or {},
        digest=found["digest"],
        created=str(found.get("created", "")),
        fastood=str(found.get("fastood", "")),
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# ------------------------------------------------------------------------------ fitting


def _describe(encoder: Encoder) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "embed_dim": encoder.embed_dim,
        "logit_scale": encoder.logit_scale,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }


def _check_encoder(path: str | os.PathLike[str], header: Header, encoder: Encoder) -> None:
    own, theirs = header.encoder, _describe(encoder)
    if own["fingerprint"] == theirs["fingerprint"]:
        return
    if own.get("dtype") != theirs["dtype"]:
        cause = f"load the model in {own.get('dtype')}"
    elif own.get("name") == theirs["name"]:
        cause = "the names agree, the weights do not; was it adapted before, or loaded from a file?"
    else:
        cause = f"load {own.get('name')}"
    raise ModelError(
        f"{os.fspath(path)}: {header.method} was trained on {_shown(own)}, got {_shown(theirs)}; "
        f"{cause}"
    )


def _shown(encoder: Mapping[str, Any]) -> str:
    return (
        f"{encoder.get('name')} (fingerprint {str(encoder['fingerprint'])[:12]}, width "
        f"{encoder.get('embed_dim')}, {encoder.get('dtype')})"
    )


def _check_classes(
    path: str | os.PathLike[str], own: tuple[str, ...], theirs: tuple[str, ...]
) -> None:
    if own == theirs:
        return
    first = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
    where = min(len(own), len(theirs)) if first is None else first
    a, b = (repr(names[where]) if where < len(names) else "nothing" for names in (own, theirs))
    same = ", the same ones in another order" if sorted(own) == sorted(theirs) else ""
    raise ModelError(
        f"{os.fspath(path)}: trained on {len(own)} classes, got {len(theirs)}{same}; the first "
        f"that differs is number {where}: {a} in the file, {b} given"
    )


def _check_settings(
    path: str | os.PathLike[str], header: Header, settings: Mapping[str, Any]
) -> None:
    given = json.loads(json.dumps(dict(settings)))  # as the file holds them: lists, no tuples
    different = [
        f"{name} is {header.settings.get(name)!r} in the file, {value!r} given"
        for name, value in given.items()
        if header.settings.get(name) != value
    ]
    if different:
        raise ModelError(
            f"{os.fspath(path)}: {header.method} was trained with other settings: "
            f"{'; '.join(different)}"
        )


def _plain(history: Any) -> dict[str, Any]:
    if history is None:
        return {}
    if hasattr(history, "as_dict"):
        history = history.as_dict()
    elif is_dataclass(history) and not isinstance(history, type):
        history = asdict(history)
    if not isinstance(history, Mapping):
        raise ValueError(f"history: expected a mapping, got {type(history).__name__}")
    return dict(history)
