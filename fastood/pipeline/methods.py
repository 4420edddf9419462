"""Scores that are fitted first: their options split, their banks built once and digested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastood.errors import DataError
from fastood.features.featureset import FeatureSet
from fastood.scores.fitted import (
    FIT_OPTIONS,
    GaussianBank,
    NeighbourBank,
    fit_knn,
    fit_mahalanobis,
)
from fastood.scores.registry import SCORES, Methods, entries, resolve

__all__ = ["Fits", "check_methods", "split_fit_options"]

Asked = dict[str, tuple[str, dict[str, Any]]]


def split_fit_options(methods: Methods) -> tuple[Asked, dict[str, dict[str, Any]]]:
    """``{label: (name, options)}`` and, of the fitted scores, the options of their fit."""
    asked: Asked = {
        label: (name, dict(options)) for label, (name, options) in entries(methods).items()
    }
    fitting: dict[str, dict[str, Any]] = {}
    for label, (name, options) in asked.items():
        if name in FIT_OPTIONS and options.get("fit") is None:
            takes = [*FIT_OPTIONS[name], *(k for k in SCORES[name].options if k != "fit")]
            unknown = [k for k in options if k not in (*takes, "fit")]
            if unknown:
                raise ValueError(
                    f"{name}: unknown option {', '.join(map(repr, unknown))}; it takes "
                    f"{', '.join(takes)}"
                )
            fitting[label] = {k: options.pop(k) for k in FIT_OPTIONS[name] if k in options}
    return asked, fitting


def check_methods(methods: Methods, *, trained: bool, **known: Any) -> None:
    """Refuse scores, options and unmet needs before any work; what is fitted is fitted later.

    Args:
        trained: whether there is something to fit to.
        known: what is known already, as for ``resolve``: ``classes``, ``local``, ...

    Raises:
        ValueError: as ``resolve`` and ``split_fit_options``.
    """
    resolve(
        {
            label: (
                name,
                {"fit": "later", **options} if trained and name in FIT_OPTIONS else options,
            )
            for label, (name, options) in split_fit_options(methods)[0].items()
        },
        **known,
    )


class Fits:
    """Banks of training features for the labels that need one; the features are got once.

    Attributes:
        digests: label to ``{"fit": digest}`` (and the options of the fit), for score keys.
    """

    def __init__(
        self, options: Mapping[str, Mapping[str, Any]], features: Callable[[], FeatureSet]
    ) -> None:
        self._options, self._get = options, features
        self._features: FeatureSet | None = None
        self.digests: dict[str, dict[str, Any]] = {}

    def filled(self, asked: Asked) -> Asked:
        """``asked`` with every missing ``fit`` in place."""
        filled: Asked = {}
        for label, (name, options) in asked.items():
            if label not in self._options:
                filled[label] = (name, options)
                continue
            if self._features is None:
                self._features = self._get()
            bank: GaussianBank | NeighbourBank
            if name == "knn":
                bank = fit_knn(self._features.image())
            else:
                bank = fit_mahalanobis(
                    self._features.image(), self._labels(), **self._options[label]
                )
            self.digests[label] = {**self._options[label], "fit": bank.digest}
            filled[label] = (name, {**options, "fit": bank})
        return filled

    def _labels(self) -> Tensor:
        features = self._features
        if features is None or features.labels is None or (features.labels < 0).any():
            name = "the training set" if features is None else features.name
            raise DataError(f"{name}: mahalanobis needs a class for every training image")
        return torch.from_numpy(features.labels)
