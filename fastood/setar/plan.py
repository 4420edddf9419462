"""Which matrices a search visits, and in what order.

A search is a list of visits. At each visit every candidate ratio of every matrix of the visit is
tried on top of what was accepted before, and at most one is accepted. Towers are searched from
their last block to their first, because what is removed near the output disturbs least.

    image_text     image tower, then text tower (the method; the authors' ``visual_text``)
    text_image     text tower first (``text_visual``)
    image, text    one tower only (``visual_only``, ``text_only``); a Swin has only ``image``
                   (``visual_only_swin``: last stage first)
    interleaved    block by block, image then text; towers of equal depth
                   (``modality_interleaved``)
    exhaustive     at each visit all matrices not yet decided, the best one is decided
                   (``layer_exhaustive``)
    single         one visit to everything: only the best matrix is changed, as LASER does
                   (arXiv 2312.13558)

Source: arXiv 2406.12629, section 3 and the appendix on search algorithms.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastood.errors import ModelError
from fastood.models.matrices import KINDS, Kind, Matrix, Tower, find, list_matrices
from fastood.setar.lowrank import count_of

__all__ = ["ORDERS", "RATIOS", "Candidate", "Plan", "kinds_of", "make_plan"]

RATIOS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40)
"""The authors' candidates."""

ORDERS = ("image_text", "text_image", "image", "text", "interleaved", "exhaustive", "single")

_THEIRS = {
    "visual_text": "image_text",
    "text_visual": "text_image",
    "visual_only": "image",
    "visual_only_swin": "image",
    "text_only": "text",
    "modality_interleaved": "interleaved",
    "layer_exhaustive": "exhaustive",
    "laser": "single",
}

_WEIGHTS = {f"W_{kind}": kind for kind in KINDS} | {"W_p": "proj"}


@dataclass(frozen=True)
class Candidate:
    """A matrix without ``count`` of its singular directions, the share ``ratio`` of them."""

    matrix: Matrix
    ratio: float
    count: int


@dataclass(frozen=True)
class Plan:
    """What a search visits.

    Attributes:
        order: of ``ORDERS``.
        matrices: in the order of the first visit.
        ratios: as given, ascending; 0 is always the alternative and never tried again.
    """

    order: str
    matrices: tuple[Matrix, ...]
    ratios: tuple[float, ...]

    @property
    def visits(self) -> int:
        return 1 if self.order == "single" else len(self.matrices)

    @property
    def towers(self) -> tuple[Tower, ...]:
        return tuple(dict.fromkeys(m.tower for m in self.matrices))

    @property
    def mixed(self) -> bool:
        """Whether towers alternate, so that what is known of both must be kept."""
        return self.order in ("interleaved", "exhaustive", "single") and len(self.towers) > 1

    @property
    def revisits(self) -> bool:
        """Whether matrices are tried more than once."""
        return self.order == "exhaustive"

    def visit(self, decided: Sequence[Matrix]) -> tuple[Matrix, ...]:
        """The matrices of the next visit, ``decided`` being those of the visits before."""
        left = [m for m in self.matrices if m not in decided]
        return tuple(left) if self.order in ("exhaustive", "single") else tuple(left[:1])

    def candidates(self, matrix: Matrix) -> Iterator[Candidate]:
        """Those that change anything, in ascending order; equal numbers of directions once."""
        seen = {0}
        for ratio in self.ratios:
            count = count_of(ratio, min(matrix.shape))
            if count not in seen:
                seen.add(count)
                yield Candidate(matrix, ratio, count)

    @property
    def evaluations(self) -> int:
        """Candidates of the whole search, without the model as it is."""
        number = len(self.matrices)
        times = (number - i for i in range(number)) if self.revisits else [1] * number
        return sum(
            n * len(tuple(self.candidates(m))) for m, n in zip(self.matrices, times, strict=True)
        )

    def describe(self) -> dict[str, Any]:
        """JSON values that decide about the result."""
        return {
            "order": self.order,
            "matrices": [m.address for m in self.matrices],
            "ratios": list(self.ratios),
        }


