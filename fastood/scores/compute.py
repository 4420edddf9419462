"""How global scores are computed: which kernel, or the reference, in which blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastood.errors import KernelError
from fastood.kernels.precision import resolve
from fastood.ops import fused, gpu
from fastood.ops.dispatch import Impl, choose, fall_back, operator_precision, refuse_cuda
from fastood.ops.requests import Kind, Request, reference_score
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_finite,
    check_tensor,
    check_width,
    matmul_classes,
    must_check,
    row_blocks,
    unit_rows,
    working,
)

__all__ = [
    "RowScores",
    "Text",
    "by_gpu",
    "check_no_product",
    "cosines",
    "packed_classes",
    "score_rows",
    "unit_features",
]

Text = Tensor | ClassBank


def cosines(
    image: Tensor | None, text: Text | None, similarity: Tensor | None, *, normalize: bool = True
) -> Tensor:
    """(B, K) similarities from whichever of the two forms was given."""
    if similarity is not None:
        if image is not None or text is not None:
            raise ValueError("similarity: give either similarity, or image and text, not both")
        s = check_tensor("similarity", similarity, (2,), "(B, K)")
        check_finite("similarity", s, what="values")
        return working(s)
    if image is None or text is None:
        raise ValueError("expected image and text, or similarity=; one of them is missing")
    if isinstance(text, ClassBank):
        return (text if normalize else text.as_is()).to_classes(image)
    return matmul_classes(*unit_features(image, text, normalize=normalize))


def unit_features(image: Tensor, text: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Checked features of one working dtype, normalised if asked."""
    z = check_features("image", image, (2,), "(B, D)")
    t = check_features("text", text, (2, 3), "(K, D) or (B, K, D)")
    check_width(z, t)
    z, t = working(z), working(t)
    if z.dtype != t.dtype:
        z, t = z.double(), t.double()
    return (unit_rows(z), unit_rows(t)) if normalize else (z, t)


class RowScores(NamedTuple):
    values: Tensor
    """(R, B), one row for each score asked."""
    classes: Tensor | None
    """(B,) int64, the nearest class, if asked."""


def score_rows(
    requests: tuple[Request, ...],
    image: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    *,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
    classes: bool = False,
) -> RowScores:
    """Several global scores: by the kernel in one pass over the classes, or by the reference."""
    if similarity is not None:
        if image is not None or text is not None:
            raise ValueError("similarity: give either similarity, or image and text, not both")
        check_tensor("similarity", similarity, (2,), "(B, K)")
        return _of_similarity(requests, similarity, impl, precision, classes)
    if image is None or text is None:
        raise ValueError("expected image and text, or similarity=; one of them is missing")
    rows = text.text if isinstance(text, ClassBank) else text
    check_tensor("image", image, (2,), "(B, D)")
    check_tensor("text", rows, (2, 3), "(K, D) or (B, K, D)")
    check_width(image, rows)
    k = rows.shape[-2]
    _check_requests(requests, k, "text")
    implementation = choose(impl, image, rows, precision=precision)
    if rows.ndim == 3:
        # classes of their own for every image: K D numbers are read for each row of K cosines
        s = cosines(image, text, None, normalize=normalize)
        given = impl if implementation in ("triton", "cuda") else implementation
        return _of_similarity(requests, s, given, precision, classes)
    if implementation == "reference":
        return _by_reference(requests, image, text, normalize, classes)

    bank = text if isinstance(text, ClassBank) else None
    normalize = normalize and (bank is None or bank.normalize)
    if fused.differentiable(image, rows):
        if implementation == "cuda":
            refuse_cuda(impl, "gradients or graphs")
        if bank is None:
            z, t = unit_features(image, rows, normalize=normalize)
            packed = None
        else:
            z, t = working(check_features("image", image, (2,), "(B, D)")), bank.text
            z = unit_rows(z) if normalize else z
            packed = bank.packed
        on_gpu = implementation == "triton"
        meant = operator_precision(impl, precision, z, t) if on_gpu else ""
        return RowScores(*fused.feature_graph(requests, z, t, packed, meant))
    if implementation in ("triton", "cuda"):
        try:
            return by_gpu(
                requests, image, text, normalize, precision, classes, implementation, "image"
            )
        except KernelError as error:
            fall_back(error, impl, precision)
        return _by_reference(requests, image, text, normalize, classes)
    if bank is None:
        panels = packed_classes(rows, normalize, ("image", image))
    else:
        panels = bank.score_panels
    found = fused.feature_scores(requests, image, panels, k=k, normalize=normalize, classes=classes)
    return RowScores(*found)


