"""What fastood is compared with: the formulas as people write them, and other libraries.

All take what a user holds: image features of any norm, classes normalised beforehand. ``eager``
is the formula as it reads; ``published`` follows the structure of the authors' code (repeats and
copies included), written anew in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HAVE_PYTORCH_OOD = find_spec("pytorch_ood") is not None
HAVE_SCIKIT_LEARN = find_spec("sklearn") is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with its own code generator; only the graph is captured in smoke mode."""
    from bench.shapes import SMOKE

    return torch.compile(function, backend="eager" if SMOKE else "inductor")


# ------------------------------------------------------------------------------ global scores


def mcm(image: Tensor, text: Tensor, tau: float) -> Tensor:
    s = F.normalize(image, dim=-1) @ text.T
    return F.softmax(s / tau, dim=-1).amax(dim=-1)


def energy(image: Tensor, text: Tensor, tau: float) -> Tensor:
    s = F.normalize(image, dim=-1) @ text.T
    return tau * torch.logsumexp(s / tau, dim=-1)


def delta_energy(image: Tensor, text: Tensor, tau: float, c: int) -> Tensor:
    """Each of the c largest logits set to 0 in turn, the rise of the energy summed."""
    logits = F.normalize(image, dim=-1) @ text.T / tau
    before = torch.logsumexp(logits, dim=-1)
    index = logits.topk(c, dim=-1).indices
    total = torch.zeros_like(before)
    for j in range(c):
        total += before - torch.logsumexp(logits.scatter(1, index[:, j : j + 1], 0.0), dim=-1)
    return total


def all_global(image: Tensor, text: Tensor, taus: tuple[float, ...], c: int) -> Tensor:
    """(R, B): every global score from one product, each by its formula."""
    s = F.normalize(image, dim=-1) @ text.T
    two = s.topk(2, dim=-1).values
    rows = [s.amax(dim=-1), two[:, 0] - two[:, 1]]
    index = s.topk(c, dim=-1).indices
    for tau in taus:
        logits = s / tau
        p = F.softmax(logits, dim=-1)
        lse = torch.logsumexp(logits, dim=-1)
        change = torch.zeros_like(lse)
        for j in range(c):
            change += lse - torch.logsumexp(logits.scatter(1, index[:, j : j + 1], 0.0), dim=-1)
        entropy = (p * p.clamp_min(1e-30).log()).sum(dim=-1) + np.log(s.shape[1])
        variance = p.var(dim=-1, unbiased=False)
        rows += [logits.amax(dim=-1), p.amax(dim=-1), tau * lse, change, entropy, variance]
    return torch.stack(rows)


def pytorch_ood_mcm(text: Tensor, tau: float) -> Callable[[Tensor], Tensor]:
    from pytorch_ood.detector import MCM

    detector = MCM(encoder=None, text_embeddings=text, temperature=tau)
    return lambda image: -detector.predict_features(image)


def pytorch_ood_energy(text: Tensor, tau: float) -> Callable[[Tensor], Tensor]:
    from pytorch_ood.detector import EnergyBased

    detector = EnergyBased(None, t=tau)
    return lambda image: -detector.predict_logits(F.normalize(image, dim=-1) @ text.T)


# ------------------------------------------------------------------------------ negatives


def neg_label(image: Tensor, text: Tensor, negatives: Tensor, groups: int, tau: float) -> Tensor:
    """The closed form; ``negatives`` in group order."""
    z = F.normalize(image, dim=-1)
    positive = torch.logsumexp(z @ text.T / tau, dim=-1)
    grouped = (z @ negatives.T / tau).unflatten(1, (groups, -1))
    return torch.sigmoid(positive[:, None] - torch.logsumexp(grouped, dim=-1)).mean(dim=-1)


def neg_label_published(
    image: Tensor, text: Tensor, negatives: Tensor, groups: int, tau: float
) -> Tensor:
    """A softmax over the classes and one group, for every group (arXiv 2403.20078, its code).

    Negatives come as mined; they are permuted inside every batch, as there.
    """
    z = F.normalize(image, dim=-1)
    positive, negative = z @ text.T, z @ negatives.T
    extra = negative.shape[1] % groups
    if extra:
        negative = negative[:, :-extra]
    order = torch.randperm(negative.shape[1], generator=torch.Generator().manual_seed(0))
    grouped = negative.T[order].T.reshape(len(z), groups, -1).contiguous()
    shares = []
    for g in range(groups):
        p = F.softmax(torch.cat([positive, grouped[:, g]], dim=-1) / tau, dim=-1)
        shares.append(p[:, : text.shape[0]].sum(dim=-1, keepdim=True))
    return torch.cat(shares, dim=-1).mean(dim=-1)


