"""Counting right images over a grid of alpha and beta, a block of images at a time.

What each step rests on is told in ``fastood.tuning.tip_grid``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Block", "Cache", "images_at_once"]

_BLOCK, _IMAGES = 1 << 20, (16, 64)
"""Float64 affinities of a block of images, 8 MiB, and the fewest and most images in one: products
are faster for many."""

_CHUNK = 1 << 16
"""Affinities a recurrence works on at a time: three float64 buffers of this stay in the cache."""

_VALUES = 1 << 19
"""Cache values looked at together."""

_PAIRS = 1 << 20
"""Affinities evaluated directly at a time."""

_SERIES = 1e-14
"""Truncation of the series, relative to the largest kernel value of a block."""

_ERROR = 2e-13
"""Error of a difference of logits, relative to the sums it is made of. The series is off by at most
2.2e-15 (worst seen against extended precision, betas up to 60); the rest is room for products that
a library sums in another order, times beta."""

_DELICATE = 1e5
"""Classes within this many errors of the label are not divided by."""


_SLACK = 1e-5 + 1e-9
"""Relative distance of a bound from an alpha below which the pair is evaluated directly: one error
over the ``_DELICATE`` errors that a difference of cosines has at least."""


def images_at_once(images: int, keys: int) -> int:
    """How many of ``images`` a block should have."""
    fewest, most = _IMAGES
    return max(1, min(images, max(fewest, min(most, _BLOCK // max(1, keys)))))


class Cache:
    """Keys ordered so that classes with about as many keys are neighbours, padded to as many."""

    def __init__(self, keys: Tensor, labels: Tensor, k: int, images: int) -> None:
        counts = torch.bincount(labels, minlength=k)
        order = torch.argsort(counts, descending=True, stable=True)
        by_class = torch.argsort(labels, stable=True)
        starts = counts.cumsum(0) - counts
        self.classes = k
        self.largest = int(counts.max()) if k else 0
        self.chunks: list[tuple[Tensor, Tensor, Tensor | None]] = []
        sizes = counts[order].tolist()
        first = 0
        while first < k and sizes[first] > 0:
            width, last = sizes[first], first
            most = max(1, _CHUNK // images // width)
            # padding is at most as long as what is padded
            while last < k and last - first < most and 2 * sizes[last] > width:
                last += 1
            mine = order[first:last]
            slots = torch.arange(width, device=keys.device)
            filled = slots < counts[mine, None]
            index = by_class[torch.where(filled, starts[mine, None] + slots, 0).flatten()]
            begin = int(index[0])
            in_order = torch.equal(
                index, torch.arange(begin, begin + len(index), device=index.device)
            )
            chunk = keys[begin : begin + len(index)] if in_order else keys[index]
            mask = None if bool(filled.all()) else filled.flatten()[:, None].double()
            self.chunks.append((mine, chunk.double(), mask))
            first = last
        self.rows = sum(len(chunk) for _, chunk, _ in self.chunks)


class Block:
    """Some images against everything. Columns are images; d is (rows, I), sums are (K, I)."""

    def __init__(self, z: Tensor, y: Tensor, text: Tensor, cache: Cache, gamma: float) -> None:
        self.cache, self.y = cache, y
        self.logits = gamma * (text @ z.T)
        self.distances = [torch.addmm(z.new_ones(()), rows, z.T, alpha=-1.0)
                          for _, rows, _ in cache.chunks]  # fmt: skip
        self.error = _ERROR * (abs(gamma) + 1.0)
        ends = [d.aminmax() for d in self.distances]
        low = min((float(e.min) for e in ends), default=0.0)
        high = max((float(e.max) for e in ends), default=1.0)
        # rounded outwards, so that most blocks share a series
        self.low = math.floor(low * 32) / 32
        self.high = max(math.ceil(high * 32) / 32, self.low + 1 / 32)

    def count(self, beta: Tensor, alpha: Tensor) -> Tensor:
        low, high, direct = self._bounds(beta, float(alpha.max()))
        order = torch.argsort(alpha)
        ascending = alpha[order].contiguous()
        # alphas are right from the first >= low to the last <= high; both sides of the tolerance
        first = torch.searchsorted(ascending, (low * (1 - _SLACK)).contiguous())
        past = torch.searchsorted(ascending, (high * (1 + _SLACK)).contiguous(), right=True)
        strict_first = torch.searchsorted(ascending, (low * (1 + _SLACK)).contiguous(), right=True)
        strict_past = torch.searchsorted(ascending, (high * (1 - _SLACK)).contiguous())
        direct |= (first != strict_first) | (past != strict_past)
        width = len(alpha) + 1
        cells = torch.arange(len(beta), device=alpha.device)[:, None] * width
        sure = ~direct & (first < past)
        steps = torch.bincount((cells + first)[sure], minlength=len(beta) * width)
        steps -= torch.bincount((cells + past)[sure], minlength=len(beta) * width)
        counts = steps.view(len(beta), width).cumsum(1)[:, :-1]
        found = torch.empty_like(counts)
        found[:, order] = counts
        where = direct.nonzero()
        for pairs in where.split(max(1, _PAIRS // max(1, self.cache.rows + 20 * len(self.logits)))):
            found.index_add_(0, pairs[:, 0], self._direct(beta[pairs[:, 0]], pairs[:, 1], alpha))
        return found

    def _bounds(self, beta: Tensor, most: float) -> tuple[Tensor, Tensor, Tensor]:
        """(betas, I) alphas from and up to which an image is right, and what is too close."""
        images = self.logits.shape[1]
        own = self.y[None]
        ahead = self.logits.gather(0, own) - self.logits  # γ (s_y - s_k)
        # keys that were trained may be longer than 1, and kernel values then larger
        kernel = math.exp(min(700.0, max(0.0, -self.low * float(beta.max()))))
        error = self.error + _ERROR * most * self.cache.largest * kernel
        near = ahead.abs() <= _DELICATE * error
        near.scatter_(0, own, False)
        delicate = near.any(dim=0)
        weights, moments = self._moments(beta)
        moments -= moments.gather(1, own.expand(len(moments), 1, images))
        behind = ahead < -_DELICATE * error
        scale = torch.where(ahead > _DELICATE * error, ahead, math.inf).reciprocal_()
        upper = _largest(weights, moments * scale)  # of (c_k - c_y) / (γ (s_y - s_k)), or 0
        high = upper.clamp_min_(0).reciprocal_()
        low = torch.zeros_like(high)
        lost = (behind.any(dim=0) & ~delicate).nonzero()[:, 0]
        if len(lost):
            # few classes are ahead of the label, for all these images together
            some = behind[:, lost].any(dim=1).nonzero()
            mine = behind[some, lost]
            scale = torch.where(mine, -ahead[some, lost], math.inf).reciprocal_()
            # they have to be overtaken: (c_y - c_k) / (γ (s_k - s_y)) >= 1 / alpha
            gain = -_largest(weights, moments[:, some, lost] * scale, ~mine)
            low[:, lost] = torch.where(gain > 0, gain, 0.0).reciprocal_()
        return low, high, delicate.expand(len(beta), -1).clone()

    def _moments(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """(betas, n) and (n, K, I) whose product is c_k(beta) of every class and image."""
        images = self.logits.shape[1]
        series = _series(tuple(beta.tolist()), self.low, self.high)
        terms = len(beta) if series is None else series.shape[1]
        moments = self.logits.new_zeros(terms, self.cache.classes, images)
        for (mine, _, mask), d in zip(self.cache.chunks, self.distances, strict=True):
            sums = d.new_empty(terms, len(mine), images)
            if series is None:
                for n in range(terms):
                    kernel = torch.exp(d * -beta[n])
                    sums[n] = _class_sums(kernel if mask is None else kernel * mask, len(mine))
            else:
                _chebyshev(d, self.low, self.high, mask, sums)
            moments[:, mine] = sums
        if series is None:
            return torch.eye(terms, dtype=beta.dtype, device=beta.device), moments
        return series.to(beta.device), moments

    def _direct(self, beta: Tensor, images: Tensor, alpha: Tensor) -> Tensor:
        """(pairs, alphas) int64: 1 where the formula itself classifies right."""
        sums = self.logits.new_zeros(self.cache.classes, len(images))
        for (mine, _, mask), d in zip(self.cache.chunks, self.distances, strict=True):
            kernel = torch.exp(d[:, images] * -beta)
            sums[mine] = _class_sums(kernel if mask is None else kernel * mask, len(mine))
        logits, wanted = self.logits[:, images], self.y[images]
        return torch.stack(
            [((logits + sums * a).argmax(dim=0) == wanted).long() for a in alpha], dim=1
        )


def _class_sums(rows: Tensor, classes: int) -> Tensor:
    return rows.view(classes, len(rows) // classes, rows.shape[1]).sum(dim=1)


def _chebyshev(d: Tensor, low: float, high: float, mask: Tensor | None, out: Tensor) -> None:
    """out[n] = ± class sums of T_n(x), x = d mapped from [low, high] to [-1, 1].

    With signs + + - - + + - - the recurrence T_(n+2) = 2x T_(n+1) - T_n adds or subtracts one
    product in place. ``_series`` has the same signs.
    """
    twice = (d - (low + high) / 2).mul_(4 / (high - low))
    before = torch.ones_like(d) if mask is None else mask.expand_as(d).clone()
    now = before * twice * 0.5
    for n in range(len(out)):
        torch.sum(before.view(out.shape[1], -1, d.shape[1]), dim=1, out=out[n])
        before.addcmul_(twice, now, value=1.0 if n % 2 else -1.0)
        before, now = now, before


def _largest(weights: Tensor, moments: Tensor, leave_out: Tensor | None = None) -> Tensor:
    """(betas, I) largest over classes of weights @ moments (n, K, I), some betas at a time."""
    terms, k, images = moments.shape
    flat = moments.reshape(terms, k * images)
    step = max(1, _VALUES // max(1, k * images))
    found = []
    for some in weights.split(step):
        values = (some @ flat).view(len(some), k, images)
        if leave_out is not None:
            values.masked_fill_(leave_out, -math.inf)
        found.append(values.amax(dim=1))
    return torch.cat(found)


@lru_cache(maxsize=32)
def _series(betas: tuple[float, ...], low: float, high: float) -> Tensor | None:
    """(betas, n) Chebyshev coefficients of exp(-beta d) on [low, high], signed as ``_chebyshev``.

    None where the series would be as long as the grid: a beta that large is cheaper directly.
    """
    points = len(betas) + 32
    # angles (2 j + 1) n π / (2 points), reduced as integers: cosines of large angles are not exact
    odd = 2 * torch.arange(points)[:, None] + 1
    angles = ((odd * torch.arange(points)) % (4 * points)).double() * (math.pi / (2 * points))
    d = (low + high) / 2 + (high - low) / 2 * angles[:, 1].cos()
    beta = torch.tensor(betas, dtype=torch.float64)[:, None]
    # relative to the largest value on the interval, exp(-beta low)
    found = torch.exp(-beta * (d - low)) @ angles.cos() * (2 / points)
    found[:, 0] /= 2
    # coefficients fall faster than any power: what is left out is about as large as its first
    large = (found.abs().amax(dim=0) > _SERIES).nonzero()
    terms = int(large[-1]) + 2 if len(large) else 2
    if terms >= len(betas):
        return None
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(terms // 4 + 1)
    return found[:, :terms] * signs[:terms] * torch.exp(-beta * low)
