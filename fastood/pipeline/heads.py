"""What turns features into similarities: class prompts, ready class features, or the caller's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastood.errors import ModelError
from fastood.scores.bank import ClassBank, Head
from fastood.scores.many import check_head

if TYPE_CHECKING:
    from fastood.features.cache import FeatureCache
    from fastood.models.base import Encoder

__all__ = ["BuiltHead", "build_head"]


@dataclass
class BuiltHead:
    """A head, its class names as far as they are known, and the digest that stands for both."""

    head: Head
    names: tuple[str, ...] | None
    digest: str
    templates: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


def build_head(
    encoder: Encoder | None,
    names: tuple[str, ...] | None,
    *,
    head: Head | None,
    text: Tensor | None,
    templates: str | Iterable[str],
    negatives: Sequence[str] | None,
    groups: int,
    allow_duplicates: bool,
    cache: FeatureCache | None,
) -> BuiltHead:
    """The head of a pipeline; arguments as for ``Pipeline``.

    Raises:
        ValueError: class names, text features and model that do not fit each other.
        ModelError: a model without text tower or classes where one is needed.
    """
    from fastood.features.text import encode_classes, encode_prompts, prompts_digest

    if head is not None and text is not None:
        raise ValueError("head, text: expected one of them, got both")
    if negatives is not None and (head is not None or encoder is None or encoder.text is None):
        raise ModelError(
            "negatives: expected a model with a text tower to encode them"
            + ("; an adapted head has its own" if head is not None else "")
        )
    if head is not None:
        check_head(head)
        if isinstance(head, ClassBank):
            if encoder is not None:
                head = head.to(encoder.device)
            return _bank(head, names, encoder, allow_duplicates, None)
        return _as_given(head, names, encoder)
    if text is not None:
        bank = ClassBank(text)
        if negatives is not None and encoder is not None:
            found = encode_prompts(encoder, negatives, cache=cache)
            bank = ClassBank(text.to(found.device), negatives=found, groups=groups)
        elif encoder is not None:
            bank = bank.to(encoder.device)
        return _bank(bank, names, encoder, allow_duplicates, negatives)
    if encoder is None:
        raise ModelError("expected a model, or class features (text=), or an adapted head")
    if encoder.text is None:
        own = encoder.head()
        if own is None:
            raise ModelError(
                f"{encoder.name} has neither a text tower nor classes of its own; give class "
                "features (text=) or an adapted head (head=)"
            )
        check_head(own)
        theirs = getattr(encoder, "class_names", None)
        if names is None and theirs is not None:
            names = tuple(theirs)
        return _as_given(own, names, encoder)
    if names is None:
        raise ModelError(f"class_names: {encoder.name} scores the classes you name; give them")
    classes = encode_classes(
        encoder, names, templates=templates, cache=cache, allow_duplicates=allow_duplicates
    )
    warnings = list(classes.warnings)
    if negatives is None:
        bank = ClassBank(classes.features)
    else:
        warnings += encoder.warn_prompts(list(negatives))
        bank = ClassBank(
            classes.features,
            negatives=encode_prompts(encoder, negatives, cache=cache),
            groups=groups,
        )
    digest = prompts_digest(names, classes.templates, negatives)
    return BuiltHead(bank, names, digest, classes.templates, warnings)


def _as_given(head: Head, names: tuple[str, ...] | None, encoder: Encoder | None) -> BuiltHead:
    """A head that is not ours: how many classes it has is asked now, with one made-up image."""
    from fastood.features.text import prompts_digest

    digest = prompts_digest(names or (), ())
    if encoder is not None:
        probe = torch.ones(1, encoder.embed_dim, device=encoder.device, dtype=encoder.dtype)
        with torch.inference_mode():
            size = head.similarities(probe).image.shape[-1]
        if names is None:
            names = tuple(f"class {k}" for k in range(size))
        elif len(names) != size:
            raise ValueError(
                f"class_names: expected one for each of the {size} classes of the head, got "
                f"{len(names)}"
            )
    return BuiltHead(head, names, digest)


def _bank(
    bank: ClassBank,
    names: tuple[str, ...] | None,
    encoder: Encoder | None,
    allow_duplicates: bool,
    negatives: Sequence[str] | None,
) -> BuiltHead:
    """Class features that came ready-made; their digest stands for the prompts."""
    from fastood.data.prompts import check_class_names
    from fastood.features.text import prompts_digest

    warnings: list[str] = []
    if encoder is not None and bank.dim != encoder.embed_dim:
        raise ValueError(
            f"text: expected class features of width {encoder.embed_dim} as {encoder.name} has, "
            f"got {bank.dim}"
        )
    if names is None:
        names = tuple(f"class {k}" for k in range(len(bank)))
    else:
        warnings += check_class_names(names, allow_duplicates=allow_duplicates)
        if len(names) != len(bank):
            raise ValueError(
                f"class_names: expected one for each of {len(bank)} rows of text, got {len(names)}"
            )
    content = hashlib.blake2b(bank.text.cpu().numpy().tobytes(), digest_size=16)
    if bank.negatives is not None and negatives is None:
        content.update(bank.negatives.cpu().numpy().tobytes())
    digest = prompts_digest(names, [f"features {content.hexdigest()}"], negatives)
    return BuiltHead(bank, names, digest, (), warnings)
