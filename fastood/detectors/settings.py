"""What a detector is: score, options, head, encoder, device; and the key that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastood.detectors.encoding import module_of
from fastood.detectors.fitting import Fitted
from fastood.detectors.heads import as_head
from fastood.detectors.peers import PytorchOODMember
from fastood.detectors.spaces import search_space
from fastood.models.base import Encoder
from fastood.scores.bank import ClassBank
from fastood.scores.fitted import FIT_OPTIONS
from fastood.scores.inputs import check_count, check_scalar
from fastood.scores.registry import SCORES, resolve
from fastood.scores.result import ScoreKey

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Configured"]

_ALIASES = {"temperature": "tau"}


class Configured(PytorchOODMember):
    """The parts of a ``Detector`` and their options, without any scoring."""

    requires_fit: bool = False
    hyperparameter_space: dict[str, list[Any]] = {}  # noqa: RUF012  # pytorch-ood's name and form
    info: Any = None
    """pytorch-ood's record of the paper; ours is ``fastood.scores.SCORES[name].source``."""

    def __init__(
        self,
        score: str,
        encoder: Any = None,
        head: Any = None,
        *,
        logit_scale: float | None = None,
        prompts: str | None = None,
        fingerprint: str | None = None,
        **options: Any,
    ) -> None:
        if encoder is not None and not callable(encoder):
            raise TypeError(
                "encoder: expected an Encoder, a function from images to features, or None, "
                f"got {type(encoder).__name__}; class features go into head"
            )
        self.score = score
        self.encoder = encoder
        bank = {k: options.pop(k) for k in ("negatives", "groups", "seed") if k in options}
        self.head: Any
        self.head, digest = as_head(head, encoder, **bank)
        self.prompts = digest if prompts is None else prompts
        self._fingerprint = fingerprint
        self._logit_scale = _gamma(logit_scale, self.head, encoder)
        self._fit_options = {k: options.pop(k) for k in FIT_OPTIONS.get(score, ()) if k in options}
        self._given: dict[str, Any] = options
        self._fitted: Fitted | None = None
        self._device: torch.device | None = None
        self.options = self._resolved()
        self.requires_fit = score in FIT_OPTIONS
        classes = len(self.head) if isinstance(self.head, ClassBank) else None
        self.hyperparameter_space = search_space(score, classes)

    @property
    def needs_local(self) -> bool:
        """Whether the score looks at patch features."""
        return SCORES[self.score].needs == "local"

    @property
    def fitted(self) -> bool:
        """Whether a fit has taken place."""
        return self._fitted is not None

    @property
    def key(self) -> ScoreKey:
        """What must agree before scores and a threshold may be compared."""
        options = dict(self.options)
        if self._fitted is not None:
            options.update(self._fit_options, fit=self._fitted.digest)
        model = self._fingerprint
        if model is None and isinstance(self.encoder, Encoder):
            model = self.encoder.fingerprint
        elif model is None and (network := module_of(self.encoder)) is not None:
            # two networks must not share a threshold because neither was given a name
            from fastood.models.fingerprint import weights_digest

            model = weights_digest(network.state_dict(), {"type": type(network).__qualname__})
        parts = [part for part in (model, getattr(self.head, "fingerprint", None)) if part]
        return ScoreKey(self.score, options, "+".join(parts) or None, self.prompts)

    @property
    def device(self) -> torch.device | None:
        """Where features are scored: as set by ``to``, else where the head or the fit is."""
        if self._device is not None:
            return self._device
        if self._fitted is not None:
            return self._fitted.device
        return getattr(self.head, "device", None)

    def to(self, device: torch.device | str) -> Self:
        """Move head, fit and network, in place. An ``Encoder`` stays where it was loaded."""
        self._device = torch.device(device)
        if callable(getattr(self.head, "to", None)):
            moved = self.head.to(self._device)
            self.head = self.head if moved is None else moved
        if self._fitted is not None:
            self._fitted.to(self._device)
        network = module_of(self.encoder)
        if network is not None:
            network.to(self._device)
        return self

    def get_hyperparameters(self) -> dict[str, Any]:
        """Current values of what ``hyperparameter_space`` names."""
        known = {**self.options, **self._fit_options}
        return {name: known.get(_ALIASES.get(name, name)) for name in self.hyperparameter_space}

    def set_hyperparameters(self, **values: Any) -> Self:
        """Set options of the score; one that belongs to the fit makes a new fit necessary.

        Raises:
            ValueError: on an option the score does not take, or a value it cannot have.
        """
        given = {_ALIASES.get(name, name): value for name, value in values.items()}
        refit = {k: given.pop(k) for k in FIT_OPTIONS.get(self.score, ()) if k in given}
        before = self._given
        self._given = {**before, **given}
        try:
            self.options = self._resolved()
        except ValueError:
            self._given = before
            raise
        if refit:
            self._fit_options.update(refit)
            self._fitted = None
        return self

    def _resolved(self) -> dict[str, Any]:
        bank = self.head if isinstance(self.head, ClassBank) else None
        given = dict(self._given)
        if self.score in FIT_OPTIONS:
            given["fit"] = self.score  # a stand-in: what is fitted comes later
        found = resolve(
            {self.score: (self.score, given)},
            logit_scale=self._logit_scale,
            negatives=None if bank is None else bank.negatives is not None,
            classes=None if bank is None else len(bank),
        )
        _, options = found[self.score]
        options.pop("fit", None)
        if "k" in options:
            options["k"] = check_count("k", options["k"], 1, None)
        return options

    def __repr__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in {**self.options, **self._fit_options}.items())
        return f"{type(self).__name__}(score={self.score!r}{options})"


def _gamma(given: Any, head: Any, encoder: Any) -> float | None:
    """γ as given, or as head or encoder tell it in a plain number.

    CLIP modules hold a parameter of that name that is the logarithm: it is not taken for γ.
    """
    if given is not None:
        value = check_scalar("logit_scale", given)
        if value <= 0:
            raise ValueError(f"logit_scale: expected γ > 0, got {given!r}")
        return value
    for owner in (head, encoder):
        own = getattr(owner, "logit_scale", None)
        if isinstance(own, (int, float)):
            return float(own)
    return None
