"""Global scores through the fused kernels: one call, or one differentiable operator.

Callers have checked types, shapes and options; NaN, Inf and zero rows are found by the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood.ops import loader
from fastood.ops.epilogue import score_of
from fastood.ops.requests import Needs, Request, needs, passes
from fastood.ops.rows import RowStatistics, row_statistics, similarity_statistics

__all__ = [
    "differentiable",
    "feature_graph",
    "feature_scores",
    "pack_text",
    "score_panels",
    "similarity_graph",
    "similarity_scores",
    "splits_text",
    "unit_rows",
]

_HELD = 4  # top values a pass holds at least, as in csrc/bind/rows.h


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through the operators: a gradient is wanted, or a graph."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def unit_rows(rows: Tensor, *, name: str) -> Tensor:
    """``rows (K, D)`` as float32 of unit norm, to the bit as the kernels normalise them.

    Raises:
        ValueError: on NaN, Inf or zero rows.
    """
    return loader.cpu().unit_rows(rows.detach(), name)


def pack_text(text: Tensor, *, normalize: bool, name: str = "text") -> Tensor:
    """``text (K, D)`` in the layout of the kernels.

    Raises:
        ValueError: on NaN, Inf or zero rows.
    """
    return loader.cpu().pack_text(text.detach(), normalize, name)


def splits_text() -> bool:
    """Whether scores go through a matrix unit, which takes classes in a layout of its own."""
    return loader.cpu().splits_text()


def score_panels(text: Tensor, *, normalize: bool, name: str = "text") -> Tensor:
    """``text (K, D)`` as scores take it on this machine: like ``pack_text``, or split into three
    bfloat16 numbers for each.

    Raises:
        ValueError: on NaN, Inf or zero rows.
    """
    module = loader.cpu()
    pack = module.split_text if module.splits_text() else module.pack_text
    return pack(text.detach(), normalize, name)


class _Pass(NamedTuple):
    plan: Any
    of: list[int]
    """Which of the requests."""


@lru_cache(maxsize=256)
def _planned(requests: tuple[Request, ...], module: Any) -> list[_Pass]:
    planned = []
    for of in passes(requests, _HELD):
        part = tuple(requests[i] for i in of)
        wanted = needs(part)
        asked = [(int(r.kind), wanted.taus.index(r.tau), r.c, r.reset, r.flag) for r in part]
        plan = module.Plan(list(wanted.taus), asked, wanted.c, wanted.moments)
        planned.append(_Pass(plan, of))
    return planned


def feature_scores(
    requests: tuple[Request, ...],
    image: Tensor,
    panels: Tensor,
    *,
    k: int,
    normalize: bool,
    classes: bool = False,
    name: str = "image",
    per_row: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """(R, B) scores of ``image (B, D)`` against K packed classes; (B,) nearest classes if asked.

    Raises:
        ValueError: on NaN, Inf or zero rows; it counts ``per_row`` rows as one of ``name``.
    """
    return _call(requests, image.detach(), panels, None, k, normalize, classes, name, per_row)


def similarity_scores(
    requests: tuple[Request, ...],
    similarity: Tensor,
    *,
    classes: bool = False,
    per_row: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """(R, B) scores of given similarities (B, K), and (B,) classes of the largest if asked."""
    return _call(
        requests, None, None, similarity.detach(), 0, False, classes, "similarity", per_row
    )


def _call(requests: tuple[Request, ...], *arguments: Any) -> tuple[Tensor, Tensor | None]:
    module = loader.cpu()
    planned = _planned(requests, module)
    first = module.row_scores(planned[0].plan, *arguments)
    if len(planned) == 1:
        return first
    scores = first[0].new_empty(len(requests), first[0].shape[1])
    scores[planned[0].of] = first[0]
    for plan, of in planned[1:]:
        scores[of] = module.row_scores(plan, *arguments)[0]
    return scores, first[1]


def feature_graph(
    requests: tuple[Request, ...],
    image: Tensor,
    text: Tensor,
    panels: Tensor | None = None,
    precision: str = "",
) -> tuple[Tensor, Tensor]:
    """(R, B) differentiable scores of ``image (B, D)`` and ``text (K, D)`` as they are multiplied,
    and (B,) nearest classes."""

    def statistics(wanted: Needs) -> RowStatistics:
        taus, c, moments = wanted
        return row_statistics(
            image, text, taus=taus, c=c, moments=moments, panels=panels, precision=precision
        )

    return _graph(requests, statistics, text.shape[0])


def similarity_graph(requests: tuple[Request, ...], similarity: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B) differentiable scores of similarities (B, K), and (B,) classes of the largest."""

    def statistics(wanted: Needs) -> RowStatistics:
        taus, c, moments = wanted
        return similarity_statistics(similarity, taus=taus, c=c, moments=moments)

    return _graph(requests, statistics, similarity.shape[1])


def _graph(
    requests: tuple[Request, ...], statistics: Callable[[Needs], RowStatistics], k: int
) -> tuple[Tensor, Tensor]:
    values: dict[int, Tensor] = {}
    classes: list[Tensor] = []
    for of in passes(requests, k):
        wanted = needs(tuple(requests[i] for i in of))
        found = statistics(wanted)
        classes.append(found.classes[:, 0])
        for i in of:
            values[i] = score_of(requests[i], found, wanted.taus, k)
    return torch.stack([values[i] for i in range(len(requests))]), classes[0]
