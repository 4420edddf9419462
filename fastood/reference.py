"""What every score computes, in plain torch: the specification the kernels are held to.

Functions take cosine similarities, not features, and neither validate nor normalise: that is the
business of ``fastood.scores``. Letters: B images, K classes, P patches, G groups. Every function
works on any device, is differentiable, computes in the dtype it is given (callers pass float32 or
float64) and returns one number per image, **higher = more in-distribution**.

Two habits keep float32 honest. Rows are shifted by their maximum *before* the division by tau, so
that what is rounded is a difference, not a logit of 30. And nothing is obtained by subtracting a
large part from a sum: the mass outside the top classes is added up without them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond this |logit - mean| expm1 loses its advantage and, further out, overflows float32.
_CENTRED_RANGE = 20.0

_FEW = 8
"""Up to this many top classes are found one after the other."""


def top(s: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """The c largest of each row ``(B, K)``, descending; equal values in order of class index.

    ``torch.topk`` promises no order among equals, a stable sort does but costs 15 passes; a few
    maxima in turn (each documented to be the first of its equals) cost c.
    """
    if c == 1:
        values, index = s.max(dim=-1, keepdim=True)
        return values, index
    left = s.detach()
    if c > _FEW:
        index = left.argsort(dim=-1, descending=True, stable=True)[..., :c]
        return s.gather(-1, index), index
    found = []
    for _ in range(c):
        found.append(left.argmax(dim=-1, keepdim=True))
        left = left.scatter(-1, found[-1], -math.inf)
    index = torch.cat(found, dim=-1)
    return s.gather(-1, index), index


def logsumexp(x: Tensor) -> Tensor:
    """log Σ exp over the last axis, ``-inf`` entries allowed if one is finite.

    ``torch.logsumexp`` takes several times a softmax on CPU; this does not.
    """
    m = x.detach().amax(dim=-1, keepdim=True)
    return m.squeeze(-1) + (x - m).exp().sum(dim=-1).log()


def _shifted(s: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(s(1), (s - s(1)) / tau)"""
    best = s.amax(dim=-1, keepdim=True)
    return best.squeeze(-1), (s - best) / tau


def max_similarity(s: Tensor) -> Tensor:
    return s.max(dim=-1).values


def max_softmax(s: Tensor, tau: float) -> Tensor:
    """S_MCM and S_MSP: 1 / Σ_k exp((s_k - s(1)) / tau)."""
    _, d = _shifted(s, tau)
    return d.exp().sum(dim=-1).reciprocal()


def energy(s: Tensor, tau: float, *, unit: bool) -> Tensor:
    best, d = _shifted(s, tau)
    log_z = d.exp().sum(dim=-1).log()
    return best / tau + log_z if unit else best + tau * log_z


def neg_entropy(s: Tensor, tau: float) -> Tensor:
    """log K - H(softmax(s / tau)), free of the cancellation between the two."""
    u, far, d = _centred(s, tau)
    e = torch.expm1(u)
    m = e.mean(dim=-1)
    near = (u.mean(dim=-1) + (u * e).mean(dim=-1)) / (1 + m) - torch.log1p(m)
    z = d.exp().sum(dim=-1)
    peaked = math.log(s.shape[-1]) - z.log() + (d.exp() * d).sum(dim=-1) / z
    return torch.where(far, peaked, near)


def variance(s: Tensor, tau: float) -> Tensor:
    """Population variance over classes of softmax(s / tau)."""
    k = s.shape[-1]
    u, far, d = _centred(s, tau)
    e = torch.expm1(u)
    m = e.mean(dim=-1, keepdim=True)
    near = (e - m).square().mean(dim=-1) / (k * (1 + m.squeeze(-1))).square()
    p = d.exp() / d.exp().sum(dim=-1, keepdim=True)
    return torch.where(far, (p - 1 / k).square().mean(dim=-1), near)


