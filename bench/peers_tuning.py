"""Fine-tuning methods as their papers write them: plain, slow, and an oracle for the tests.

Every step does all of its work anew: text towers over the full context, affinities and one-hot
products in every cell of a grid. Written from the formulas; no code of the authors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
