"""Every score once more, from its definition, slowly, in float64: no shared code, no stable forms.

``mpmath``-free: float64 with explicit loops is exact enough to judge float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(image: Tensor, text: Tensor) -> Tensor:
    z, t = image.double(), text.double()
    z = z / z.norm(dim=-1, keepdim=True)
    t = t / t.norm(dim=-1, keepdim=True)
    return z @ t.T


def lse(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1)


def max_similarity(s: Tensor) -> Tensor:
    return s.max(-1).values


def max_softmax(s: Tensor, tau: float) -> Tensor:
    return (s / tau).softmax(-1).max(-1).values


def energy(s: Tensor, tau: float) -> Tensor:
    return tau * lse(s / tau)


def neg_entropy(s: Tensor, tau: float) -> Tensor:
    logp = (s / tau).log_softmax(-1)
    return math.log(s.shape[-1]) + (logp.exp() * logp).sum(-1)


def variance(s: Tensor, tau: float) -> Tensor:
    return (s / tau).softmax(-1).var(-1, unbiased=False)


def margin(s: Tensor) -> Tensor:
    top = s.sort(-1, descending=True).values
    return top[:, 0] - top[:, 1]


def delta_energy(s: Tensor, tau: float, c: int, reset: float, joint: bool) -> Tensor:
    out = []
    for row in s:
        e0 = -lse(row / tau)
        order = sorted(range(len(row)), key=lambda k: (-float(row[k]), k))[:c]
        groups = [order] if joint else [[k] for k in order]
        total = torch.zeros((), dtype=s.dtype)
        for group in groups:
            cropped = row.clone()
            cropped[group] = reset
            total = total + (-lse(cropped / tau)) - e0
        out.append(total)
    return torch.stack(out)


def l_mcm(sl: Tensor, tau: float) -> Tensor:
    return (sl / tau).softmax(-1).flatten(1).max(-1).values


def neg_label(s: Tensor, sn: Tensor, tau: float, groups: list[list[int]]) -> Tensor:
    """The grouped form as published: one softmax per group over all classes and its negatives."""
    parts = []
    for group in groups:
        p = torch.cat([s, sn[:, group]], -1).div(tau).softmax(-1)
        parts.append(p[:, : s.shape[1]].sum(-1))
    return torch.stack(parts).mean(0)


def mahalanobis(x: Tensor, train: Tensor, labels: Tensor, eps: float) -> Tensor:
    x, train = x.double(), train.double()
    classes = labels.unique()
    means = torch.stack([train[labels == k].mean(0) for k in classes])
    cov = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for f, y in zip(train, labels, strict=True):
        d = f - means[(classes == y).nonzero().item()]
        cov += torch.outer(d, d) / len(train)
    inverse = torch.linalg.inv(cov + eps * torch.eye(len(cov), dtype=torch.float64))
    rows = [[-0.5 * (f - m) @ inverse @ (f - m) for m in means] for f in x]
    return torch.stack([torch.stack(r).max() for r in rows])


def knn(x: Tensor, train: Tensor, k: int) -> Tensor:
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    train = train.double() / train.double().norm(dim=-1, keepdim=True)
    return (
        -torch.cdist(x, train, compute_mode="donot_use_mm_for_euclid_dist")
        .sort(-1)
        .values[:, k - 1]
    )


def ebm_loss(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    *,
    tau: float,
    weight: float,
    mask: str,
    keep: float,
    mask_by: str,
    edit: str,
    ce_on: str,
    renorm: bool,
) -> Tensor:
    z = image / image.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    total_ce, total_gap = [], []
    for b in range(len(z)):
        s = t @ z[b]
        y1 = int(s.argmax())
        product = (z[b] * t[y1 if mask_by == "top1" else int(labels[b])]).detach()
        if mask == "sign":
            m = (product > 0).to(z.dtype)
        else:
            m = torch.zeros_like(product)
            m[product.argsort(descending=True, stable=True)[: math.ceil(keep * len(m) - 1e-9)]] = 1
        zm = z[b] * m
        if renorm:
            zm = zm / zm.norm()
        if edit == "top1":
            edited = torch.stack([t[k] @ zm if k == y1 else s[k] for k in range(len(s))])
        else:
            edited = t @ zm
        e0, e2 = -lse(s / tau), -lse(edited / tau)
        total_gap.append(e2 - e0)
        logits = (edited if ce_on == "edited" else s) / tau
        total_ce.append(lse(logits) - logits[labels[b]])
    return torch.stack(total_ce).mean() - weight * torch.stack(total_gap).mean()


def locoop_loss(
    image: Tensor,
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    *,
    tau: float,
    weight: float,
    top_k: int,
) -> Tensor:
    z = image / image.norm(dim=-1, keepdim=True)
    zl = local / local.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    ce = torch.nn.functional.cross_entropy(z @ t.T / tau, labels)
    terms = []
    for b in range(len(z)):
        for patch in zl[b]:
            logits = t @ patch / tau
            if labels[b] not in logits.topk(top_k).indices:
                p = logits.softmax(-1)
                terms.append((p * (p + 1e-5).log()).sum())
    return ce + weight * (torch.stack(terms).mean() if terms else 0.0)
