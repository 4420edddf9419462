"""What a SeTAR search minimises or maximises, added up over images in any chunking.

Letters: N images, P patches, K classes, D joint width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastood.metrics.counts import Counts
from fastood.scores.inputs import (
    check_count,
    check_finite,
    check_scalar,
    check_tau,
    check_tensor,
    must_check,
    working,
)
from fastood.setar.patchrows import SCORES, image_score, patch_rows, row_score

__all__ = ["METRICS", "SCORES", "Objective", "Tally", "Value"]

METRICS: Mapping[str, int] = {
    "loss": -1,
    "cross_entropy": -1,
    "patches": -1,
    "auroc": 1,
    "aupr": 1,
    "fpr": -1,
}
"""Names of objectives; 1 where higher is better, -1 where lower is."""

_OF_SCORES = {"auroc": 0.0, "aupr": 0.0, "fpr": 1.0}  # and their worst values


@dataclass(frozen=True)
class Value:
    """What one candidate comes to. Shares, accuracy and metrics are fractions."""

    objective: float
    """The number candidates are compared by."""
    loss: float
    """``cross_entropy + weight * patches``."""
    cross_entropy: float
    """Mean over the N images."""
    patches: float
    """Mean over batches, by size, of each batch's mean of Σ_k p_k log(p_k + 1e-5) over its OOD
    patches; 0 for a batch without any."""
    ood_share: float
    """OOD patches over all patches."""
    ood_patches: int
    ties: int
    """Patches that are OOD or not by the order among equal logits alone."""
    empty_batches: int
    """Batches without an OOD patch."""
    accuracy: float
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """``{score: {"auroc", "aupr", "fpr"}}`` of images against OOD patches, if a score was asked
    for and there is an OOD patch."""

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Value:
        """The inverse of :meth:`as_dict`."""
        return cls(**fields)


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
        if self.metric not in _OF_SCORES and self.score is not None:
            raise ValueError(
                f"score: expected None with metric={self.metric!r}, got {self.score!r}; "
                "a score goes with auroc, aupr or fpr"
            )
        if self.metric in _OF_SCORES and self.score not in SCORES:
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

    def describe(self) -> dict[str, Any]:
        """The settings, for JSON; ``Objective(**described)`` is the same objective."""
        return asdict(self)


class Tally:
    """One candidate, added up over chunks of images that may straddle batches.

    What is kept is float64, one number an image (for a metric also one an OOD patch); batches are
    formed at the end. So the value depends on the chunks by the rounding of their products alone.
    """

    def __init__(self, objective: Objective, labels: Tensor, batches: Sequence[int]) -> None:
        self.objective = objective
        self._labels = _labels(labels)
        n = len(self._labels)
        self._batches = [check_count("batches", size, 1, None) for size in batches]
        if sum(self._batches) != n:
            raise ValueError(
                f"batches: expected sizes that sum to the {n} images, got {self._batches}, "
                f"which sum to {sum(self._batches)}"
            )
        self._largest = int(self._labels.max())
        self._classes: int | None = None
        self._seen = torch.zeros(n, dtype=torch.bool)
        self._images: list[tuple[int, Tensor]] = []  # first image, (6, b) float64
        self._ood_scores: list[Tensor] = []

    def add(
        self,
        start: int,
        logits: Tensor,
        local: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """Take images ``start`` to ``start + b`` in; each image once, in any order.

        Args:
            logits: (b, K) of the images.
            local: (b, P, D) features of their patches, P >= 1.
            weight, bias: (K, D) and (K,) or None: logits of patches are local weight' + bias.
        Raises:
            ValueError: shapes that do not fit; images outside 0..N-1 or added before; top_k or
                labels that do not fit K; NaN or Inf in the input (on a GPU with FASTOOD_CHECK=1,
                otherwise when the value is asked for).
        """
        self._check(start, logits, local, weight, bias)
        b, p = local.shape[:2]
        objective = self.objective
        logits = working(logits.detach())
        labels = self._labels[start : start + b].to(logits.device)
        predicted = logits.argmax(dim=1)  # the lowest index of equal ones
        own = predicted if objective.pred_label else labels
        wide = logits.double()
        cross_entropy = wide.logsumexp(dim=1) - wide.gather(1, labels[:, None])[:, 0]
        score, temperature = objective.score, objective.temperature
        rows = patch_rows(
            working(local.detach()).reshape(b * p, -1),
            working(weight.detach()),
            None if bias is None else working(bias.detach()),
            own.repeat_interleave(p),
            top_k=objective.top_k,
            score=score,
            temperature=temperature,
        )
        ood = rows.ood.view(b, p)
        image = torch.zeros(6, b, dtype=torch.float64, device=logits.device)
        image[0] = cross_entropy
        image[1] = predicted == labels
        image[2] = rows.entropy.view(b, p).sum(dim=1)
        image[3] = ood.sum(dim=1)
        image[4] = rows.tied.view(b, p).sum(dim=1)
        if score is not None and rows.score is not None:
            patches = rows.score.view(b, p)
            image[5], of_patches = image_score(
                score, row_score(score, wide, temperature), patches, ood
            )
            self._ood_scores.append(of_patches)
        self._images.append((start, image))
        self._patches = p
        self._seen[start : start + b] = True

    def value(self) -> Value:
        """The value of the candidate, once all N images have been added.

        Raises:
            ValueError: images are missing; the input held NaN or Inf.
        """
        n, objective = len(self._labels), self.objective
        if not self._seen.all():
            missing = (~self._seen).nonzero()[:, 0]
            raise ValueError(
                f"tally: {len(missing)} of {n} images have not been added, "
                f"the first is {int(missing[0])}"
            )
        images = torch.cat([part for _, part in sorted(self._images, key=lambda x: x[0])], dim=1)
        images = images.cpu()
        if not images.isfinite().all():
            bad = (~images.isfinite().all(dim=0)).nonzero()[:, 0]
            raise ValueError(
                f"logits: expected finite numbers, found NaN or Inf for {len(bad)} of {n} images, "
                f"the first is {int(bad[0])}; are all weights finite?"
            )
        entropy = images[2].split(self._batches)
        counts = [int(part.sum()) for part in images[3].split(self._batches)]
        patches = math.fsum(
            size / n * float(part.sum()) / count
            for size, part, count in zip(self._batches, entropy, counts, strict=True)
            if count
        )
        cross_entropy = float(images[0].sum()) / n
        found = {
            "loss": cross_entropy + objective.weight * patches,
            "cross_entropy": cross_entropy,
            "patches": patches,
        }
        scores: dict[str, dict[str, float]] = {}
        ood_patches = sum(counts)
        if objective.score is not None:
            found.update(_OF_SCORES)
            if ood_patches:
                of_score = _metrics(images[5], torch.cat(self._ood_scores).cpu())
                scores[objective.score] = of_score
                found.update(of_score)
        return Value(
            objective=found[objective.metric],
            loss=found["loss"],
            cross_entropy=cross_entropy,
            patches=patches,
            ood_share=ood_patches / (n * self._patches),
            ood_patches=ood_patches,
            ties=int(images[4].sum()),
            empty_batches=counts.count(0),
            accuracy=float(images[1].sum()) / n,
            scores=scores,
        )

    def _check(
        self, start: int, logits: Tensor, local: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        check_tensor("logits", logits, (2,), "(b, K)")
        check_tensor("local", local, (3,), "(b, P, D)")
        check_tensor("weight", weight, (2,), "(K, D)")
        b, k = logits.shape
        if b < 1 or local.shape[1] < 1 or len(local) != b:
            raise ValueError(
                f"local: expected ({b}, P, D) for logits of {b} images, with b, P >= 1, "
                f"got {tuple(local.shape)}"
            )
        if self._images and local.shape[1] != self._patches:
            raise ValueError(
                f"local: expected {self._patches} patches an image as before, got {local.shape[1]}"
            )
        if tuple(weight.shape) != (k, local.shape[2]):
            raise ValueError(
                f"weight: expected ({k}, {local.shape[2]}) to match logits {tuple(logits.shape)} "
                f"and local {tuple(local.shape)}, got {tuple(weight.shape)}"
            )
        if bias is not None and tuple(check_tensor("bias", bias, (1,), "(K,)").shape) != (k,):
            raise ValueError(f"bias: expected ({k},), got {tuple(bias.shape)}")
        if k != self._classes:
            if self._classes is not None:
                raise ValueError(f"logits: expected {self._classes} classes as before, got {k}")
            self.objective.check_classes(k)
            if self._largest >= k:
                raise ValueError(
                    f"labels: expected values in 0..{k - 1} (K = {k}), got {self._largest}; "
                    "do labels and class names belong to the same data set?"
                )
            self._classes = k
        n = len(self._labels)
        start = check_count("start", start, 0, n - b, high_name="N - b = ")
        if self._seen[start : start + b].any():
            raise ValueError(f"start: images {start}..{start + b - 1} hold one added before")
        for name, x in (("logits", logits), ("local", local), ("weight", weight), ("bias", bias)):
            # a sum is one quick pass; which rows are at fault is asked only if there are any
            if x is not None and must_check(x) and not math.isfinite(float(x.detach().sum())):
                check_finite(name, x, what="values")


def _labels(labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor (N,), got {type(labels).__name__}")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: expected shape (N,) with N >= 1, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, got {labels.dtype}")
    labels = labels.detach().long()
    if int(labels.min()) < 0:
        raise ValueError(
            f"labels: expected values in 0..K-1, got {int(labels.min())}; a search takes "
            "in-distribution images alone"
        )
    return labels


def _metrics(images: Tensor, patches: Tensor) -> dict[str, float]:
    """The authors' three metrics, as fractions: ID positive, higher = ID."""
    counts = Counts.of(images.numpy(), patches.numpy())
    return {
        "auroc": counts.auroc(),
        "aupr": counts.aupr("id", "ap"),
        "fpr": counts.fpr("id", "nearest", 0.95),
    }