def _centred(s: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logits minus their mean, rows too wide for that form, logits minus their maximum)."""
    _, d = _shifted(s, tau)
    # mean(s) is taken off the cosines, where float32 still resolves it, not off the logits
    u = (s - s.mean(dim=-1, keepdim=True)) / tau
    far = u.detach().abs().amax(dim=-1) > _CENTRED_RANGE
    # torch.where evaluates both sides: keep the unused one, and its gradient, finite
    return torch.where(far[..., None], torch.zeros_like(u), u), far, d


def margin(s: Tensor, tau: float | None) -> Tensor:
    """s(1) - s(2), or the difference of their softmax probabilities at tau."""
    values, _ = top(s, 2)
    if tau is None:
        return values[..., 0] - values[..., 1]
    gap = (values[..., 1] - values[..., 0]) / tau
    return -torch.expm1(gap) * max_softmax(s, tau)


def delta_energy(s: Tensor, tau: float, c: int, reset: float, *, joint: bool) -> Tensor:
    """Σ_j [softplus(l_j - a_j) - softplus(r/tau - a_j)], a_j = lse of every class but the j-th.

    ``a_j`` never comes from a subtraction. Without the largest class it is a log-sum-exp of its
    own; without any other the sum still holds the largest term, so adding up what lies before,
    behind and below j is safe.
    """
    k = s.shape[-1]
    values, index = top(s, c)
    best = values[..., :1].detach()  # any shift will do: a constant keeps the gradient short
    d = (s - best) / tau
    tops = (values - best) / tau
    r = (reset - best) / tau
    gap = (values - reset) / tau
    below = d.masked_fill(torch.zeros_like(d, dtype=torch.bool).scatter(-1, index, True), -math.inf)

    if joint and c > 1:
        together = logsumexp(tops)
        r = r.squeeze(-1) + math.log(c)
        near = gap.detach().abs().amax(dim=-1) <= 1
        small = torch.where(near[..., None], gap, torch.zeros_like(gap))
        # log of the mean of exp(gap_j)
        gap = torch.where(near, torch.log1p(torch.expm1(small).mean(dim=-1)), together - r)
        if c == k:  # no class is left: a = -inf, and each softplus is its argument
            return gap
        a = logsumexp(below)
        return softplus_rise(together - a, r - a, gap)

    if k == 1:
        return gap[..., 0]
    without_best = d.masked_fill(
        torch.zeros_like(d, dtype=torch.bool).scatter(-1, index[..., :1], True), -math.inf
    )
    a = logsumexp(without_best)[..., None]
    if c > 1:
        e = tops.exp()
        before = F.pad(e[..., :-1].cumsum(dim=-1), (1, 0))
        behind = F.pad(e[..., 1:].flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
        rest = below.exp().sum(dim=-1, keepdim=True)
        a = torch.cat([a, (before + behind + rest)[..., 1:].log()], dim=-1)
    return softplus_rise(tops - a, r - a, gap).sum(dim=-1)


def softplus_rise(x: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    """softplus(x) - softplus(y) for x = y + gap, to the last digits also where x is close to y."""
    near = gap.detach().abs() <= 1
    small = torch.where(near, gap, torch.zeros_like(gap))
    close = torch.log1p(torch.sigmoid(y) * torch.expm1(small))
    return torch.where(near, close, F.softplus(x) - F.softplus(y))


def l_mcm(s_local: Tensor, tau: float) -> Tensor:
    """max over patches of the largest softmax probability; ``s_local (B, P, K)``."""
    return max_softmax(s_local, tau).amax(dim=-1)


def neg_label(s: Tensor, s_negatives: Tensor, tau: float) -> Tensor:
    """mean_g sigmoid(lse(l) - lse(n_g)); ``s_negatives (B, G, M/G)``, padding is ``-inf``."""
    best = s.detach().amax(dim=-1, keepdim=True)
    positive = logsumexp((s - best) / tau)
    negative = logsumexp((s_negatives - best[..., None]) / tau)
    return torch.sigmoid(positive[..., None] - negative).mean(dim=-1)