# ------------------------------------------------------------------------------ patches


def gl_mcm(image: Tensor, local: Tensor, text: Tensor, tau: float) -> Tensor:
    whole = F.softmax(F.normalize(image, dim=-1) @ text.T / tau, dim=-1).amax(dim=-1)
    parts = F.softmax(F.normalize(local, dim=-1) @ text.T / tau, dim=-1)
    return whole + parts.amax(dim=(1, 2))


def gl_mcm_published(image: Tensor, local: Tensor, text: Tensor, tau: float) -> Tensor:
    """Both softmaxes copied to numpy, maxima taken there (arXiv 2304.04521, its code)."""
    z = image / image.norm(dim=-1, keepdim=True)
    zl = local / local.norm(dim=-1, keepdim=True)
    whole = F.softmax((z @ text.T) / tau, dim=1).cpu().numpy()
    parts = F.softmax((zl @ text.T) / tau, dim=-1).cpu().numpy()
    return torch.from_numpy(np.max(whole, axis=1) + np.max(parts, axis=(1, 2)))


# ------------------------------------------------------------------------------ losses


def ebm_loss(image: Tensor, text: Tensor, labels: Tensor, tau: float, weight: float) -> Tensor:
    """The energy-bound loss by its formula; energies as two log-sum-exps."""
    z, t = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = z @ t.T / tau
    best = logits.argmax(dim=-1, keepdim=True)
    own = t[best[:, 0]]
    kept = z * (z * own > 0)
    edited = logits.scatter(1, best, (kept * own).sum(dim=-1, keepdim=True) / tau)
    bound = torch.logsumexp(edited, dim=-1) - torch.logsumexp(logits, dim=-1)
    return F.cross_entropy(edited, labels) + weight * bound.mean()


def locoop_loss(
    image: Tensor,
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    tau: float,
    weight: float,
    top_k: int,
) -> Tensor:
    """Cross-entropy and the entropy of patches whose label is outside the top k, as published."""
    z, zl, t = (F.normalize(x, dim=-1) for x in (image, local, text))
    cross_entropy = F.cross_entropy(z @ t.T / tau, labels)
    p = F.softmax((zl @ t.T / tau).flatten(0, 1), dim=-1)
    top = p.topk(top_k, dim=-1).indices
    repeated = labels.repeat_interleave(local.shape[1])
    chosen = p[~(top == repeated[:, None]).any(dim=-1)]
    if len(chosen) == 0:
        return cross_entropy
    entropy = -(chosen * torch.log(chosen + 1e-5)).sum(dim=-1).mean()
    return cross_entropy - weight * entropy


# ------------------------------------------------------------------------------ metrics


def scikit_learn_metrics(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    """The five numbers of ``fastood.metrics.evaluate``, as the field's scripts compute them."""
    from sklearn import metrics

    y = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]
    s = np.r_[id_scores, ood_scores]
    fpr, tpr, _ = metrics.roc_curve(y, s, drop_intermediate=False)
    fpr_ood, tpr_ood, _ = metrics.roc_curve(1 - y, -s, drop_intermediate=False)
    return {
        "AUROC": metrics.roc_auc_score(y, s),
        "AUPR-IN": metrics.average_precision_score(y, s),
        "AUPR-OUT": metrics.average_precision_score(1 - y, -s),
        "FPR95-ID": fpr[np.argmin(np.abs(tpr - 0.95))],
        "FPR95-OOD": fpr_ood[np.argmax(tpr_ood >= 0.95)],
    }


def pytorch_ood_metrics(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    """``OODMetrics``: larger means OOD there, and AUPR is the trapezoid; it adds AUTC."""
    from pytorch_ood.metrics import OODMetrics

    scores = -torch.from_numpy(np.concatenate([id_scores, ood_scores]))
    labels = torch.ones(len(scores), dtype=torch.int64)
    labels[len(id_scores) :] = -1
    found = OODMetrics().update(scores, labels).compute()
    return {**found, "FPR95-OOD": found["FPR95TPR"]}
