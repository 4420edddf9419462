"""What all global scores are arithmetic on, for scores of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastood.ops import rows
from fastood.ops.dispatch import choose
from fastood.ops.rows import RowStatistics
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_finite,
    check_tau,
    check_tensor,
    check_width,
    row_blocks,
    unit_rows,
    working,
)
from fastood.scores.row import Text, cosines, unit_features

__all__ = ["RowStatistics", "row_statistics"]

_MAX_TAUS = 16


def row_statistics(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    taus: Sequence[float] = (1.0,),
    c: int = 1,
    moments: bool = False,
    normalize: bool = True,
    impl: str | None = None,
) -> RowStatistics:
    """The top of every row of similarities and sums of its rest, in one pass.

    With s(1) >= s(2) >= ... the similarities of an image, for every tau::

        rest = log Σ_{k not among the c largest} exp((s_k - s(1)) / tau)

    so lse(s / tau) = s(1) / tau + log(Σ_{j<=c} exp((s(j) - s(1)) / tau) + exp(rest)), whatever the
    sizes. Differentiable (``classes`` apart) and traceable by torch.compile.

    Args:
        image: (B, D) float; text: (K, D), (B, K, D) or a ClassBank; or ``similarity`` (B, K).
        taus: up to 16 temperatures, > 0.
        c: how many of the largest are kept outside the sum, 1 <= c <= K.
        moments: also ``neg_entropy`` and ``variance``.
        impl: None picks the fused CPU kernel where it applies (float32, bfloat16, float16 on CPU),
            else the reference; ``"reference"`` or ``"cpu"`` force one.
    Returns:
        ``RowStatistics(values (B, c), classes (B, c), rest (B, T), neg_entropy, variance (B, T))``.
    Raises:
        ValueError: as ``max_similarity``; c outside 1..K; no tau, more than 16, or one <= 0.

    Example:
        >>> found = row_statistics(similarity=torch.tensor([[0.1, 0.3, 0.2]]), c=2)
        >>> found.classes, found.rest.exp()
        (tensor([[1, 2]]), tensor([[0.8187]], dtype=torch.float64))
    """
    taus = [check_tau(tau) for tau in taus]
    if not 1 <= len(taus) <= _MAX_TAUS:
        raise ValueError(f"taus: expected 1 to {_MAX_TAUS} temperatures, got {len(taus)}")
    weights = text.text if isinstance(text, ClassBank) else text
    given = [x for x in (image, weights, similarity) if isinstance(x, Tensor)]
    implementation = choose(impl, *given)
    if similarity is not None or image is None or weights is None or weights.ndim == 3:
        s = cosines(image, text, similarity, normalize=normalize)
        c = _count(c, s.shape[1], "text" if similarity is None else "similarity")
        check_finite("similarity", s, what="values")
        if implementation == "reference":
            return RowStatistics(*rows.statistics_of(s, taus, c, moments))
        return rows.similarity_statistics(s, taus=taus, c=c, moments=moments)

    check_tensor("image", image, (2,), "(B, D)")
    check_tensor("text", weights, (2,), "(K, D)")
    check_width(image, weights)
    c = _count(c, len(weights), "text")
    panels = None
    if isinstance(text, ClassBank):
        z, t = working(check_features("image", image, (2,), "(B, D)")), weights
        z = unit_rows(z) if normalize and text.normalize else z
        panels = text.packed
    else:
        z, t = unit_features(image, weights, normalize=normalize)
    if implementation == "cpu":
        return rows.row_statistics(z, t, taus=taus, c=c, moments=moments, panels=panels)
    parts = [
        rows.statistics_of(z[block] @ t.to(z.dtype).mT, taus, c, moments)
        for block in row_blocks(len(z), len(t))
    ]
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _count(c: int, k: int, name: str) -> int:
    if k == 0:
        raise ValueError(f"{name}: expected at least one class, got K = 0")
    return check_count("c", c, 1, k, high_name="K = ")
