"""The mapping that an evaluation returns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from fastood.metrics.bootstrap import percentile_interval

__all__ = ["Metrics", "average", "fpr_key"]

_ALIASES = {"AUPR_IN": "AUPR-IN", "AUPR_OUT": "AUPR-OUT"}
_FPR_ALIAS = re.compile(r"FPR(?:@(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)TPR)")


def fpr_key(tpr: float, positive: str) -> str:
    """Key of a false positive rate, for example ``FPR95-ID`` or ``FPR97.5-OOD``."""
    percent = Decimal(str(float(tpr))) * 100
    return f"FPR{format(percent.normalize(), 'f')}-{positive.upper()}"


def _canonical(key: object) -> object:
    if not isinstance(key, str):
        return key
    match = _FPR_ALIAS.fullmatch(key)
    if match:
        return f"FPR{match[1] or match[2]}-OOD"
    return _ALIASES.get(key, key)


class Metrics(dict[str, float]):
    """Metric names and fractions in [0, 1]; a dict that also knows how it was made.

    Iteration gives the names in use here (``AUROC``, ``AUPR-IN``, ``AUPR-OUT``, ``FPR95-ID``,
    ``FPR95-OOD``, ...). ``FPR95TPR`` (pytorch-ood), ``FPR@95``, ``AUPR_IN`` and ``AUPR_OUT``
    (OpenOOD) can be looked up as well; the first two are ``FPR95-OOD``.

    Attributes:
        n_id: ID scores.
        n_ood: OOD scores, of all sets together in an average.
        tpr: recall of the FPR entries.
        aupr_rule: ``"ap"`` or ``"trapezoid"``.
        intervals: metric name to (low, high); empty unless asked for.
        confidence: level of the intervals, None without any.
        replicates: bootstrap replicates behind the intervals; empty without any.
        draw: what the replicates were drawn from; results with the same one share their draws of
            ID images. None without any.

    Example:
        >>> found = Metrics({"AUROC": 0.9, "FPR95-OOD": 0.2}, n_id=10, n_ood=5)
        >>> found["FPR95TPR"], "FPR@95" in found, list(found)
        (0.2, True, ['AUROC', 'FPR95-OOD'])
    """

    def __init__(
        self,
        values: Mapping[str, float] | Iterable[tuple[str, float]] = (),
        *,
        n_id: int = 0,
        n_ood: int = 0,
        tpr: float = 0.95,
        aupr_rule: str = "ap",
        intervals: Mapping[str, tuple[float, float]] | None = None,
        confidence: float | None = None,
        replicates: Mapping[str, np.ndarray] | None = None,
        draw: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(values)
        self.n_id = n_id
        self.n_ood = n_ood
        self.tpr = tpr
        self.aupr_rule = aupr_rule
        self.intervals = dict(intervals or {})
        self.confidence = confidence
        self.replicates = dict(replicates or {})
        self.draw = draw

    def __missing__(self, key: str) -> float:
        name = _canonical(key)
        if name != key and isinstance(name, str) and super().__contains__(name):
            return super().__getitem__(name)
        raise KeyError(f"no metric {key!r}; here are {', '.join(self)}")

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or super().__contains__(_canonical(key))

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, metrics and intervals; an undefined metric (NaN) becomes None."""
        found: dict[str, Any] = {"n_id": self.n_id, "n_ood": self.n_ood}
        found.update((key, None if math.isnan(value) else value) for key, value in self.items())
        if self.intervals:
            found["intervals"] = {key: list(pair) for key, pair in self.intervals.items()}
        return found

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value:.4f}" for key, value in self.items())
        return f"Metrics({shown}; n_id={self.n_id}, n_ood={self.n_ood})"


def average(results: Iterable[Metrics]) -> Metrics:
    """Unweighted mean of each metric over several OOD sets, as published tables have it.

    Args:
        results: one :class:`Metrics` per OOD set, made with the same options.

    Returns:
        means. If every result was bootstrapped with one seed on the same ID scores, also their
        percentile intervals, AUROC included: the replicates then share the drawn ID images, so
        averaging them counts that noise once. Otherwise no intervals.

    Raises:
        ValueError: for no results, or results of different options.

    Example:
        >>> average([Metrics({"AUROC": 0.5}), Metrics({"AUROC": 1.0})])["AUROC"]
        0.75
    """
    found = list(results)
    if not found:
        raise ValueError("results: expected at least one set of metrics, got none")
    first = found[0]
    for other in found[1:]:
        if list(other) != list(first) or (other.tpr, other.aupr_rule) != (
            first.tpr,
            first.aupr_rule,
        ):
            raise ValueError(
                f"results: expected the same metrics with the same options in every set, got "
                f"{list(first)} (aupr {first.aupr_rule}) and {list(other)} (aupr {other.aupr_rule})"
            )
    means = {key: math.fsum(one[key] for one in found) / len(found) for key in first}
    sizes = {one.n_id for one in found}
    bounds: dict[str, tuple[float, float]] = {}
    if first.draw is not None and all(
        (one.draw, one.confidence) == (first.draw, first.confidence) for one in found
    ):
        for key in first.replicates:
            drawn = np.mean([one.replicates[key] for one in found], axis=0)
            bounds[key] = percentile_interval(drawn, first.confidence or 0.95)
    return Metrics(
        means,
        n_id=sizes.pop() if len(sizes) == 1 else sum(one.n_id for one in found),
        n_ood=sum(one.n_ood for one in found),
        tpr=first.tpr,
        aupr_rule=first.aupr_rule,
        intervals=bounds,
        confidence=first.confidence if bounds else None,
    )
