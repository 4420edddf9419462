"""A global score as a value: which one, at which temperature, with which options.

What the fused kernels, the differentiable epilogues and the reference all take, so that a set of
scores is asked for once, in one pass.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from fastood import reference

__all__ = ["MAX_TAUS", "Kind", "Needs", "Request", "needs", "passes", "reference_score"]

MAX_TAUS = 16
"""Temperatures of one pass, as in ``csrc/cpu/kernels.h``."""


class Kind(IntEnum):
    """The order of ``Score`` in ``csrc/cpu/kernels.h``."""

    MAX_SIMILARITY = 0
    MAX_LOGIT = 1
    MAX_SOFTMAX = 2
    ENERGY = 3
    NEG_ENTROPY = 4
    VARIANCE = 5
    MARGIN = 6
    DELTA_ENERGY = 7


class Request(NamedTuple):
    """One score of a row of similarities."""

    kind: Kind
    tau: float = 1.0
    c: int = 1
    """Top values it looks at: classes reset by delta_energy, 2 for the margin."""
    reset: float = 0.0
    flag: bool = False
    """energy: in units of logits; margin: of probabilities; delta_energy: joint."""


class Needs(NamedTuple):
    """What one pass has to keep for some requests."""

    taus: tuple[float, ...]
    c: int
    moments: bool


def needs(requests: tuple[Request, ...]) -> Needs:
    return Needs(
        tuple(dict.fromkeys(r.tau for r in requests)),
        max(
            [1, *[r.c for r in requests]]
        ),  # lists: torch.compile before 2.12 trips over generators
        any([r.kind in (Kind.NEG_ENTROPY, Kind.VARIANCE) for r in requests]),  # noqa: C419
    )


def passes(requests: tuple[Request, ...], held: int) -> list[list[int]]:
    """Numbers of the requests that share a pass over the classes: up to 16 temperatures, and as
    many top values if more than ``held``.

    How many values are held decides how the others are summed, and so the last digit of a score;
    it must not depend on what else is asked.
    """
    found: list[list[int]] = []
    current: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        count = max(request.c, held)
        together = current.get(count)
        taus = {requests[j].tau for j in together or ()} | {request.tau}
        if together is None or len(taus) > MAX_TAUS:
            together = current[count] = []
            found.append(together)
        together.append(i)
    return found


def reference_score(request: Request, s: Tensor) -> Tensor:
    """(B,) of similarities ``s (B, K)`` in plain torch."""
    kind, tau, c, reset, flag = request
    if kind == Kind.MAX_SIMILARITY:
        return reference.max_similarity(s)
    if kind == Kind.MAX_LOGIT:
        return reference.max_similarity(s) / tau
    if kind == Kind.MAX_SOFTMAX:
        return reference.max_softmax(s, tau)
    if kind == Kind.ENERGY:
        return reference.energy(s, tau, unit=flag)
    if kind == Kind.NEG_ENTROPY:
        return reference.neg_entropy(s, tau)
    if kind == Kind.VARIANCE:
        return reference.variance(s, tau)
    if kind == Kind.MARGIN:
        return reference.margin(s, tau if flag else None)
    return reference.delta_energy(s, tau, c, reset, joint=flag)