def by_gpu(
    requests: tuple[Request, ...],
    image: Tensor,
    text: Text,
    normalize: bool,
    precision: str | None,
    classes: bool,
    engine: Impl,
    name: str,
) -> RowScores:
    prepared = isinstance(text, ClassBank)
    rows = text.text if isinstance(text, ClassBank) else text
    meant = resolve(precision, image) if prepared else resolve(precision, image, rows)
    if must_check(image):
        check_features(name, image, (image.ndim,), "")
        if not prepared:
            check_features("text", rows, (2,), "")
    k, d = rows.shape

    def fused_kernel(some: tuple[Request, ...], nearest: bool) -> RowScores:
        if isinstance(text, ClassBank):
            ready = text.operand(meant)
        else:
            ready = gpu.kernels.operands.prepare(text, meant, normalize=normalize)
        found = gpu.feature_scores(some, image, ready, normalize=normalize, classes=nearest)
        return RowScores(*found)

    def library(some: tuple[Request, ...], nearest: bool) -> RowScores:
        t = working(rows)
        t_halves = gpu.halves(unit_rows(t) if normalize and not prepared else t, meant)
        parts = []
        for block in row_blocks(len(image), k):
            z = working(image[block])
            s = gpu.product(gpu.halves(unit_rows(z) if normalize else z, meant), t_halves)
            parts.append(RowScores(*gpu.similarity_scores(some, s, classes=nearest, engine=engine)))
        return _joined(parts)

    fused_pays = engine == "triton" and gpu.fused_pays("rows", meant, len(image), k, d)
    return _with_many_tops(
        requests,
        classes,
        fused_kernel if fused_pays else library,
        lambda some, nearest: _by_reference(some, image, text, normalize, nearest),
    )


def _with_many_tops(
    requests: tuple[Request, ...],
    classes: bool,
    kernel: Callable[[tuple[Request, ...], bool], RowScores],
    plain: Callable[[tuple[Request, ...], bool], RowScores],
) -> RowScores:
    """By ``kernel``, but what looks at more top values than it holds by ``plain`` torch."""
    few = [r.c <= gpu.MOST_TOPS for r in requests]
    if all(few):
        return kernel(requests, classes)
    many = tuple(r for r, one in zip(requests, few, strict=True) if not one)
    slow = plain(many, classes)
    if not any(few):
        return slow
    rest = tuple(r for r, one in zip(requests, few, strict=True) if one)
    fast = kernel(rest, False)
    by_request = dict(zip(many, slow.values, strict=True)) | dict(
        zip(rest, fast.values, strict=True)
    )
    return RowScores(torch.stack([by_request[r] for r in requests]), slow.classes)


def packed_classes(text: Tensor, normalize: bool, features: tuple[str, Tensor]) -> Tensor:
    """Class features checked, normalised and packed for one call.

    ``features`` and their name: where both are bad, they are the ones to complain of.
    """
    try:
        return fused.score_panels(text, normalize=normalize)
    except ValueError:
        name, x = features
        check_features(name, x, (x.ndim,), "")
        raise


def _by_reference(
    requests: tuple[Request, ...], image: Tensor, text: Text, normalize: bool, classes: bool
) -> RowScores:
    if not isinstance(text, ClassBank):  # once, not for every block
        image, text = unit_features(image, text, normalize=normalize)
        normalize = False
    parts = []
    for block in row_blocks(len(image), len(text)):
        s = cosines(image[block], text, None, normalize=normalize)
        parts.append(_of_similarity(requests, s, "reference", None, classes))
    return _joined(parts)


def _joined(parts: list[RowScores]) -> RowScores:
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts], dim=1)
    nearest = [part.classes for part in parts if part.classes is not None]
    return RowScores(values, torch.cat(nearest) if nearest else None)


def check_no_product(precision: str | None, what: str) -> None:
    """Raise a ValueError if a precision is asked for where no kernel multiplies."""
    if precision not in (None, "fp32"):
        raise ValueError(f"precision: {what}; expected None or 'fp32', got {precision!r}")


def _of_similarity(
    requests: tuple[Request, ...],
    s: Tensor,
    impl: str | None,
    precision: str | None,
    classes: bool,
) -> RowScores:
    _check_requests(requests, s.shape[1], "similarity")
    implementation = choose(impl, s, precision=precision)
    check_no_product(
        precision, "similarities at hand, or of classes (B, K, D), are taken in float32"
    )
    differentiable = fused.differentiable(s)
    if implementation == "cpu" and not differentiable:
        return RowScores(*fused.similarity_scores(requests, s, classes=classes))
    check_finite("similarity", s, what="values")
    if implementation == "cuda" and differentiable:
        refuse_cuda(impl, "gradients or graphs")
    if implementation != "reference" and differentiable:
        return RowScores(*fused.similarity_graph(requests, s))
    if implementation in ("triton", "cuda"):

        def kernel(some: tuple[Request, ...], nearest: bool) -> RowScores:
            found = gpu.similarity_scores(some, s, classes=nearest, engine=implementation)
            return RowScores(*found)

        def plain(some: tuple[Request, ...], nearest: bool) -> RowScores:
            return _plain(some, s, nearest)

        try:
            return _with_many_tops(requests, classes, kernel, plain)
        except KernelError as error:
            fall_back(error, impl, precision)
    return _plain(requests, s, classes)


def _plain(requests: tuple[Request, ...], s: Tensor, classes: bool) -> RowScores:
    s = working(s)
    values = torch.stack([reference_score(r, s) for r in requests])
    return RowScores(values, s.argmax(dim=-1) if classes else None)


def _check_requests(requests: tuple[Request, ...], k: int, name: str) -> None:
    if k == 0:
        raise ValueError(f"{name}: expected at least one class, got K = 0")
    for r in requests:
        if r.kind == Kind.MARGIN and k < 2:
            raise ValueError(f"margin: expected at least two classes, got K = {k}")
        if r.kind == Kind.DELTA_ENERGY:
            check_count("c", r.c, 1, k, high_name="K = ")
