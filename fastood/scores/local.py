"""Local scores: patches against classes, the best patch counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastood import reference
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    BLOCK,
    check_features,
    check_finite,
    check_scalar,
    check_tau,
    check_tensor,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)
from fastood.scores.row import Text, mcm

__all__ = ["gl_mcm", "l_mcm"]


def l_mcm(
    local: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """L-MCM: max over patches p and classes k of softmax_k(s_pk / tau), softmax per patch.

    Source: arXiv 2304.04521 (GL-MCM), equation 4.

    Args:
        local: (B, P, D) patch features in the joint space, any norm.
        text: (K, D), per-image (B, K, D), or a ClassBank.
        similarity: (B, P, K) in cosine units, instead of both.
    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, P = 0, K = 0, NaN, Inf or zero
            rows, tau <= 0 or not finite.
    """
    tau = check_tau(tau)
    if similarity is not None:
        if local is not None or text is not None:
            raise ValueError("similarity: give either similarity, or local and text, not both")
        s = check_tensor("similarity", similarity, (3,), "(B, P, K)")
        check_finite("similarity", s, what="values")
        _check_sizes(s.shape[1], s.shape[2])
        return reference.l_mcm(working(s), tau)
    if local is None or text is None:
        raise ValueError("expected local and text, or similarity=; one of them is missing")
    zl = check_features("local", local, (3,), "(B, P, D)")
    if isinstance(text, ClassBank):
        t, normalize, text_ready = text.text, normalize and text.normalize, True
    else:
        t, text_ready = check_features("text", text, (2, 3), "(K, D) or (B, K, D)"), False
    check_width(zl, t, ("local", "text"))
    _check_sizes(zl.shape[1], t.shape[-2])
    t = working(t)
    if normalize and not text_ready:
        t = unit_rows(t)
    dtype = torch.promote_types(working(zl[:0]).dtype, t.dtype)
    t = t.to(dtype)
    parts = []
    for rows in _row_blocks(len(zl), zl.shape[1] * t.shape[-2]):
        z = zl[rows].to(dtype)
        z = unit_rows(z) if normalize else z
        parts.append(reference.l_mcm(matmul_classes(z, t[rows] if t.ndim == 3 else t), tau))
    return torch.cat(parts) if parts else zl.new_zeros(0, dtype=dtype)


def gl_mcm(
    image: Tensor | None = None,
    local: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    local_similarity: Tensor | None = None,
    tau: float = 1.0,
    weight: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """GL-MCM: S_MCM of the image plus ``weight`` times L-MCM of its patches.

    Source: arXiv 2304.04521, equation 5. Published tables use weight 1.0 (the argument's default,
    LoCoOp, SeTAR); the authors' ImageNet script of the journal version sets 0.5.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D), (B, K, D) or a ClassBank.
        similarity: (B, K) with ``local_similarity`` (B, P, K), instead of the three.
    Returns:
        (B,); higher means in-distribution.
    Raises:
        ValueError: as ``mcm`` and ``l_mcm``; a weight that is not finite; unequal B.
    """
    weight = check_scalar("weight", weight)
    b_image = image if image is not None else similarity
    b_local = local if local is not None else local_similarity
    if b_image is not None and b_local is not None and len(b_image) != len(b_local):
        raise ValueError(
            f"local: expected patches of the same {len(b_image)} images, got {len(b_local)}"
        )
    return mcm(
        image,
        text if similarity is None else None,
        similarity=similarity,
        tau=tau,
        normalize=normalize,
    ) + weight * l_mcm(
        local,
        text if local_similarity is None else None,
        similarity=local_similarity,
        tau=tau,
        normalize=normalize,
    )


def _check_sizes(patches: int, classes: int) -> None:
    if patches == 0:
        raise ValueError("local: expected at least one patch, got P = 0")
    if classes == 0:
        raise ValueError("text: expected at least one class, got K = 0")


def _row_blocks(b: int, per_row: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, per_row))
    for start in range(0, b, step):
        yield slice(start, min(start + step, b))
