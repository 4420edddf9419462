"""The authors' settings by backbone: of a search, also by ID set, and of training.

Source: arXiv 2406.12629, appendix on hyper-parameters, and the configurations of X1AOX1A/SeTAR.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastood.models.matrices import list_matrices, swin_layers
from fastood.scores.inputs import check_count

__all__ = ["ID_SETS", "Published", "Training", "backbone_of", "published", "published_training"]

ID_SETS = {"imagenet": 1000, "voc": 14}
"""ID sets with published settings, and their numbers of classes."""


@dataclass(frozen=True)
class Published:
    """Settings of the objective.

    Attributes:
        weight: λ of the patch term.
        top_k: a patch is OOD if its label is not among that many classes.
        batch: images over which the mean over OOD patches is taken.
        source: for which backbone and set they were published, or by what rule they are taken.
    """

    weight: float
    top_k: int
    batch: int
    source: str


@dataclass(frozen=True)
class Training:
    """What differs between backbones in SeTAR+FT and its LoRA baseline.

    Attributes:
        batch: images per step.
        rank: of LoRA.
    """

    batch: int
    rank: int


_TABLE: dict[tuple[str, str], tuple[float, int]] = {
    ("base", "imagenet"): (0.10, 300),
    ("base", "voc"): (0.05, 4),
    ("large", "imagenet"): (0.50, 300),
    ("large", "voc"): (0.30, 6),
    ("swin", "imagenet"): (0.01, 700),
}
_TRAINING = {"base": Training(100, 32), "large": Training(20, 64), "swin": Training(50, 112)}
_BATCH = {"base": 512, "large": 512, "swin": 384}
_NAMES = {"base": "CLIP ViT-B/16", "large": "CLIP ViT-L/14", "swin": "SwinV2-B"}


def backbone_of(network: nn.Module) -> str:
    """``"base"``, ``"large"`` or ``"swin"``: whose settings a network takes.

    Image towers of more than 12 blocks take those of ViT-L/14.
    """
    if swin_layers(network):
        return "swin"
    layers = [m.layer for m in list_matrices(network) if m.tower == "image"]
    depth = 1 + max((layer for layer in layers if layer is not None), default=-1)
    return "large" if depth > 12 else "base"


def published_training(backbone: str) -> Training:
    """The sizes of a training run, for a backbone of ``backbone_of``.

    >>> published_training("large")
    Training(batch=20, rank=64)
    """
    return _TRAINING[backbone]


def published(backbone: str, classes: int, id_set: str | None = None) -> Published:
    """The settings of a search.

    Args:
        backbone: of ``backbone_of``.
        classes: K.
        id_set: of ``ID_SETS``; None means ImageNet if there are 1000 classes, else none of them:
            then λ is the backbone's of ImageNet and top_k = round(0.3 K).
    Raises:
        ValueError: an unknown set or backbone; a set with another number of classes; a set the
            authors do not have for the backbone; fewer than two classes.

    >>> published("base", 1000)
    Published(weight=0.1, top_k=300, batch=512, source='published for CLIP ViT-B/16, imagenet')
    >>> published("base", 10).top_k
    3
    """
    classes = check_count("classes", classes, 2, None)
    if backbone not in _BATCH:
        raise ValueError(f"backbone: expected one of {', '.join(_BATCH)}, got {backbone!r}")
    if id_set is not None and id_set not in ID_SETS:
        raise ValueError(f"id_set: expected one of {', '.join(ID_SETS)}, got {id_set!r}")
    if id_set is not None and classes != ID_SETS[id_set]:
        raise ValueError(
            f"id_set: {id_set} has {ID_SETS[id_set]} classes, got {classes}; leave it out for "
            "another set"
        )
    if id_set is None and classes == ID_SETS["imagenet"]:
        id_set = "imagenet"
    batch = _BATCH[backbone]
    if id_set is not None:
        if (backbone, id_set) not in _TABLE:
            raise ValueError(f"id_set: nothing is published for {_NAMES[backbone]} on {id_set}")
        weight, top_k = _TABLE[backbone, id_set]
        return Published(weight, top_k, batch, f"published for {_NAMES[backbone]}, {id_set}")
    weight, _ = _TABLE[backbone, "imagenet"]
    top_k = min(max(1, round(0.3 * classes)), classes - 1)
    source = f"weight of {_NAMES[backbone]} on imagenet, top_k = round(0.3 K)"
    return Published(weight, top_k, batch, source)
