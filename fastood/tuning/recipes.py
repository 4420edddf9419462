"""The published recipes: how long, how fast and in which batches each method is trained.

Every number here is from the authors' papers or configuration files, or marked as unverified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastood.scores.inputs import check_count

__all__ = [
    "LOCOOP_TOP_K",
    "RECIPES",
    "Recipe",
    "default_top_k",
    "epochs_of_coop",
]


@dataclass(frozen=True)
class Recipe:
    """How a method is trained; ``dataclasses.replace`` changes a number.

    Attributes:
        epochs: passes over the training images; 0 for what needs no training.
        batch_size: images per step, of all processes together.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: the largest learning rate.
        momentum: of SGD.
        weight_decay: L2 term of SGD, decoupled decay of AdamW.
        eps: of AdamW.
        schedule: ``"cosine"`` down to 0 over all epochs, or ``"constant"``.
        per: whether the schedule moves after every epoch or every step.
        warmup_epochs: epochs at the constant ``warmup_lr`` before the schedule.
        source: where the numbers are from, and what of them is unverified.
    Raises:
        ValueError: numbers out of range or unknown words.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    eps: float = 1e-8
    schedule: Literal["cosine", "constant"] = "cosine"
    per: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    source: str = ""

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 0, None)
        check_count("batch_size", self.batch_size, 1, None)
        check_count("warmup_epochs", self.warmup_epochs, 0, None)
        _one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        _one_of("schedule", self.schedule, ("cosine", "constant"))
        _one_of("per", self.per, ("epoch", "step"))
        _in_range("lr", self.lr, above=0.0)
        _in_range("momentum", self.momentum, least=0.0, below=1.0)
        _in_range("weight_decay", self.weight_decay, least=0.0)
        _in_range("eps", self.eps, above=0.0)
        _in_range("warmup_lr", self.warmup_lr, least=0.0)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _in_range(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if (
        not number
        or not math.isfinite(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        bounds = [f">= {least}" if least is not None else f"> {above}"]
        bounds += [] if below is None else [f"< {below}"]
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, got {value!r}")


RECIPES: dict[str, Recipe] = {
    "zoclip": Recipe(0, 32, "sgd", 0.002, source="nothing is trained"),
    "coop": Recipe(
        200,
        32,
        "sgd",
        0.002,
        source="arXiv 2109.01134 and KaiyangZhou/CoOp; epochs of 16 shots, see epochs_of_coop",
    ),
    "cocoop": Recipe(10, 1, "sgd", 0.002, source="arXiv 2203.05557 and KaiyangZhou/CoOp"),
    "locoop": Recipe(50, 32, "sgd", 0.002, source="arXiv 2306.01293 and AtsuMiyai/LoCoOp"),
    "ebm": Recipe(
        30,
        32,
        "sgd",
        0.002,
        source="CRoFT's recipe (arXiv 2405.16417); that the EBM loss was trained so is unverified",
    ),
    "clip-adapter": Recipe(30, 32, "sgd", 0.002, source="CRoFT's baseline (arXiv 2405.16417)"),
    "tip": Recipe(0, 256, "adamw", 0.001, source="nothing is trained (arXiv 2207.09519)"),
    "tip-f": Recipe(
        20,
        256,
        "adamw",
        0.001,
        weight_decay=0.01,
        eps=1e-4,
        per="step",
        warmup_epochs=0,
        source="arXiv 2207.09519 and gaopengcuhk/Tip-Adapter; the decay is AdamW's default there",
    ),
    "lora": Recipe(
        5,
        100,
        "sgd",
        0.01,
        per="step",
        warmup_epochs=0,
        source="SeTAR's LoRA baseline (arXiv 2406.12629 and X1AOX1A/SeTAR): batch 100 for "
        "ViT-B/16, others see fastood.setar.authors",
    ),
    "setar-ft": Recipe(
        5,
        100,
        "sgd",
        0.01,
        per="step",
        warmup_epochs=0,
        source="arXiv 2406.12629 and X1AOX1A/SeTAR: batch 100 for ViT-B/16, others see "
        "fastood.setar.authors",
    ),
}
"""Recipe of each method of ``fastood.tuning.registry``."""


LOCOOP_TOP_K: Mapping[str, int] = {"imagenet": 200}
"""LoCoOp's published ``top_k`` by ID set (1000 classes)."""


def epochs_of_coop(shots: int | None, dataset: str | None = None) -> int:
    """CoOp's epochs: 200 for 16 and 8 shots, 100 for 4 and 2, 50 for one; ImageNet always 50.

    Numbers of shots the paper does not use take the epochs of the next smaller one that it does;
    None (all images) those of 16.

    Source: arXiv 2109.01134, section 4.1.

    >>> epochs_of_coop(16), epochs_of_coop(4), epochs_of_coop(1), epochs_of_coop(16, "imagenet")
    (200, 100, 50, 50)
    """
    if shots is not None:
        shots = check_count("shots", shots, 1, None)
    if dataset is not None and _key(dataset) in ("imagenet", "imagenet1k"):
        return 50
    if shots is None or shots >= 8:
        return 200
    return 100 if shots >= 2 else 50


def default_top_k(
    classes: int,
    dataset: str | None = None,
    *,
    published: Mapping[str, int] = LOCOOP_TOP_K,
) -> int:
    """LoCoOp's ``top_k``: the published value on the published set, elsewhere round(0.2 K).

    200 of ImageNet's 1000 classes is that share, so both rules agree there.

    Args:
        classes: K.
        dataset: name of the ID set, as a key of ``published``; None for any other.
        published: values the authors give.
    Returns:
        An integer in 1..K-1.
    Raises:
        ValueError: if K < 2, or the published value is not below K: no patch could be OOD.

    >>> default_top_k(100), default_top_k(1000, "imagenet"), default_top_k(2)
    (20, 200, 1)
    """
    classes = check_count("classes", classes, 2, None)
    if dataset is not None:
        for name, value in published.items():
            if _key(name) == _key(dataset):
                if value >= classes:
                    raise ValueError(
                        f"top_k: the published {value} of {name} needs more than {value} classes, "
                        f"got {classes}: no patch could be OOD; is this a part of {name}?"
                    )
                return value
    return min(max(1, round(0.2 * classes)), classes - 1)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
