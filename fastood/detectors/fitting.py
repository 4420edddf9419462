"""The scores that learn from training features: fit, classify, digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastood.scores.fitted import GaussianBank, NeighbourBank, fit_knn, fit_mahalanobis
from fastood.scores.inputs import check_count, unit_rows, working

__all__ = ["Fitted"]


class Fitted:
    """A bank of training features with what is needed beside it.

    Args:
        score: ``"knn"`` or ``"mahalanobis"``.
        features: (N, D) training features.
        labels: (N,) or None; samples labelled as OOD (< 0) are left out.
        options: of the fit.
        k: neighbours, to be checked against N (knn only).
    Raises:
        ValueError: no ID sample, no labels where they are needed, k > N, and what the fit raises.
    """

    def __init__(
        self,
        score: str,
        features: Tensor,
        labels: Tensor | None,
        options: Mapping[str, Any],
        k: int | None = None,
    ) -> None:
        self.bank: GaussianBank | NeighbourBank
        self.labels: Tensor | None = None
        if labels is not None:
            labels = torch.as_tensor(labels, device=features.device)
            if labels.is_floating_point() or labels.shape != (len(features),):
                raise ValueError(
                    f"labels: expected ({len(features)},) integers, one for each sample, got "
                    f"{tuple(labels.shape)} {labels.dtype}"
                )
            known = labels >= 0
            features, labels = features[known], labels[known]
        if not len(features):
            raise ValueError("features: no in-distribution sample to fit on (labels >= 0)")
        if score == "knn":
            check_count("k", k, 1, len(features), high_name="N = ")
            self.bank, self.labels = fit_knn(features), labels
        elif labels is None:
            raise ValueError("labels: mahalanobis needs the class of every sample, got None")
        else:
            self.bank = fit_mahalanobis(features, labels, **options)
        self.digest = self.bank.digest

    @property
    def device(self) -> torch.device:
        bank = self.bank
        return (bank.features if isinstance(bank, NeighbourBank) else bank.means).device

    def to(self, device: torch.device) -> None:
        self.bank = self.bank.to(device)
        if self.labels is not None:
            self.labels = self.labels.to(device)

    def classify(self, features: Tensor) -> Tensor | None:
        """(B,) label of the nearest mean or neighbour; None if no labels were given."""
        bank = self.bank
        if isinstance(bank, GaussianBank):
            x = features.double()
            x = (unit_rows(x) if bank.normalize else x) @ bank.whiten.mT
            return bank.classes[torch.cdist(x, bank.means).min(dim=-1).indices]
        if self.labels is None:
            return None
        z = unit_rows(working(features))
        return self.labels[(z @ bank.features.to(z.dtype).mT).max(dim=-1).indices]
