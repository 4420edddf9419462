"""A threshold that remembers what it was calibrated for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastood._version import __version__
from fastood.metrics.inputs import is_scores, key_differences, key_of, values

if TYPE_CHECKING:
    from fastood.scores.result import Orientation, ScoreKey

__all__ = ["RULES", "Threshold", "plain_options"]

RULES = ("conformal", "percentile")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Score options as JSON values, so that saved and fresh ones compare equal.

    Raises:
        TypeError: for a value that has no JSON form (an array, a function).
    """
    return {str(name): _plain(value, str(name)) for name, value in options.items()}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"options: {name} is NaN")
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(one, name) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one, name) for key, one in value.items()}
    raise TypeError(
        f"options: expected numbers, text, lists or mappings, got {type(value).__name__} for {name}"
    )


def _number(name: str, value: object, *, infinite: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    found = float(value)
    if math.isnan(found) or (math.isinf(found) and not infinite):
        raise ValueError(f"{name}: expected a finite number, got {found}")
    return found


def _pair(name: str, value: object, *, infinite: bool = False) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {value!r}")
    low, high = (_number(name, one, infinite=infinite) for one in value)
    if low > high:
        raise ValueError(f"{name}: expected low <= high, got {low} and {high}")
    return low, high


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Decides in or out of distribution, for the one score it was calibrated on.

    Made by :func:`fastood.calibrate`; ``save`` and ``load`` keep it as a small JSON file.

    Attributes:
        threshold: in the orientation of the scores. OOD means below it (``higher="id"``) or above
            it (``higher="ood"``), never equal. Infinite if too few scores were given to reject any.
        higher: what a higher score means.
        tpr: share of ID images to accept.
        rule: ``"conformal"`` or ``"percentile"``.
        n: ID scores it was calibrated on.
        interval: order-statistic interval of the true (1 - tpr) quantile of ID scores.
        expected_acceptance: share of new ID images accepted, on average over calibrations.
        acceptance: where that share lies for one calibration such as this.
        confidence: level of both intervals.
        score: registered name; None for scores of unknown origin.
        options: of the score: tau, c, ...
        model: fingerprint of the weights.
        prompts: digest of class names, templates and negatives.
        recipe: how to compute these scores again, in words: model name, class names, templates.
            Not compared; ``model`` and ``prompts`` are what must agree.
        source: name of the calibration images.
        created: ISO 8601.
        version: of fastood.
    """

    threshold: float
    higher: Orientation
    tpr: float
    rule: str
    n: int
    interval: tuple[float, float]
    expected_acceptance: float
    acceptance: tuple[float, float]
    confidence: float = 0.95
    score: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    prompts: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    created: str = ""
    version: str = __version__

    def __post_init__(self) -> None:
        for name in ("score", "model", "prompts"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text or None, got {getattr(self, name)!r}")
        for name in ("rule", "source", "created", "version"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        if self.higher not in ("id", "ood"):
            raise ValueError(f'higher: expected "id" or "ood", got {self.higher!r}')
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        if isinstance(self.n, bool) or not isinstance(self.n, (int, np.integer)):
            raise TypeError(f"n: expected an integer, got {self.n!r}")
        if self.n < 1:
            raise ValueError(f"n: expected at least 1, got {self.n}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: expected a mapping, got {self.options!r}")
        checked: dict[str, Any] = {
            "n": int(self.n),
            "options": plain_options(self.options),
            "recipe": plain_options(self.recipe),
            "threshold": _number("threshold", self.threshold, infinite=True),
            "interval": _pair("interval", self.interval, infinite=True),
            "acceptance": _pair("acceptance", self.acceptance),
        }
        for name in ("tpr", "expected_acceptance", "confidence"):
            checked[name] = _number(name, getattr(self, name))
        shares = checked["tpr"], checked["confidence"]
        if not all(0 < share < 1 for share in shares):
            raise ValueError(f"tpr, confidence: expected fractions in (0, 1), got {shares}")
        shares = (checked["expected_acceptance"], *checked["acceptance"])
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"acceptance: expected fractions in [0, 1], got {shares}")
        never = -math.inf if self.higher == "id" else math.inf
        if math.isinf(checked["threshold"]) and checked["threshold"] != never:
            raise ValueError(f"threshold: {checked['threshold']} would reject every image")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def key(self) -> ScoreKey | None:
        """What it was calibrated for; None if the calibration scores did not say."""
        if self.score is None:
            return None
        from fastood.scores.result import ScoreKey

        return ScoreKey(self.score, self.options, self.model, self.prompts)

    def is_ood(self, scores: Any, *, trust: bool = False) -> np.ndarray:
        """Which images are out of distribution: S < t, or S > t if higher means OOD.

        Args:
            scores: ``Scores``, or an array, tensor, sequence or one number, read in the orientation
                of this threshold. ``Scores`` must be of the same score, options, model, prompts and
                orientation. Bare numbers say none of that: they are taken if the threshold was
                itself calibrated on bare numbers, and otherwise only with ``trust=True``.
            trust: take the caller's word for what cannot be checked (bare numbers, a model or
                prompt set that only one side names). A known difference is refused even so.

        Returns:
            (n,) numpy bool, also for tensors; compared in float64. Empty for no scores, (1,) for
            one number.

        Raises:
            TypeError: for things that are not scores.
            ValueError: naming what differs; or for NaN and infinite scores, with the rows.

        Example:
            >>> from fastood.calibration import calibrate
            >>> calibrate([float(i) for i in range(99)], tpr=0.9).is_ood([8.5, 9.0, 50.0]).tolist()
            [True, False, False]
        """
        self._check_origin(scores, trust)
        if getattr(scores, "ndim", None) == 0:
            scores = scores.reshape(1)
        elif isinstance(scores, (int, float)):
            scores = [scores]
        found = values(scores, allow_empty=True).astype(np.float64, copy=False)
        return found < self.threshold if self.higher == "id" else found > self.threshold

    def _check_origin(self, scores: Any, trust: bool) -> None:
        given, own = key_of(scores), self.key
        if is_scores(scores) and scores.higher != self.higher:
            raise ValueError(
                f"scores: higher means {scores.higher} in these, but {self.higher} for this "
                f"threshold ({self.describe()}); calibrate again on scores of one orientation"
            )
        if own is not None and given is not None:
            from fastood.scores.result import ScoreKey

            plain = ScoreKey(given.score, plain_options(given.options), given.model, given.prompts)
            found = key_differences(own, plain, unknown_agrees=trust)
            if found:
                raise ValueError(
                    f"scores: not what this threshold was calibrated for: {'; '.join(found)}; "
                    f"calibrate again for these scores"
                )
        elif (own is None) != (given is None) and not trust:
            if given is not None:
                what = f"{given.score} scores, but the threshold does not say what it is for"
            else:
                what = f"bare numbers, but this threshold is for {self.score} scores only"
            raise ValueError(
                f"scores: got {what}; pass Scores made and calibrated with the same model, prompts "
                f"and options, or trust=True if you know they belong together"
            )

    def describe(self) -> str:
        """One line for people.

        Example:
            >>> from fastood.calibration import calibrate
            >>> calibrate([float(i) for i in range(99)], tpr=0.9).describe()
            'OOD if score < 9; accepts 90.0 % of ID images on average (95 % of calibrations: 83.4 \
to 95.0 %); conformal, tpr 0.9, 99 ID scores'
        """
        name = self.score or "score"
        if self.options:
            name += "(" + ", ".join(f"{k}={v}" for k, v in self.options.items()) + ")"
        sign = "<" if self.higher == "id" else ">"
        low, high = self.acceptance
        source = f" of {self.source}" if self.source else ""
        return (
            f"OOD if {name} {sign} {self.threshold:.6g}; accepts "
            f"{100 * self.expected_acceptance:.1f} % of ID images on average "
            f"({100 * self.confidence:g} % of calibrations: {100 * low:.1f} to {100 * high:.1f} %)"
            f"; {self.rule}, tpr {self.tpr:g}, {self.n} ID scores{source}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values; infinite numbers as ``"inf"`` and ``"-inf"``."""
        from fastood.calibration.store import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> Path:
        """Write the JSON file, atomically; see :func:`fastood.calibration.store.write`."""
        from fastood.calibration.store import write

        return write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Threshold:
        """Read a saved threshold; see :func:`fastood.calibration.store.read`."""
        from fastood.calibration.store import read

        return read(Path(path))
