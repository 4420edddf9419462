"""Row statistics: what every global score is computed from, in one pass and differentiable.

Operators ``row_statistics`` (features against classes) and ``similarity_statistics`` (similarities
at hand) and their backwards. Letters: B images, D width, K classes, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood import reference
from fastood.kernels.precision import Precision
from fastood.ops.gpu import MOST_TOPS, attempt, kernels
from fastood.ops.library import define

__all__ = ["RowStatistics", "row_statistics", "similarity_statistics", "statistics_of"]

_ROWS = 1024  # images at a time in the plain-torch default


class RowStatistics(NamedTuple):
    """The state of each row of similarities s (B, K) after one pass."""

    values: Tensor
    """(B, c) the c largest s, descending."""
    classes: Tensor
    """(B, c) int64, whose they are; equal values in order of class index."""
    rest: Tensor
    """(B, T) float64: log Σ exp((s_k - s(1)) / tau) over all classes but those c; -inf if none."""
    neg_entropy: Tensor
    """(B, T) log K - H(softmax(s / tau)), or (B, 0) if no moments were asked for."""
    variance: Tensor
    """(B, T) population variance over classes of softmax(s / tau), or (B, 0)."""


def row_statistics(
    image: Tensor,
    text: Tensor,
    *,
    taus: Sequence[float],
    c: int = 1,
    moments: bool = False,
    panels: Tensor | None = None,
    precision: str = "",
) -> RowStatistics:
    """One pass over image @ text.T, (B, D) by (K, D), without keeping it.

    Args:
        image, text: float features as they are multiplied (normalised by the caller).
        taus: temperatures, at most 16.
        c: largest values kept, 1 <= c <= K.
        moments: also neg_entropy and variance.
        panels: the packed ``text`` of a prepared bank.
        precision: of the product on a GPU. ``""``: what suits the features, and plain torch if the
            kernel does not compile; a name: that or a ``KernelError``.
    """
    return RowStatistics(
        *torch.ops.fastood.row_statistics(image, text, panels, list(taus), c, moments, precision)
    )


def similarity_statistics(
    similarity: Tensor, *, taus: Sequence[float], c: int = 1, moments: bool = False
) -> RowStatistics:
    """The same of given similarities (B, K)."""
    return RowStatistics(
        *torch.ops.fastood.similarity_statistics(similarity, list(taus), c, moments)
    )


# ------------------------------------------------------------------------------ plain torch


def statistics_of(s: Tensor, taus: Sequence[float], c: int, moments: bool) -> tuple[Tensor, ...]:
    """The five parts of ``RowStatistics`` of similarities (B, K), by autograd differentiable."""
    s = s if s.dtype == torch.float64 else s.float()
    values, index = reference.top(s, c)
    hidden = s.scatter(-1, index, -math.inf)
    rests = []
    for tau in taus:
        if c == s.shape[-1]:
            rests.append(torch.full_like(values[:, 0], -math.inf, dtype=torch.float64))
            continue
        high = hidden.amax(dim=-1, keepdim=True)
        z = ((hidden - high) / tau).double().exp().sum(dim=-1)
        rests.append((high - values[:, :1]).squeeze(-1).double() / tau + z.log())
    rest = torch.stack(rests, dim=1) if taus else s.new_zeros(len(s), 0, dtype=torch.float64)
    if not moments or not taus:
        empty = s.new_zeros(len(s), 0)
        return values, index, rest, empty, empty.clone()
    return (
        values,
        index,
        rest,
        torch.stack([reference.neg_entropy(s, tau) for tau in taus], dim=1),
        torch.stack([reference.variance(s, tau) for tau in taus], dim=1),
    )


def _row_statistics(
    image: Tensor,
    text: Tensor,
    panels: Tensor | None,
    taus: list[float],
    c: int,
    moments: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del panels, precision
    parts = [
        statistics_of(z @ text.to(z.dtype).mT, taus, c, moments)
        for z in (_working(image[i : i + _ROWS]) for i in range(0, max(1, len(image)), _ROWS))
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gradient_rows(
    s: Tensor,
    taus: list[float],
    best: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    index: Tensor,
    tops: Tensor,
) -> Tensor:
    """(B, K) gradient of similarities, see kernels.h."""
    g = torch.zeros_like(s)
    for t, tau in enumerate(taus):
        a, b, e2 = (coefficients[:, t, i, None].to(s.dtype) for i in range(3))
        e = (
            ((s - shift[:, t, None]) / tau).clamp(max=80.0).exp()
        )  # larger only where tops replace it
        g = g + e * (a + b * (s - best[:, None]) / tau + e2 * e)
    return g.scatter(-1, index, tops.to(s.dtype))


def _row_statistics_backward(
    image: Tensor,
    text: Tensor,
    panels: Tensor | None,
    taus: list[float],
    best: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    index: Tensor,
    tops: Tensor,
    image_gradient: bool,
    text_gradient: bool,
) -> tuple[Tensor, Tensor]:
    del panels
    t = _working(text)
    d_image, d_text = t.new_empty(0), t.new_empty(0)
    parts = []
    if text_gradient:
        d_text = torch.zeros_like(t)
    for i in range(0, len(image), _ROWS):
        part = slice(i, i + _ROWS)
        z = _working(image[part]).to(t.dtype)
        g = _gradient_rows(
            z @ t.mT, taus, best[part], shift[part], coefficients[part], index[part], tops[part]
        )
        if image_gradient:
            parts.append(g @ t)
        if text_gradient:
            d_text = d_text + g.mT @ z
    if image_gradient:
        d_image = torch.cat(parts) if parts else t.new_zeros(0, t.shape[1])
    return d_image, d_text


def _similarity_statistics_backward(
    similarity: Tensor,
    taus: list[float],
    best: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    index: Tensor,
    tops: Tensor,
) -> Tensor:
    return _gradient_rows(_working(similarity), taus, best, shift, coefficients, index, tops)


# ------------------------------------------------------------------------------ GPU


def _gpu_row(
    image: Tensor,
    text: Tensor,
    panels: Tensor | None,
    taus: list[float],
    c: int,
    moments: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    def default() -> tuple[Tensor, ...]:
        return _row_statistics(image, text, panels, taus, c, moments)

    def kernel(meant: Precision) -> tuple[Tensor, ...]:
        classes = kernels.operands.prepare(text, meant, normalize=False)
        found = kernels.rows.statistics(image, classes, taus=taus, c=c, moments=moments)
        return _apart(found)

    if c > MOST_TOPS:
        return default()
    return attempt(kernel, default, image, text, precision=precision)


def _apart(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of an operator may not share memory; the two moments may be views of one tensor."""
    *others, entropy, variance = found
    return (*others, entropy, variance.clone())