def make_plan(
    model: nn.Module,
    *,
    order: str = "image_text",
    kinds: Iterable[str] | str = "up",
    ratios: Sequence[float] = RATIOS,
    projections: bool = False,
    layers: Iterable[int] | None = None,
) -> Plan:
    """The visits of a search in ``model``.

    Args:
        order: of ``ORDERS``, or the authors' name of it.
        kinds: of weights, ``"up"`` or ``"W_up"``; the authors search one. Several are visited
            block by block in the order given.
        ratios: shares in [0, 1), or numbers of directions, to drop.
        projections: visit a tower's projection before its blocks (the authors' ``freeze_proj``
            set to false; their interleaved search comes back to it at every block, this one does
            not, because there a later visit silently undoes the first).
        layers: only these blocks, negative ones counted from the last.
    Raises:
        ValueError: unknown orders, kinds or layers; ratios that are no shares, or leave nothing of
            a projection; towers of unequal depth for ``interleaved``.
        ModelError: matrices the model does not have; lists what it has.
    """
    order = _order(order)
    chosen = kinds_of(kinds)
    values = _ratios(ratios)
    towers: tuple[Tower, ...] = ("image", "text")
    if order in ("image", "text"):
        towers = ("image",) if order == "image" else ("text",)
    elif order == "text_image":
        towers = ("text", "image")
    has = {m.tower for m in list_matrices(model)}
    if "image" not in has and "image" in towers:
        raise ModelError(_no_tower(model))
    if "text" in towers and "text" not in has:
        if order not in ("image_text", "single", "exhaustive"):
            raise ModelError(f"order: {type(model).__name__} has no text tower for {order!r}")
        towers = ("image",)  # a classifier
    layers = None if layers is None else tuple(layers)
    runs = [_of_tower(model, tower, chosen, layers, projections) for tower in towers]
    if order == "interleaved":
        ordered = _interleaved(*runs)
    else:
        ordered = [m for run in runs for m in run]
    plan = Plan(order, tuple(ordered), values)
    for matrix in plan.matrices:  # numbers above a matrix are refused now
        try:
            most = max((c.count for c in plan.candidates(matrix)), default=0)
        except ValueError as error:
            raise ValueError(f"ratios: {matrix.address} {matrix.shape}: {error}") from None
        if matrix.kind == "proj" and most == min(matrix.shape):
            raise ValueError(
                f"ratios: {matrix.address} {matrix.shape}: {max(values)} drops all {most} "
                "directions of the projection, so all features would be zero"
            )
    if not plan.evaluations:
        raise ValueError(f"ratios: expected at least one that drops something, got {values}")
    return plan


def kinds_of(kinds: Iterable[str] | str) -> tuple[Kind, ...]:
    """``"W_up"`` or ``"up"`` as a kind of ``fastood.models.matrices``.

    Raises:
        ValueError: a name that is neither, with the nearest.
    """
    found: list[Kind] = []
    for name in (kinds,) if isinstance(kinds, str) else tuple(kinds):
        kind = _WEIGHTS.get(name, name)
        if kind not in KINDS:
            known = (*KINDS, *_WEIGHTS)
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {name!r}{hint}")
        if kind in found:
            raise ValueError(f"kinds: {kind!r} is given twice")
        found.append(kind)
    if not found:
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got none")
    return tuple(found)


def _order(order: str) -> str:
    found = _THEIRS.get(order, order)
    if found not in ORDERS:
        near = difflib.get_close_matches(str(order), (*ORDERS, *_THEIRS), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}{hint}")
    return found


def _ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    if isinstance(ratios, (str, float, int)) or not len(ratios):
        raise ValueError(f"ratios: expected a list of shares in [0, 1), got {ratios!r}")
    for ratio in ratios:
        try:
            count_of(ratio, 2**31)
        except ValueError as error:
            raise ValueError(f"ratios: {error}") from None
    if len({isinstance(r, int) and r != 0 for r in ratios if r != 0}) > 1:
        raise ValueError(f"ratios: expected shares or numbers of directions, got both: {ratios!r}")
    return tuple(sorted(ratios))


def _of_tower(
    model: nn.Module,
    tower: Tower,
    kinds: tuple[Kind, ...],
    layers: tuple[int, ...] | None,
    projections: bool,
) -> list[Matrix]:
    inner = tuple(k for k in kinds if k != "proj")
    found: list[Matrix] = []
    if projections or "proj" in kinds:
        found += find(model, towers=tower, kinds="proj")
    if inner:
        blocks = find(model, towers=tower, kinds=inner, layers=layers)
        found += sorted(blocks, key=lambda m: (-(m.layer or 0), inner.index(m.kind)))
    return found


def _interleaved(image: list[Matrix], text: list[Matrix]) -> list[Matrix]:
    depths = [len({m.layer for m in run if m.layer is not None}) for run in (image, text)]
    if depths[0] != depths[1]:
        raise ValueError(
            f"order: interleaved goes block by block through towers of equal depth, got "
            f"{depths[0]} image and {depths[1]} text blocks; use image_text"
        )
    found = [m for m in (*image, *text) if m.layer is None]
    for layer in sorted({m.layer for m in image if m.layer is not None}, reverse=True):
        found += [m for m in (*image, *text) if m.layer == layer]
    return found


def _no_tower(model: nn.Module) -> str:
    visual = getattr(model, "visual", None)
    kind = type(visual if visual is not None else model).__name__
    return (
        f"model: SeTAR searches the weight matrices of transformers, and the image tower {kind} "
        "has none that can be addressed (ResNets are excluded); use a CLIP with a ViT, or a Swin "
        "classifier"
    )
