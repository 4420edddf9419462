"""Fine-tuning methods as their papers write them: plain, slow, and an oracle for the tests.

Every step does all of its work anew: text towers over the full context, affinities and one-hot
products in every cell of a grid. Written from the formulas; no code of the authors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------ Tip-Adapter


def tip_logits(
    z: Tensor, text: Tensor, keys: Tensor, one_hot: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """γ z T' + alpha exp(-beta (1 - z Keys')) Y for unit rows; Y dense (M, K). arXiv 2207.09519."""
    affinity = z @ keys.T
    cache = torch.exp(-(beta - beta * affinity)) @ one_hot
    return gamma * z @ text.T + alpha * cache


def tip_grid(
    z: Tensor,
    labels: Tensor,
    text: Tensor,
    keys: Tensor,
    one_hot: Tensor,
    cells: Iterable[tuple[float, float]],
    gamma: float = 100.0,
) -> list[int]:
    """Images right in each (beta, alpha): both products anew in every cell, as published."""
    return [
        int((tip_logits(z, text, keys, one_hot, a, b, gamma).argmax(dim=-1) == labels).sum())
        for b, a in cells
    ]


def tip_f_losses(
    z: Tensor,
    labels: Tensor,
    text: Tensor,
    keys: Tensor,
    one_hot: Tensor,
    batches: Sequence[Tensor],
    *,
    alpha: float,
    beta: float,
    gamma: float = 100.0,
    lr: float = 1e-3,
    eps: float = 1e-4,
) -> list[float]:
    """Losses of Tip-Adapter-F: AdamW on the keys, cosine schedule over the steps."""
    trained = keys.clone().requires_grad_()
    optimizer = torch.optim.AdamW([trained], lr=lr, eps=eps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    losses = []
    for index in batches:
        logits = tip_logits(z[index], text, trained, one_hot, alpha, beta, gamma)
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


# ------------------------------------------------------------------------------ prompt learning


class PlainPrompts:
    """``[v1 .. vM] [name].`` through an open_clip ``CLIP`` of the full context length.

    Args:
        model: with ``token_embedding``, ``transformer``, ``ln_final``, ``text_projection``.
        tokens: (K, L) of ``X X X name.``, M placeholders after the start token.
        n_ctx: M.
    """

    def __init__(self, model: Any, tokens: Tensor, n_ctx: int) -> None:
        self.model, self.ends = model, tokens.argmax(dim=-1)
        with torch.no_grad():
            vectors = model.token_embedding(tokens)
        self.before, self.after = vectors[:, :1], vectors[:, 1 + n_ctx :]

    def __call__(self, context: Tensor) -> Tensor:
        """Context (M, W) → (K, D) text features, every position of every prompt computed."""
        model, k = self.model, len(self.before)
        x = torch.cat([self.before, context.expand(k, -1, -1), self.after], dim=1)
        x = x + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        return x[torch.arange(k), self.ends] @ model.text_projection


def coop_loss(text: Tensor, image: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Cross-entropy of γ cos(image, text). arXiv 2109.01134."""
    logits = gamma * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return F.cross_entropy(logits, labels)


def locoop_loss(
    text: Tensor,
    image: Tensor,
    local: Tensor,
    labels: Tensor,
    gamma: float,
    weight: float,
    top_k: int,
) -> Tensor:
    """CoOp's loss + weight · mean over OOD patches of Σ_k p log(p + 1e-5). arXiv 2306.01293."""
    logits = gamma * F.normalize(local, dim=-1) @ F.normalize(text, dim=-1).T
    best = logits.topk(top_k, dim=-1).indices
    ood = ~(best == labels[:, None, None]).any(dim=-1)
    p = logits[ood].softmax(dim=-1)
    term = (p * (p + 1e-5).log()).sum(dim=-1)
    return coop_loss(text, image, labels, gamma) + (weight * term.mean() if len(term) else 0.0)


def ebm_loss(text: Tensor, image: Tensor, labels: Tensor, gamma: float, weight: float) -> Tensor:
    """CE of edited logits + weight · mean(E0 - E2), sign mask, top-1 edit. arXiv 2510.11296."""
    z, t = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = gamma * z @ t.T
    best = logits.argmax(dim=-1)
    masked = z * (z * t[best].detach() > 0)
    edited = logits.clone()
    edited[torch.arange(len(z)), best] = gamma * (masked * t[best]).sum(dim=-1)
    energy, after = -logits.logsumexp(dim=-1), -edited.logsumexp(dim=-1)
    return F.cross_entropy(edited, labels) + weight * (energy - after).mean()


def cocoop_loss(
    prompts: PlainPrompts,
    context: Tensor,
    meta: Sequence[Tensor],
    image: Tensor,
    labels: Tensor,
    gamma: float,
) -> Tensor:
    """Prompts of its own for each image, one image after the other. arXiv 2203.05557."""
    w1, b1, w2, b2 = meta
    rows = []
    for z in F.normalize(image, dim=-1):
        shift = F.relu(z @ w1.T + b1) @ w2.T + b2
        rows.append(gamma * z @ F.normalize(prompts(context + shift), dim=-1).T)
    return F.cross_entropy(torch.stack(rows), labels)


def clip_adapter_loss(
    text: Tensor,
    weights: Sequence[Tensor],
    image: Tensor,
    labels: Tensor,
    gamma: float,
    ratio: float,
) -> Tensor:
    """CE of norm(ratio · relu(W2 relu(W1 f)) + (1 - ratio) f) with fixed unit text, f raw."""
    w1, w2 = weights
    moved = F.relu(F.relu(image @ w1.T) @ w2.T)
    z = F.normalize(ratio * moved + (1 - ratio) * image, dim=-1)
    return F.cross_entropy(gamma * z @ text.T, labels)


def sgd_losses(
    parameters: Sequence[Tensor],
    steps: Sequence[Callable[[], Tensor]],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> list[float]:
    """The losses of SGD steps with momentum and L2 term at a constant rate."""
    velocity = [torch.zeros_like(p) for p in parameters]
    losses = []
    for step, loss_of in enumerate(steps):
        loss = loss_of()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(parameters))
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                g = g + weight_decay * p
                v.copy_(momentum * v + g if step else g)
                p.sub_(lr * v)
    return losses


# ------------------------------------------------------------------------ the whole text tower


def plain_text_features(model: Any, embeddings: Tensor, ends: Tensor) -> Tensor:
    """(K, D) features of prompts given as token embeddings (K, L, W), every position computed.

    ``model`` is an open_clip ``CLIP``; ``ends`` (K,) are the positions of the end-of-text tokens.
    """
    dtype = model.transformer.get_cast_dtype()
    x = embeddings.to(dtype) + model.positional_embedding.to(dtype)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(x), device=x.device), ends] @ model.text_projection


def plain_prompts(model: Any, tokens: Tensor, at: Tensor, context: Tensor) -> Tensor:
    """(K, L, W) token embeddings with the context (n_ctx, W) or (K, n_ctx, W) in place.

    ``tokens`` (K, L); ``at`` (K, L) is the row of the context at each position, -1 for a word.
    """
    with torch.no_grad():
        words = model.token_embedding(tokens)
    if context.ndim == 2:
        context = context.expand(len(tokens), -1, -1)
    rows = context.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, context.shape[-1]))
    return torch.where((at >= 0)[..., None], rows, words)
