"""Attention of packed suffix tokens to a prefix all share and to their own prompt.

With scores s over the P prefix tokens and the tokens of the own suffix up to the query::

    out = (sum_prefix e^(s-m) v + sum_own e^(s-m) v) / (sum_prefix e^(s-m) + sum_own e^(s-m))

The prefix part is one product for all tokens, so prefix keys and values are never copied for each
prompt; the own part runs over prompts of equal length at once; both meet through their maxima and
sums (the log-sum-exp merge of split attention). Backward keeps queries, keys, values, the result
and its log-sum-exp, and computes the probabilities again.

Half-precision inputs are multiplied in float32: gradients of prefix keys and values are sums over
every prompt, which float16 cannot hold under loss scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastood.prompts.packing import Bucket

__all__ = ["attend", "attend_last", "causal"]

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
Buckets = tuple[Bucket, ...]


def attend(qkv: Tensor, prefix: Pair | None, buckets: Buckets) -> Tensor:
    """What every suffix token attends to.

    Args:
        qkv: (B, N, 3, H, E) queries, keys, values of packed suffixes.
        prefix: keys and values (B, H, P, E) all suffixes of one batch element share.
        buckets: prompts by length.
    Returns:
        (B, N, H, E) in the dtype of ``qkv``.
    """
    keys, values = prefix if prefix is not None else (None, None)
    return _Attention.apply(qkv, None, keys, values, buckets)


def attend_last(query: Tensor, kv: Tensor, prefix: Pair | None, buckets: Buckets) -> Tensor:
    """The same for the last token of each suffix: query (B, U, H, E), kv (B, N, 2, H, E)."""
    keys, values = prefix if prefix is not None else (None, None)
    return _Attention.apply(query, kv, keys, values, buckets)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ordinary causal attention of (B, H, P, E), for the prefix itself."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v


def _spans(
    buckets: Buckets, last: bool
) -> Iterator[tuple[slice, slice, tuple[int, int], tuple[int, int]]]:
    """For each bucket its keys, its queries, and how they unfold into (prompts, tokens)."""
    tokens = prompts = 0
    for count, length in buckets:
        own = slice(tokens, tokens + count * length)
        asked = slice(prompts, prompts + count) if last else own
        yield own, asked, (count, length), (count, 1 if last else length)
        tokens, prompts = own.stop, prompts + count


def _split(q: Tensor, kv: Tensor | None) -> Triple:
    """Queries, keys and values (B, N, H, E)."""
    if kv is None:
        query, key, value = q.unbind(2)
    else:
        query, (key, value) = q, kv.unbind(2)
    return query, key, value


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _by_head(x: Tensor, span: slice, fold: tuple[int, int]) -> Tensor:
    """(B, prompts, H, tokens, E) of one bucket."""
    return x[:, span].unflatten(1, fold).transpose(2, 3)


def _rows(x: Tensor, span: slice, fold: tuple[int, int]) -> Tensor:
    """(B, H, N) → (B, prompts, H, tokens) of one bucket."""
    return x[:, :, span].unflatten(2, fold).transpose(1, 2)


def _later(buckets: Buckets, device: torch.device) -> Tensor:
    longest = max((b.length for b in buckets), default=0)
    return torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix: Pair | None, buckets: Buckets, last: bool
) -> tuple[Tensor, Tensor]:
    """Result (B, N, H, E) and log-sum-exp (B, H, N) of the scores; q is scaled already."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    later = _later(buckets, q.device)
    if prefix is not None:
        pk, pv = prefix
        scores = q.transpose(1, 2) @ pk.transpose(-1, -2)  # (B, H, N, P)
        top = scores.amax(dim=-1)
        scores = scores.sub_(top[..., None]).exp_()
        mass = scores.sum(dim=-1)
        part = (scores @ pv).transpose(1, 2)  # (B, N, H, E)
        del scores
    for own, asked, fold, fold_q in _spans(buckets, last):
        scores = _by_head(q, asked, fold_q) @ _by_head(k, own, fold).transpose(-1, -2)
        if not last and fold[1] > 1:
            scores = scores.masked_fill_(later[: fold[1], : fold[1]], float("-inf"))
        high = scores.amax(dim=-1)  # (B, prompts, H, tokens)
        if prefix is not None:
            of_prefix = _rows(top, asked, fold_q)
            high = torch.maximum(high, of_prefix)
        scores = scores.sub_(high[..., None]).exp_()
        total = scores.sum(dim=-1)
        result = scores @ _by_head(v, own, fold)
        if prefix is not None:
            share = (of_prefix - high).exp_()
            total = total + share * _rows(mass, asked, fold_q)
            result = result + share[..., None] * _by_head(part, asked, fold_q)
        result = result / total[..., None]
        _by_head(out, asked, fold_q).copy_(result)
        _rows(lse, asked, fold_q).copy_(high + total.log())
    return out, lse


