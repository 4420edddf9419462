"""Global scores through the fused kernels: one call, or one differentiable operator.

Callers have checked types, shapes and options; NaN, Inf and zero rows are found by the kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastood.ops import loader
from fastood.ops.epilogue import score_of
from fastood.ops.requests import Request, needs
from fastood.ops.rows import row_statistics, similarity_statistics

__all__ = [
    "differentiable",
    "feature_graph",
    "feature_scores",
    "pack_text",
    "similarity_graph",
    "similarity_scores",
]

_MAX_TAUS = 16


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through the operators: a gradient is wanted, or a graph."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def pack_text(text: Tensor, *, normalize: bool, name: str = "text") -> Tensor:
    """``text (K, D)`` in the layout of the kernels.

    Raises:
        ValueError: on NaN, Inf or zero rows.
    """
    return loader.cpu().pack_text(text.detach(), normalize, name)


@lru_cache(maxsize=256)
def _plan(requests: tuple[Request, ...], module: Any) -> Any:
    wanted = needs(requests)
    return module.Plan(
        list(wanted.taus),
        [(int(r.kind), wanted.taus.index(r.tau), r.c, r.reset, r.flag) for r in requests],
        wanted.c,
        wanted.moments,
    )


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
    if len(requests) > _MAX_TAUS and len(needs(requests).taus) > _MAX_TAUS:  # more passes then
        half = len(requests) // 2
        first, second = _call(requests[:half], *arguments), _call(requests[half:], *arguments)
        return torch.cat([first[0], second[0]]), first[1]
    scores, classes = module.row_scores(_plan(requests, module), *arguments)
    return scores, classes


def feature_graph(
    requests: tuple[Request, ...], image: Tensor, text: Tensor, panels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(R, B) differentiable scores of ``image (B, D)`` and ``text (K, D)`` as they are multiplied,
    and (B,) nearest classes."""
    taus, c, moments = needs(requests)
    found = row_statistics(image, text, taus=taus, c=c, moments=moments, panels=panels)
    values = torch.stack([score_of(r, found, taus, text.shape[0]) for r in requests])
    return values, found.classes[:, 0]


def similarity_graph(requests: tuple[Request, ...], similarity: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B) differentiable scores of similarities (B, K), and (B,) classes of the largest."""
    taus, c, moments = needs(requests)
    found = similarity_statistics(similarity, taus=taus, c=c, moments=moments)
    values = torch.stack([score_of(r, found, taus, similarity.shape[1]) for r in requests])
    return values, found.classes[:, 0]
