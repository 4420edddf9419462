"""SeTAR's search written plainly, as a reference: nothing is kept, nothing is shared.

Every candidate, the ratio 0 included, gets its weights from ``torch.linalg.svd`` of the original
matrices, both towers run in full on all images and prompts, and the loss comes from
``torch.topk``, batch by batch. Visits are given as a list, so nothing of ``fastood.setar`` is used.

Works in the dtype of the model: open_clip's ViTs and Hugging Face's ``CLIPModel``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RATIOS = (0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40)

Visit = tuple[str, str, "int | None"]
"""Tower ("image", "text"), kind ("q", "k", "v", "o", "up", "down", "proj"), layer."""


class Evaluated(NamedTuple):
    """One candidate."""

    step: int
    tower: str
    kind: str
    layer: int | None
    ratio: float
    loss: float
    cross_entropy: float
    patches: float
    ood_patches: int


class Plain(NamedTuple):
    picks: list[tuple[str, str, int | None, float]]
    """In the order of deciding; ratio 0 where nothing was better."""
    evaluated: list[Evaluated]
    best: Evaluated


def depth(model: Any, tower: str) -> int:
    return len(_blocks(model, tower))


def top_down(model: Any, tower: str, kind: str, *, projection: bool = False) -> list[Visit]:
    """The visits of one tower: its projection if asked for, then last block to first."""
    visits: list[Visit] = [(tower, "proj", None)] if projection else []
    return visits + [(tower, kind, i) for i in reversed(range(depth(model, tower)))]


def plain_search(
    encoder: Any,
    pixels: Tensor,
    labels: Tensor,
    prompts: Sequence[Sequence[str]],
    visits: Sequence[Visit],
    *,
    ratios: Sequence[float] = RATIOS,
    top_k: int,
    weight: float,
    batches: Sequence[int],
    metric: str = "loss",
    exhaustive: bool = False,
    principal: bool = False,
) -> Plain:
    """The greedy search over ``visits``; the best strictly better candidate of a visit is taken.

    Args:
        encoder: open_clip or Hugging Face; it is not changed.
        pixels: (N, 3, H, W); labels: (N,).
        prompts: templates x K.
        batches: sizes, N together: the patch term is averaged in each.
        metric: ``"loss"``, ``"cross_entropy"`` or ``"patches"``, all lower is better.
        exhaustive: every visit tries all that is undecided.
    """
    encoder = copy.deepcopy(encoder)
    model = encoder.model
    taken: dict[Visit, float] = {}
    left = list(dict.fromkeys(visits))
    evaluated: list[Evaluated] = []
    picks: list[tuple[str, str, int | None, float]] = []
    best: Evaluated | None = None
    step = 0
    while left:
        chosen, ratio_chosen = left[0], 0.0
        for visit in list(left) if exhaustive else left[:1]:
            for ratio in ratios:
                with cut(model, {**taken, visit: ratio}, principal=principal):
                    terms = plain_loss(
                        encoder, pixels, labels, prompts, top_k=top_k, weight=weight,
                        batches=batches,
                    )  # fmt: skip
                found = Evaluated(step, *visit, ratio, *terms)
                evaluated.append(found)
                if best is None or getattr(found, metric) < getattr(best, metric):
                    best, chosen, ratio_chosen = found, visit, ratio
        taken[chosen] = ratio_chosen
        picks.append((*chosen, ratio_chosen))
        left.remove(chosen)
        step += 1
    assert best is not None
    return Plain(picks, evaluated, best)


# One candidate


@torch.no_grad()
def plain_loss(
    encoder: Any,
    pixels: Tensor,
    labels: Tensor,
    prompts: Sequence[Sequence[str]],
    *,
    top_k: int,
    weight: float,
    batches: Sequence[int],
) -> tuple[float, float, float, int]:
    """Loss, cross-entropy, patch term and number of OOD patches of the model as it is."""
    text = torch.stack([_unit(encoder.encode_tokens(encoder.tokenize(p))) for p in prompts])
    text = _unit(text.mean(0)) if len(prompts) > 1 else text[0]
    gamma = encoder.model.logit_scale.exp()
    cross_entropy = patches = 0.0
    n_ood = 0
    for x, y in zip(pixels.split(list(batches)), labels.split(list(batches)), strict=True):
        found = encoder.encode_image(x, local=True)
        logits = gamma * _unit(found.image) @ text.T
        local = gamma * _unit(found.local) @ text.T  # (b, P, K)
        ood = ~local.topk(top_k, dim=2).indices.eq(y[:, None, None]).any(2)
        share = len(y) / len(labels)
        cross_entropy += share * float(F.cross_entropy(logits, y))
        n_ood += int(ood.sum())
        if ood.any():
            p = local.softmax(-1)[ood]
            patches += share * float((p * (p + 1e-5).log()).sum(1).mean())
    return cross_entropy + weight * patches, cross_entropy, patches, n_ood


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Weights


@contextmanager
def cut(model: Any, taken: dict[Visit, float], *, principal: bool = False) -> Iterator[None]:
    """The model without these directions, for as long as it lasts."""
    kept = []
    try:
        for visit, ratio in taken.items():
            w = weight_of(model, *visit)
            kept.append((w, w.clone()))
            w.copy_(without(w, ratio, principal=principal))
        yield
    finally:
        for w, old in kept:
            w.copy_(old)


def without(w: Tensor, ratio: float, *, principal: bool = False) -> Tensor:
    """W without its weakest (strongest) directions, round(ratio min(m, n)) of them."""
    r = round(min(w.shape) * ratio)
    if not r:
        return w.clone()
    u, s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    keep = slice(r, None) if principal else slice(0, len(s) - r)
    return u[:, keep] * s[keep] @ vh[keep]


def weight_of(model: Any, tower: str, kind: str, layer: int | None) -> Tensor:
    """(out, in) of one matrix, sharing memory with the parameter."""
    hf = hasattr(model, "vision_model")
    if kind == "proj":
        if hf:
            owner = model.visual_projection if tower == "image" else model.text_projection
            return owner.weight.data
        return (model.visual.proj if tower == "image" else model.text_projection).data.T
    block = _blocks(model, tower)[layer]
    if kind in ("up", "down"):
        one, two = (block.mlp.fc1, block.mlp.fc2) if hf else (block.mlp.c_fc, block.mlp.c_proj)
        return (one if kind == "up" else two).weight.data
    if hf:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return getattr(block.self_attn, names[kind]).weight.data
    if kind == "o":
        return block.attn.out_proj.weight.data
    packed = block.attn.in_proj_weight.data
    return packed.chunk(3)["qkv".index(kind)]


def _blocks(model: Any, tower: str) -> Any:
    if hasattr(model, "vision_model"):
        return (model.vision_model if tower == "image" else model.text_model).encoder.layers
    return (model.visual if tower == "image" else model).transformer.resblocks
