"""What all global scores are arithmetic on, for scores of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastood.errors import KernelError
from fastood.kernels.precision import resolve
from fastood.ops import rows
from fastood.ops.dispatch import choose, fall_back, operator_precision, refuse_cuda
from fastood.ops.fused import differentiable
from fastood.ops.gpu import MOST_TOPS, kernels
from fastood.ops.requests import MAX_TAUS
from fastood.ops.rows import RowStatistics
from fastood.scores.bank import ClassBank
from fastood.scores.compute import Text, check_no_product, cosines, unit_features
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_finite,
    check_tau,
    check_tensor,
    check_width,
    must_check,
    row_blocks,
    unit_rows,
    working,
)

__all__ = ["RowStatistics", "row_statistics"]


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
    precision: str | None = None,
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
        impl, precision: as for the global scores; there is no ``impl="cuda"``.
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
    if not 1 <= len(taus) <= MAX_TAUS:
        raise ValueError(f"taus: expected 1 to {MAX_TAUS} temperatures, got {len(taus)}")
    weights = text.text if isinstance(text, ClassBank) else text
    given = [x for x in (image, weights, similarity) if isinstance(x, Tensor)]
    if isinstance(image, Tensor) and isinstance(weights, Tensor) and image.ndim and weights.ndim:
        check_width(image, weights)  # of tensors on two devices, say so first
    implementation = choose(impl, *given, precision=precision)
    if implementation == "cuda":
        refuse_cuda(impl, "row_statistics")
    per_image = getattr(weights, "ndim", 0) == 3  # what is no tensor is refused below
    if similarity is not None or image is None or weights is None or per_image:
        check_no_product(
            precision, "similarities at hand, or of classes (B, K, D), are taken in float32"
        )
        s = cosines(image, text, similarity, normalize=normalize)
        c = _count(c, s.shape[1], "text" if similarity is None else "similarity")
        check_finite("similarity", s, what="values")
        if implementation == "triton" and c <= MOST_TOPS and not differentiable(s):
            try:
                return _named(
                    kernels.rows.similarity_statistics(s, taus=taus, c=c, moments=moments)
                )
            except KernelError as error:
                fall_back(error, impl, precision)
                implementation = "reference"
        if implementation == "reference":
            return RowStatistics(*rows.statistics_of(s, taus, c, moments))
        return rows.similarity_statistics(s, taus=taus, c=c, moments=moments)

    check_tensor("image", image, (2,), "(B, D)")
    check_tensor("text", weights, (2,), "(K, D)")
    check_width(image, weights)
    c = _count(c, len(weights), "text")
    if implementation == "triton" and c <= MOST_TOPS and not differentiable(image, weights):
        try:
            return _by_gpu(image, text, taus, c, moments, normalize, precision)
        except KernelError as error:
            fall_back(error, impl, precision)
            implementation = "reference"
    panels = None
    if isinstance(text, ClassBank):
        z, t = working(check_features("image", image, (2,), "(B, D)")), weights
        z = unit_rows(z) if normalize and text.normalize else z
        panels = text.packed
    else:
        z, t = unit_features(image, weights, normalize=normalize)
    if implementation != "reference":
        # beyond what the kernels hold nothing is demanded of them: the operator takes plain torch
        kernel = implementation == "triton" and c <= MOST_TOPS
        meant = operator_precision(impl, precision, z, t) if kernel else ""
        return rows.row_statistics(
            z, t, taus=taus, c=c, moments=moments, panels=panels, precision=meant
        )
    parts = [
        rows.statistics_of(z[block] @ t.to(z.dtype).mT, taus, c, moments)
        for block in row_blocks(len(z), len(t))
    ]
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _by_gpu(
    image: Tensor,
    text: Text | None,
    taus: list[float],
    c: int,
    moments: bool,
    normalize: bool,
    precision: str | None,
) -> RowStatistics:
    if must_check(image):
        check_features("image", image, (2,), "(B, D)")
    if isinstance(text, ClassBank):
        normalize = normalize and text.normalize
        ready = text.operand(resolve(precision, image))
    else:
        assert text is not None  # checked by the caller
        if must_check(text):
            check_features("text", text, (2,), "(K, D)")
        meant = resolve(precision, image, text)
        ready = kernels.operands.prepare(text, meant, normalize=normalize)
    return _named(
        kernels.rows.statistics(
            image.detach(), ready, taus=taus, c=c, moments=moments, normalize=normalize
        )
    )


def _named(found: Sequence[Tensor]) -> RowStatistics:
    return RowStatistics(*found)


def _count(c: int, k: int, name: str) -> int:
    if k == 0:
        raise ValueError(f"{name}: expected at least one class, got K = 0")
    return check_count("c", c, 1, k, high_name="K = ")
