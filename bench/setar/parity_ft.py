"""Fine-tuning of ``parity.py``: a few steps of both, and counts of trained numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from fastood.data.imageset import ImageSet
from fastood.models.base import Encoder
from fastood.setar.lowrank import count_of
from fastood.setar.recipe import Recipe as Picks
from fastood.tuning.live import LiveImages
from fastood.tuning.loop import train
from fastood.tuning.lora import LoRA
from fastood.tuning.low_rank_method import LowRankMethod, key_of
from fastood.tuning.recipes import Recipe
from fastood.tuning.setar_ft import SeTARFT

__all__ = ["Tuned", "compare_finetune", "counts", "lines"]

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}

BACKBONES = {
    "clip_base": ("ViT-B/16", {"image": 768, "text": 512}, 2_584_320),
    "clip_large": ("ViT-L/14", {"image": 1024, "text": 768}, 11_700_480),
    "swin_base": ("SwinV2-B", {}, 6_468_480),
}
"""Their configuration, width of the towers' blocks, published number of trained numbers."""


class Tuned(NamedTuple):
    """A few steps, both ways."""

    name: str
    method: str
    steps: int
    trained: int
    losses: tuple[float, float]
    """Theirs before the first and the last step."""
    loss: float
    """Largest difference of a step's loss, or of one of its terms."""
    moved: float
    """How far their training moved a weight at most."""
    weights: float
    """Largest difference of a merged weight."""
    failed: bool


def compare_finetune(
    job: dict[str, Any], folder: Path, encoder: Encoder, images: ImageSet
) -> Tuned:
    """All images in one batch, no augmentation: what ``run_finetune`` did, by fastood's loop."""
    theirs = json.loads((folder / "finetune.json").read_text())
    names = json.loads((folder / "result.json").read_text())["names"]
    options: dict[str, Any] = {
        "weight": job["weight"],
        "top_k": job["top_k"],
        "templates": ["a photo of a {}"],
    }
    method: LowRankMethod
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if job["ft_rank"]:
            method = LoRA(encoder, names, rank=job["ft_rank"], **options)
            start = load_file(folder / "lora_A.safetensors")
            with torch.no_grad():  # theirs are drawn from the global generator
                for matrix in method.matrices:
                    tower = {"image": "vision_model", "text": "text_model"}[matrix.tower]
                    key = f"{tower}.encoder.layers.{matrix.layer}.mlp.fc1"
                    method.A[key_of(matrix)].copy_(start[key])
        else:
            method = SeTARFT(encoder, names, picks=theirs["settings"], **options)
        recipe = Recipe(
            job["ft_steps"],
            job["ft_batch"],
            "sgd",
            job["ft_lr"],
            weight_decay=job["ft_decay"],
            per="step",
            warmup_epochs=0,
        )
        data = LiveImages(encoder, images, needs="pixels", augmentation=None)
        if len(data) != job["ft_batch"]:
            raise ValueError(f"{job['name']}: expected one batch an epoch, got {len(data)} images")
        history = train(method, data, recipe=recipe)
        data.close()
    ours = [epoch["loss"] for epoch in history.epochs]
    logged = [value for _, name, value in theirs["losses"] if name == "train/locoop_loss"]
    loss = max(abs(a - b) for a, b in zip(logged, ours, strict=True))

    before = load_file(folder / "model" / "model.safetensors")
    merged: Any = method.adapted(encoder)
    mine = merged.model.state_dict()
    moved = weights = 0.0
    for name, weight in load_file(folder / "finetuned.safetensors").items():
        if weight.is_floating_point():
            moved = max(moved, float((weight - before[name]).abs().max()))
            weights = max(weights, float((weight - mine[name]).abs().max()))
    limit = TOLERANCE[job["dtype"]]
    return Tuned(
        job["name"],
        method.name,
        len(ours),
        method.trainable,
        (logged[0], logged[-1]),
        loss,
        moved,
        weights,
        loss > limit or weights > limit,
    )


def counts(authors: Path) -> list[tuple[str, int, int]]:
    """Trained numbers of their published configurations: Σ r (in + out), and as published."""
    found = []
    for folder, (name, widths, published) in BACKBONES.items():
        file = authors / "configs" / "finetune" / folder / "ID_ImageNet1K" / "SeTAR+FT.json"
        total = 0
        for pick in Picks.from_lora_settings(file).picks:
            stage = pick.layer[0] if isinstance(pick.layer, tuple) else 0
            width = widths.get(pick.tower, 128 * 2**stage)
            total += count_of(pick.ratio, width) * (width + 4 * width)
        found.append((name, total, published))
    return found


def lines(tuned: list[Tuned], counted: list[tuple[str, int, int]]) -> list[str]:
    """For the table."""
    text = [
        "## Fine-tuning",
        "",
        "`run_finetune` against `train`, merged weights compared; all images in one batch, without",
        "augmentation (set from outside their code), SGD with momentum and a cosine per step. LoRA",
        "starts from their random A.",
        "",
        "| run | method | steps | trained numbers | loss first, last | losses | weights moved "
        "| weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {t.name} | {t.method} | {t.steps} | {t.trained:,} | {t.losses[0]:.5f}, "
        f"{t.losses[1]:.5f} | {t.loss:.1e} | {t.moved:.1e} | {t.weights:.1e} |"
        for t in tuned
    ]
    text += [
        "",
        "Trained numbers of their published picks: "
        + "; ".join(f"{name} {mine:,} (theirs {theirs:,})" for name, mine, theirs in counted)
        + ".",
    ]
    return text
