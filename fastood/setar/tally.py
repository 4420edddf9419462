"""One candidate of a search, added up over images in any chunking.

Letters: N images, P patches, K classes, D joint width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastood.metrics.counts import Counts
from fastood.ops import fused
from fastood.ops.dispatch import choose
from fastood.ops.patchterms import PatchTerms, patch_terms, terms_of
from fastood.scores.inputs import check_count, check_finite, check_tensor, must_check, working
from fastood.setar.patchscores import image_scores, patch_scores, row_scores

if TYPE_CHECKING:
    from fastood.setar.objective import Objective

__all__ = ["WORST", "Tally", "Value"]

WORST: Mapping[str, float] = {"auroc": 0.0, "aupr": 0.0, "fpr": 1.0}
"""What a metric of a score is without any OOD patch: no candidate is chosen for that."""


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
        # autocast, usual around encoders, would leave a few bfloat16 logits of thousands
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            self._add(start, logits, local, weight, bias)

    def _add(
        self, start: int, logits: Tensor, local: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        objective = self.objective
        b, p, d = local.shape
        labels = self._labels[start : start + b].to(logits.device)
        predicted = logits.argmax(dim=1)  # the lowest index of equal ones
        own = predicted if objective.pred_label else labels
        wide = logits.double()
        flat = local.to(torch.promote_types(working(local).dtype, weight.dtype)).reshape(b * p, d)
        terms = _terms(flat, weight, bias, own.repeat_interleave(p), objective.top_k)
        ood = (terms.rank >= objective.top_k).view(b, p)
        image = torch.zeros(6, b, dtype=torch.float64, device=logits.device)
        image[0] = wide.logsumexp(dim=1) - wide.gather(1, labels[:, None])[:, 0]
        image[1] = predicted == labels
        image[2] = terms.entropy.view(b, p).sum(dim=1)
        image[3] = ood.sum(dim=1)
        image[4] = terms.tied.view(b, p).sum(dim=1)
        score, temperature = objective.score, objective.temperature
        if score is not None:
            patches = patch_scores(
                score, flat, weight, bias, ood.flatten(), temperature=temperature
            ).view(b, p)
            of_images = row_scores(score, wide, temperature)
            image[5], of_ood = image_scores(score, of_images, patches, ood)
            self._ood_scores.append(of_ood)
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
            found.update(WORST)
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


_PACKED = WeakIdKeyDictionary()  # weight: (version, panels); every chunk brings the same weight


def _terms(
    local: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, top_k: int
) -> PatchTerms:
    """By the kernels if they take it, else in plain torch."""
    if choose(None, local, weight, bias) != "cpu" or not bool(weight.any(dim=1).all()):
        return terms_of(local, weight, bias, labels, top_k=top_k)
    # tensors of inference mode do not say when they change
    version = None if weight.is_inference() else weight._version
    panels = None
    if version is not None:
        held, panels = _PACKED.get(weight, (None, None))
        if held != version:
            panels = fused.score_panels(weight, normalize=False, name="weight")
            _PACKED[weight] = (version, panels)
    return patch_terms(local, weight, bias, labels, top_k=top_k, panels=panels)


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