def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, inputs: Triple, prefix: Pair | None, buckets: Buckets,
    last: bool, into: Triple, scale: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of queries, keys and values go ``into``; those of the prefix are returned.

    q is scaled, its gradient is that of the unscaled queries.
    """
    (q, k, v), (dq, dk, dv) = inputs, into
    delta = (grad * out).sum(dim=-1).transpose(1, 2)  # (B, H, N)
    later = _later(buckets, q.device)
    by_prefix = dpk = dpv = None
    if prefix is not None:
        pk, pv = prefix
        asked_by, wanted = q.transpose(1, 2), grad.transpose(1, 2)
        p = (asked_by @ pk.transpose(-1, -2)).sub_(lse[..., None]).exp_()
        dpv = p.transpose(-1, -2) @ wanted
        p = (wanted @ pv.transpose(-1, -2)).sub_(delta[..., None]).mul_(p)
        dpk = p.transpose(-1, -2) @ asked_by
        by_prefix = (p @ pk).transpose(1, 2)
        del p
    for own, asked, fold, fold_q in _spans(buckets, last):
        qb, kb, vb = _by_head(q, asked, fold_q), _by_head(k, own, fold), _by_head(v, own, fold)
        gb = _by_head(grad, asked, fold_q)
        scores = qb @ kb.transpose(-1, -2)
        if not last and fold[1] > 1:
            scores = scores.masked_fill_(later[: fold[1], : fold[1]], float("-inf"))
        p = scores.sub_(_rows(lse, asked, fold_q)[..., None]).exp_()
        _by_head(dv, own, fold).copy_(p.transpose(-1, -2) @ gb)
        of = _rows(delta, asked, fold_q)[..., None]
        p = (gb @ vb.transpose(-1, -2)).sub_(of).mul_(p)
        _by_head(dk, own, fold).copy_(p.transpose(-1, -2) @ qb)
        own_part = p @ kb
        if by_prefix is not None:
            own_part = own_part.add_(_by_head(by_prefix, asked, fold_q))
        _by_head(dq, asked, fold_q).copy_(own_part.mul_(scale))
    return dpk, dpv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor | None,
        pk: Tensor | None,
        pv: Tensor | None,
        buckets: Buckets,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            query, key, value = (_wide(x) for x in _split(q, kv))
            scale = query.shape[-1] ** -0.5
            prefix = None if pk is None or pv is None else (_wide(pk), _wide(pv))
            out, lse = _forward(query * scale, key, value, prefix, buckets, kv is not None)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, pk, pv, out, lse)
        ctx.buckets, ctx.scale = buckets, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, kv, pk, pv, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            query, key, value = (_wide(x) for x in _split(q, kv))
            dq, dkv = torch.empty_like(q), None if kv is None else torch.empty_like(kv)
            prefix = None if pk is None or pv is None else (_wide(pk), _wide(pv))
            dpk, dpv = _backward(
                _wide(grad), _wide(out), lse, (query * ctx.scale, key, value), prefix, ctx.buckets,
                kv is not None, _split(dq, dkv), ctx.scale,
            )  # fmt: skip
        return dq, dkv, dpk, dpv, None
