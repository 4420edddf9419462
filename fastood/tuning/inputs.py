"""Checking and normalising what the losses are given."""

from __future__ import annotations

import torch
from torch import Tensor

from fastood.scores.bank import ClassBank
from fastood.scores.inputs import check_features, check_width, must_check, unit_rows, working

__all__ = ["features_of", "labels_of"]


def features_of(image: Tensor, text: Tensor | ClassBank, normalize: bool) -> tuple[Tensor, Tensor]:
    """Checked features and classes of one dtype, of unit norm if asked."""
    z = check_features("image", image, (2,), "(B, D)")
    if isinstance(text, ClassBank):
        t, ready, normalize = text.text, True, normalize and text.normalize
    else:
        t, ready = check_features("text", text, (2, 3), "(K, D) or (B, K, D)"), False
    check_width(z, t)
    if len(z) == 0:
        raise ValueError("image: a loss needs at least one image, got B = 0")
    if t.shape[-2] == 0:
        raise ValueError("text: expected at least one class, got K = 0")
    z, t = working(z), working(t)
    dtype = torch.promote_types(z.dtype, t.dtype)
    z, t = z.to(dtype), t.to(dtype)
    if normalize:
        z, t = unit_rows(z), t if ready else unit_rows(t)
    return z, t


def labels_of(labels: Tensor, image: Tensor, k: int) -> Tensor:
    """Checked labels as int64 on the device of ``image``.

    On a GPU their values are looked at under FASTOOD_CHECK=1 only: a loss made of labels outside
    0..K-1 is NaN there, see ``fastood.ops.gpu.within``.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError("labels: expected an integer tensor (B,)")
    if labels.shape != (len(image),):
        raise ValueError(f"labels: expected ({len(image)},), got {tuple(labels.shape)}")
    y = labels.to(device=image.device, dtype=torch.int64)
    if must_check(y) and len(y):
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= k:
            raise ValueError(f"labels: expected values in 0..{k - 1} (K = {k}), got {low}..{high}")
    return y
