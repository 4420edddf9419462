"""What the terms of several methods share: checked images, cross-entropy sums, empty batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.ops.gpu import within
from fastood.scores.inputs import check_features, working
from fastood.tuning.inputs import labels_of
from fastood.tuning.method import Batch, Term

__all__ = ["classified", "images_of", "or_nothing"]


def images_of(batch: Batch, width: int, dtype: torch.dtype) -> Tensor:
    """The features ``(B, D)`` of a batch, checked, as they came but in ``dtype``.

    Raises:
        ValueError: another width than the encoder's; NaN, Inf or zero rows.
    """
    z = check_features("image", batch.image, (2,), "(B, D)")
    if z.shape[1] != width:
        raise ValueError(
            f"image: expected features of width {width} as the encoder's, got {tuple(z.shape)}; "
            "were they encoded by another model?"
        )
    return working(z).to(dtype)


def classified(s: Tensor, labels: Tensor, tau: float) -> tuple[Term, Tensor]:
    """Cross-entropy of similarities ``s (B, K)`` at ``tau`` as a term, and the nearest classes.

    On a GPU a label outside 0..K-1 makes the sum NaN, elsewhere it raises a ValueError.
    """
    y = labels_of(labels, s, s.shape[1])
    valid = None
    if y.is_cuda:
        y, valid = within(y, s.shape[1])
    total = F.cross_entropy(s / tau, y, reduction="sum")
    if valid is not None:
        total = total * valid.to(total.dtype)
    return Term("cross_entropy", total, len(y)), s.detach().argmax(dim=-1)


def or_nothing(
    batch: Batch,
    connected: Tensor,
    make: Callable[[], tuple[list[Term], Tensor]],
    names: Sequence[tuple[str, float]] = (("cross_entropy", 1.0),),
) -> tuple[list[Term], Tensor]:
    """``make()``, or terms of 0 without images, of NaN if ``connected`` is not finite any more.

    Both stay connected: all processes go backward through the same, whatever their share. NaN is
    for the training loop to notice, which then keeps the last good state; the losses themselves
    would refuse such classes as bad input.

    Args:
        connected: what the loss depends on: text features, or sums of parameters.
        make: the terms of a batch with images, and the predictions.
        names: their names and weights, in order.
    """
    count = len(batch.labels)
    # on a GPU the losses are NaN by themselves, and looking would wait for it
    broken = connected.is_cpu and not bool(torch.isfinite(connected.detach()).all())
    if count and not broken:
        return make()
    value = connected.sum() * (math.nan if broken else 0.0)
    terms = [Term(name, value if w else value.detach(), count, w) for name, w in names]
    return terms, torch.zeros_like(batch.labels, dtype=torch.int64)
