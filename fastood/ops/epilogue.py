"""From row statistics to scores, differentiably: the few numbers kept of each row are enough.

The same arithmetic as ``csrc/cpu/epilogue.h``, which takes its place where no gradient is asked
for. Everything is relative to the largest similarity and in float64; the result is rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastood import reference
from fastood.ops.requests import Kind, Request
from fastood.ops.rows import RowStatistics

__all__ = ["score_of"]


def score_of(request: Request, found: RowStatistics, taus: tuple[float, ...], k: int) -> Tensor:
    """(B,) in the dtype of ``found.values``; ``taus`` are those the statistics were taken at."""
    kind, tau = request.kind, request.tau
    at = taus.index(tau)
    if kind == Kind.NEG_ENTROPY:
        return found.neg_entropy[:, at]
    if kind == Kind.VARIANCE:
        return found.variance[:, at]
    v, rest = found.values.double(), found.rest[:, at]
    best = v[:, 0]
    if kind == Kind.MAX_SIMILARITY:
        out = best
    elif kind == Kind.MAX_LOGIT:
        out = best / tau
    elif kind == Kind.MAX_SOFTMAX:
        out = _partition(v, rest, tau).reciprocal()
    elif kind == Kind.ENERGY:
        log_z = _partition(v, rest, tau).log()
        out = best / tau + log_z if request.flag else best + tau * log_z
    elif kind == Kind.MARGIN:
        out = best - v[:, 1]
        if request.flag:
            out = -torch.expm1(-out / tau) / _partition(v, rest, tau)
    else:
        # where a similarity equals its reset the change is zero, not the rounding of the reset
        to = found.values.new_full((), request.reset).double()
        out = _delta_energy(request, to, v, rest, k)
    return out.to(found.values.dtype)


def _partition(v: Tensor, rest: Tensor, tau: float) -> Tensor:
    """Σ_k exp((s_k - s(1)) / tau)"""
    return ((v - v[:, :1]) / tau).exp().sum(dim=1) + rest.exp()


def _delta_energy(request: Request, to: Tensor, v: Tensor, rest: Tensor, k: int) -> Tensor:
    tau, c = request.tau, request.c
    own = (v - v[:, :1]) / tau
    others = [rest[:, None]] if v.shape[1] < k else []
    if c < v.shape[1]:  # what is held beyond c belongs to the rest here
        others.append(own[:, c:])
    none_left = not others
    v, own = v[:, :c], own[:, :c]
    gap = (v - to) / tau
    reset = (to - v[:, 0]) / tau
    if request.flag and c > 1:
        together = torch.logsumexp(own, dim=1)
        all_reset = reset + math.log(c)
        if none_left:
            return together - all_reset
        left = torch.logsumexp(torch.cat(others, dim=1), dim=1)
        return reference.softplus_rise(together - left, all_reset - left, together - all_reset)
    if none_left and c == 1:
        return gap[:, 0]
    total = torch.zeros_like(rest)
    for j in range(c):
        beside = [*others, own[:, :j], own[:, j + 1 :]]
        a = torch.logsumexp(torch.cat(beside, dim=1), dim=1)
        total = total + reference.softplus_rise(own[:, j] - a, reset - a, gap[:, j])
    return total
