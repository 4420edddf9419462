"""What the training loop, saved files and scores know of a fine-tuning method.

A method owns what is trained, says what the loss of a batch is made of, and turns into a frozen
head (or a changed encoder) when it is done. Letters: B images, P patches, D width, K classes.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastood.data.prompts import check_class_names, clean_name
from fastood.scores.bank import Head

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastood.models.base import Encoder
    from fastood.tuning.parallel import World
    from fastood.tuning.recipes import Recipe

__all__ = [
    "Batch",
    "Method",
    "Needs",
    "Term",
    "check_settings",
    "setting_names",
    "state_digest",
    "total_loss",
]

Needs = Literal["features", "local", "pixels"]


class Batch(NamedTuple):
    """Images of one step, or this process's share of them (possibly none)."""

    image: Tensor
    """(B, D) features of any norm as the image tower gave them; (B, 3, H, W) pixels where
    ``Method.needs == "pixels"``."""
    labels: Tensor
    """(B,) int64 in 0..K-1."""
    local: Tensor | None = None
    """(B, P, D) patch features, where ``needs == "local"``."""


class Term(NamedTuple):
    """One part of a loss: weight · Σ numerator / Σ count, both sums over processes.

    A weight of 0 makes it a number to log, which nothing is minimised by.
    """

    name: str
    numerator: Tensor
    """A scalar: the sum over this process's images or patches."""
    count: Tensor | float  # type: ignore[assignment]  # a tuple has a method of that name
    """How many were summed; carries no gradient."""
    weight: float = 1.0


def total_loss(terms: Sequence[Term], counts: Sequence[Tensor | float] | None = None) -> Tensor:
    """Σ weight · numerator / max(count, 1): what this process adds to the loss of all.

    Losses and gradients of all processes are then summed, never averaged: their batches and their
    numbers of OOD patches may differ.

    Args:
        terms: of ``Method.terms``.
        counts: for each term the count over all processes; None if there is only this one.
    Returns:
        A scalar. Terms of weight 0 are left out.
    Raises:
        ValueError: if no term has a weight.
    """
    given: Sequence[Tensor | float] = [t.count for t in terms] if counts is None else counts
    parts = [
        term.weight * term.numerator / _at_least_one(count)
        for term, count in zip(terms, given, strict=True)
        if term.weight != 0
    ]
    if not parts:
        raise ValueError("terms: expected at least one with a weight, got none to minimise")
    return torch.stack(parts).sum()


def _at_least_one(count: Tensor | float) -> Tensor | float:
    # a batch without OOD patches: 0 / 1
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1.0)


class Method(nn.Module):
    """A way to adapt an encoder to classes.

    Subclasses take ``(encoder, class_names, *, settings with the authors' defaults)``, hand the
    settings on, and register what they train as float32 parameters (float64 for a float64 tower).
    What does not change during training (text features of fixed prompts) is a buffer with
    ``persistent=False``: it is made again rather than saved.

    Args:
        encoder: the frozen network; never part of the method's state.
        class_names: K names. Underscores are read as spaces in prompts; the names themselves are
            kept as they are.
        settings: of the subclass, JSON values.
    Attributes:
        name: as ``fastood train`` and saved files call it.
        needs: what ``Batch.image`` and ``Batch.local`` must hold.
        recipe: the authors' training recipe.
        local_note: what patches mean for this method.
        changes_towers: it has ``adapted(encoder)`` instead of ``head()``.
        tau: 1 / γ of the encoder.
        world: the processes that train together; by default this one alone.
    Raises:
        ValueError: unusable class names.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    recipe: ClassVar[Recipe]
    local_note: ClassVar[str] = ""
    changes_towers: ClassVar[bool] = False

    def __init__(
        self, encoder: Encoder, class_names: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        for note in check_class_names(
            class_names if isinstance(class_names, str) else [*map(_words, class_names)],
            allow_duplicates=True,
        ):
            warnings.warn(note, stacklevel=3)
        self.encoder = encoder
        self.class_names = tuple(class_names)
        self.words = tuple(map(_words, self.class_names))
        self.tau = 1 / encoder.logit_scale
        self._settings = dict(settings)
        self._world: World | None = None

    @property
    def world(self) -> World:
        if self._world is None:
            from fastood.tuning.parallel import World

            self._world = World.alone()
        return self._world

    @world.setter
    def world(self, world: World) -> None:
        self._world = world

    @property
    def dtype(self) -> torch.dtype:
        """In which masters and losses are kept: float32, or float64 if the tower is."""
        return torch.float64 if self.encoder.dtype == torch.float64 else torch.float32

    def settings(self) -> dict[str, Any]:
        """JSON values with which ``build`` makes the same method again."""
        return dict(self._settings)

    @classmethod
    def build(cls, encoder: Encoder, class_names: Sequence[str], **settings: Any) -> Self:
        """The method with these settings.

        Raises:
            ValueError: on a setting it does not have, with the nearest that it has.
        """
        check_settings(cls, settings)
        return cls(encoder, class_names, **settings)

    def prepare(self, data: Any) -> None:
        """What is to be done before the first step, with the training data; by default nothing."""
        del data

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        """The loss of a batch in parts, and the predicted classes ``(B,)`` int64.

        Always the same terms in the same order: processes add them up by position. An empty batch
        (a process without a share of the last images) gives sums of 0 that are connected to the
        same parameters, so that all processes go backward together.
        """
        raise NotImplementedError

    def head(self) -> Head:
        """The method as it is now, frozen, for scores: ``similarities(features, local=None)``.

        Later training does not change it. It has ``fingerprint``, ``logit_scale`` and ``dim``.
        """
        raise NotImplementedError

    def adapted(self, encoder: Encoder) -> Encoder:
        """A copy of ``encoder`` with changed towers, where ``changes_towers``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest of method, settings, classes, encoder and trained numbers."""
        return state_digest(self)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave when the method was saved.

        What has no elements before ``prepare`` may have any shape here; a method that has such
        things makes room for them in ``_load_from_state_dict``.

        Raises:
            ValueError: missing or unknown names, or other shapes.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError(
                f"state: expected {', '.join(own) or 'nothing'}, got "
                f"{', '.join(tensors) or 'nothing'}"
            )
        for name, x in tensors.items():
            if own[name].shape != x.shape and own[name].numel():
                raise ValueError(
                    f"{name}: the settings {self.settings()} mean {tuple(own[name].shape)}, got "
                    f"{tuple(x.shape)}"
                )
        try:
            self.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"state: {error}") from error


def setting_names(cls: type[Method]) -> tuple[str, ...]:
    """The settings a method has: its own first, then those it hands to its base class."""
    known: dict[str, None] = {}
    for owner in cls.__mro__:
        parameters = inspect.signature(owner.__init__).parameters.values()  # type: ignore[misc]
        known |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(known)


def check_settings(cls: type[Method], settings: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting ``cls`` does not have."""
    known = setting_names(cls)
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(known) or "none"
            raise ValueError(f"settings: {cls.name} has no {name!r}{hint} (its settings: {listed})")


def state_digest(method: Method) -> str:
    """Hex digest of what ``method`` computes: two equal ones score alike."""
    head = {
        "method": method.name,
        "settings": method.settings(),
        "classes": list(method.class_names),
        "encoder": method.encoder.fingerprint,
    }
    found = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
    for name, x in sorted(method.state_dict().items()):
        x = x.detach().cpu().contiguous()
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _words(name: Any) -> Any:
    return clean_name(name) if isinstance(name, str) else name
