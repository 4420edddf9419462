"""What a SeTAR search minimises or maximises: a LoCoOp-style loss, or a metric on OOD patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from torch import Tensor

from fastood.scores.inputs import check_count, check_scalar, check_tau
from fastood.setar.patchscores import SCORES
from fastood.setar.tally import WORST, Tally, Value

__all__ = ["BEST", "METRICS", "SCORES", "Objective", "Tally", "Value"]

METRICS: Mapping[str, int] = {
    "loss": -1,
    "cross_entropy": -1,
    "patches": -1,
    "auroc": 1,
    "aupr": 1,
    "fpr": -1,
}
"""Names of objectives; 1 where higher is better, -1 where lower is."""

BEST: Mapping[str, float] = {"auroc": 1.0, "aupr": 1.0, "fpr": 0.0}
"""Beyond these nothing is better. A loss has no such number."""


@dataclass(frozen=True)
class Objective:
    """How candidates are compared: the LoCoOp-style loss, or a metric on its OOD patches.

    With logits l = gamma cos (or a classifier's), labels y, and an OOD patch being one whose label
    is not among its ``top_k`` classes by (logit descending, index ascending)::

        loss = Σ_batches n_b / N (CE_b + weight * mean_{OOD patches of b} Σ_k p_k log(p_k + 1e-5))

    The mean over patches is taken in each batch, so the loss depends on the partition into batches
    (one batch makes it independent of any). A batch without an OOD patch contributes 0 there and is
    counted in ``Value.empty_batches``; the authors' code stops in that case. Where a tie at the
    k-th place decides, their result is torch.topk's choice; here the lowest index wins, counted in
    ``Value.ties``.

    Args:
        metric: ``"loss"``, or one of its terms ``"cross_entropy"`` and ``"patches"`` (lower is
            better); ``"auroc"``, ``"aupr"`` (higher), ``"fpr"`` (lower) of ``score``.
        score: for these three ``"mcm"``, ``"l_mcm"``, ``"gl_mcm"``, ``"energy"``, ``"entropy"`` or
            ``"variance"``, else None.
        weight: of the patch term (the authors' lambda).
        top_k: 1 <= top_k <= K - 1.
        temperature: of the scores alone, softmax(l / temperature); 100 undoes CLIP's gamma.
        pred_label: a patch is OOD by the predicted class of its image rather than by the label.
            The cross-entropy is of the label in any case.
    Raises:
        ValueError: for anything else.
    Notes:
        The metrics set N images against all OOD patches, each of which is taken for an OOD image:
        its own logits are the global ones, those of all OOD patches of its image the local ones.
        Higher scores mean ID; ID is the positive class; FPR is at the recall nearest to 0.95 (the
        lowest such threshold); AUPR is the average precision. These are ``AUROC``, ``AUPR-IN`` and
        ``FPR95-ID`` of ``fastood.metrics`` and, times 100, the numbers of the authors' code, whose
        scores and examples are both negated. Scores are taken in float64, theirs in float32, where
        more of them are equal. Without any OOD patch a metric has its worst value (0, for FPR 1):
        such a candidate is never chosen.
        Source: arXiv 2406.12629, after arXiv 2306.01293; the 1e-5 is the authors' code's.
    """

    metric: str = "loss"
    score: str | None = None
    _: KW_ONLY
    top_k: int
    weight: float = 0.1
    temperature: float = 100.0
    pred_label: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"metric: expected one of {', '.join(map(repr, METRICS))}, got {self.metric!r}"
            )
        if self.metric not in WORST and self.score is not None:
            raise ValueError(
                f"score: expected None with metric={self.metric!r}, got {self.score!r}; "
                "a score goes with auroc, aupr or fpr"
            )
        if self.metric in WORST and self.score not in SCORES:
            raise ValueError(
                f"score: expected one of {', '.join(map(repr, SCORES))} with "
                f"metric={self.metric!r}, got {self.score!r}"
            )
        check_count("top_k", self.top_k, 1, None)
        if check_scalar("weight", self.weight) < 0:
            raise ValueError(f"weight: expected a number >= 0, got {self.weight!r}")
        try:
            check_tau(self.temperature)
        except ValueError as error:
            raise ValueError(str(error).replace("tau:", "temperature:", 1)) from None
        if not isinstance(self.pred_label, bool):
            raise ValueError(f"pred_label: expected True or False, got {self.pred_label!r}")

    def better(self, a: Value, b: Value | None) -> bool:
        """Whether ``a`` is strictly better than ``b``; anything is better than None."""
        return b is None or METRICS[self.metric] * (a.objective - b.objective) > 0

    def check_classes(self, classes: int) -> None:
        """Refuse a number of classes this objective makes no sense for.

        Raises:
            ValueError: fewer than two classes; top_k that reaches all of them.
        """
        if classes < 2:
            raise ValueError(f"classes: expected at least 2, got {classes}")
        if self.top_k >= classes:
            raise ValueError(
                f"top_k: expected 1 <= top_k <= K - 1 = {classes - 1} for K = {classes} classes, "
                f"got {self.top_k}; no patch could be OOD, the label is always among all classes"
            )

    def tally(self, labels: Tensor, batches: Sequence[int]) -> Tally:
        """Begin to add up one candidate.

        Args:
            labels: (N,) integers in 0..K-1, in data order.
            batches: sizes of the batches in data order, N together.
        """
        return Tally(self, labels, batches)

    @property
    def of_patches_alone(self) -> bool:
        """Whether it depends on the images' own features not at all."""
        return not self.pred_label and (self.metric == "patches" or self.score == "l_mcm")

    def describe(self) -> dict[str, Any]:
        """The settings, for JSON; ``Objective(**described)`` is the same objective."""
        return asdict(self)