def _gpu_similarity(
    similarity: Tensor, taus: list[float], c: int, moments: bool
) -> tuple[Tensor, ...]:
    def default() -> tuple[Tensor, ...]:
        return statistics_of(similarity, taus, c, moments)

    def kernel(meant: Precision) -> tuple[Tensor, ...]:
        found = kernels.rows.similarity_statistics(similarity, taus=taus, c=c, moments=moments)
        return _apart(found)

    return default() if c > MOST_TOPS else attempt(kernel, default, similarity)


# ------------------------------------------------------------------------------ shapes


def _fake_outputs(
    b: int, like: Tensor, taus: list[float], c: int, moments: bool
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    t = len(taus) if moments else 0
    return (
        like.new_empty((b, c), dtype=dtype),
        like.new_empty((b, c), dtype=torch.int64),
        like.new_empty((b, len(taus)), dtype=torch.float64),
        like.new_empty((b, t), dtype=dtype),
        like.new_empty((b, t), dtype=dtype),
    )


def _fake_row(
    image: Tensor,
    text: Tensor,
    panels: Any,
    taus: list[float],
    c: int,
    moments: bool,
    precision: str = "",
) -> tuple[Tensor, ...]:
    del text, panels, precision
    return _fake_outputs(image.shape[0], image, taus, c, moments)


def _fake_similarity(
    similarity: Tensor, taus: list[float], c: int, moments: bool
) -> tuple[Tensor, ...]:
    return _fake_outputs(similarity.shape[0], similarity, taus, c, moments)


def _fake_row_backward(image: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    image_gradient, text_gradient = rest[-2:]
    dtype = torch.float64 if text.dtype == torch.float64 else torch.float32
    d_image = text.new_empty(image.shape if image_gradient else (0,), dtype=dtype)
    return d_image, text.new_empty(text.shape if text_gradient else (0,), dtype=dtype)


def _fake_similarity_backward(similarity: Tensor, *rest: Any) -> Tensor:
    del rest
    dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    return similarity.new_empty(similarity.shape, dtype=dtype)


# ------------------------------------------------------------------------------ autograd


class _Gradient(NamedTuple):
    best: Tensor  # (B,)
    shift: Tensor  # (B, T)
    coefficients: Tensor  # (B, T, 3)
    tops: Tensor  # (B, c)


def _gradient_of(
    statistics: RowStatistics, upstream: Sequence[Tensor | None], taus: list[float], k: int
) -> _Gradient:
    """What the backward kernels need, from upstream gradients of the five outputs.

    With E_k = exp((s_k - s(1)) / tau) and p = E / Z:
    d rest / d s_k = E_k exp(-rest) / tau outside the c largest, -1 / tau for the largest;
    d neg_entropy / d s_k = p_k (log p_k + log K - neg_entropy) / tau;
    d variance / d s_k = (2 / K) p_k (p_k - Σ p²) / tau.
    """
    values = statistics.values.double()
    g_values, _, g_rest, g_entropy, g_variance = upstream
    best = values[:, 0]
    tops = torch.zeros_like(values) if g_values is None else g_values.double()
    of_best = torch.zeros_like(best)  # every rest is relative to the largest
    shifts, coefficients = [], []
    for t, tau in enumerate(taus):
        rest = statistics.rest[:, t].double()
        finite = torch.where(torch.isfinite(rest), rest, torch.zeros_like(rest))
        shift = (best + tau * finite).to(statistics.values.dtype)
        offset = (
            shift.double() - best
        ) / tau  # exp((s - s(1)) / tau) = exp((s - shift) / tau + offset)
        a = torch.zeros_like(best)
        b, e2 = torch.zeros_like(best), torch.zeros_like(best)
        if g_rest is not None:
            a = a + g_rest[:, t] / tau * (offset - finite).exp()
            of_best = of_best - g_rest[:, t] / tau
        if statistics.neg_entropy.shape[1] and (g_entropy is not None or g_variance is not None):
            d = (values - best[:, None]) / tau
            log_z = (d.exp().sum(dim=1) + rest.exp()).log()
            share = (offset - log_z).exp()  # p = share * exp((s - shift) / tau)
            p = (d - log_z[:, None]).exp()
            if g_entropy is not None:
                g = g_entropy[:, t].double() / tau
                level = math.log(k) - log_z - statistics.neg_entropy[:, t].double()
                a = a + g * share * level
                b = b + g * share
                tops = tops + g[:, None] * p * (d + level[:, None])
            if g_variance is not None:
                g = g_variance[:, t].double() / tau * (2 / k)
                q = k * statistics.variance[:, t].double() + 1 / k
                a = a - g * share * q
                e2 = e2 + g * share * share
                tops = tops + g[:, None] * p * (p - q[:, None])
        shifts.append(shift)
        coefficients.append(torch.stack([a, b, e2], dim=1))
    tops = torch.cat([tops[:, :1] + of_best[:, None], tops[:, 1:]], dim=1)
    dtype = statistics.values.dtype
    none = statistics.values.new_zeros(len(best), 0)
    return _Gradient(
        statistics.values[:, 0].contiguous(),
        torch.stack(shifts, dim=1) if shifts else none,
        (torch.stack(coefficients, dim=1) if coefficients else none[..., None])
        .to(dtype)
        .contiguous(),
        tops.to(dtype).contiguous(),
    )


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "scores: gradients of gradients need the reference; give impl='reference'"
        )


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, panels, taus, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(image, text, panels, *output)
    ctx.taus = taus


def _backward_row(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    image, text, panels, *output = ctx.saved_tensors
    found = RowStatistics(*output)
    g = _gradient_of(found, upstream, ctx.taus, text.shape[0])
    d_image, d_text = torch.ops.fastood.row_statistics_backward(
        image,
        text,
        panels,
        ctx.taus,
        g.best,
        g.shift,
        g.coefficients,
        found.classes,
        g.tops,
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1],
    )
    return (
        d_image.to(image.dtype) if ctx.needs_input_grad[0] else None,
        d_text.to(text.dtype) if ctx.needs_input_grad[1] else None,
        *(None,) * 5,
    )


def _save_similarity(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    similarity, taus, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(similarity, *output)
    ctx.taus = taus


def _backward_similarity(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    similarity, *output = ctx.saved_tensors
    found = RowStatistics(*output)
    g = _gradient_of(found, upstream, ctx.taus, similarity.shape[1])
    d = torch.ops.fastood.similarity_statistics_backward(
        similarity, ctx.taus, g.best, g.shift, g.coefficients, found.classes, g.tops
    )
    return d.to(similarity.dtype), None, None, None


_OUTPUTS = "(Tensor values, Tensor index, Tensor rest, Tensor neg_entropy, Tensor variance)"
_GRADIENT = (
    "float[] taus, Tensor best, Tensor shift, Tensor coefficients, Tensor index, Tensor tops"
)

define(
    "row_statistics(Tensor image, Tensor text, Tensor? panels, float[] taus, int c, bool moments, "
    f'str precision="") -> {_OUTPUTS}',
    default=_row_statistics,
    fake=_fake_row,
    backward=_backward_row,
    setup_context=_save_row,
    gpu=_gpu_row,
)
define(
    f"similarity_statistics(Tensor similarity, float[] taus, int c, bool moments) -> {_OUTPUTS}",
    default=lambda s, taus, c, moments: statistics_of(s, taus, c, moments),
    fake=_fake_similarity,
    backward=_backward_similarity,
    setup_context=_save_similarity,
    gpu=_gpu_similarity,
)
define(
    f"row_statistics_backward(Tensor image, Tensor text, Tensor? panels, {_GRADIENT},"
    " bool image_gradient, bool text_gradient) -> (Tensor d_image, Tensor d_text)",
    default=_row_statistics_backward,
    fake=_fake_row_backward,
)
define(
    f"similarity_statistics_backward(Tensor similarity, {_GRADIENT}) -> Tensor",
    default=_similarity_statistics_backward,
    fake=_fake_similarity_backward,
)
