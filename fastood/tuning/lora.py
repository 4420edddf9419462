"""LoRA: low-rank updates of a CLIP's towers, trained on pixels with fixed prompts.

Source: arXiv 2106.09685; as a baseline of OOD detection arXiv 2406.12629 (SeTAR).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastood.models.base import Encoder
from fastood.models.copies import network_of
from fastood.models.matrices import Matrix, find
from fastood.scores.inputs import check_count, check_scalar
from fastood.setar.authors import backbone_of, published_training
from fastood.tuning.low_rank_method import (
    LowRankMethod,
    check_patches,
    loss_settings,
)
from fastood.tuning.recipes import RECIPES, Recipe

__all__ = ["LoRA"]


class LoRA(LowRankMethod):
    """Low-rank updates of chosen matrices of both towers; prompts stay fixed.

    W' = W + (alpha / r) B A

    Trained on pixels: ``adapted(encoder)`` is the encoder with merged weights, and any prompts,
    scores and adapters work with it. Texts are encoded anew in every step where the text tower is
    adapted. The default is SeTAR's baseline: all ``up`` matrices of both towers, alpha 8 (inferred:
    the 16 of their configuration is never passed on), and what was published for the backbone.

    Args:
        kinds, towers, layers: which matrices, see ``fastood.models.matrices.find``; default: all
            towers that the model has.
        rank: r; default: 32, 64 for image towers of more than 12 blocks, 112 for Swin, or the full
            rank of the smallest matrix if that is less.
        alpha: updates are scaled by alpha / r.
        loss: ``"locoop"``, cross-entropy + weight · mean over OOD patches of Σ_k p_k log(p_k +
            1e-5), as SeTAR trains; or ``"ce"``, cross-entropy alone.
        weight, top_k: of the patch term, and the rank of the label from which a patch is OOD;
            default: see ``fastood.setar.published``.
        templates: prompts of the classes; SeTAR's has no full stop.
        seed: of A, drawn uniformly as ``nn.Linear`` draws; B starts at 0.
        chunk: texts in a graph at a time; the others are run again in the backward pass. None
            keeps one graph of all.
    Raises:
        ValueError: rank < 1 or above a matrix's; an unknown loss; top_k outside 1..K-1.
        ModelError: matrices the model does not have; ``loss="locoop"`` without patch features.
    """

    name: ClassVar[str] = "lora"
    recipe: ClassVar[Recipe] = RECIPES["lora"]

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        kinds: Iterable[str] | str = ("up",),
        towers: Iterable[str] | str | None = None,
        layers: Iterable[int] | int | None = None,
        rank: int | None = None,
        alpha: float = 8.0,
        loss: Literal["locoop", "ce"] = "locoop",
        weight: float | None = None,
        top_k: int | None = None,
        templates: str | Sequence[str] = "mcm",
        seed: int = 1,
        chunk: int | None = None,
    ) -> None:
        check_patches(self.name, encoder, class_names, loss)
        both = ("image", "text") if encoder.head() is None else ("image",)
        where: dict[str, Any] = {
            "kinds": _listed(kinds),
            "towers": _listed(both if towers is None else towers),
            "layers": [layers] if isinstance(layers, int) else layers and list(layers),
        }
        matrices = find(network_of(encoder), **where)
        if rank is None:
            published = published_training(backbone_of(network_of(encoder))).rank
            rank = min(published, *(min(matrix.shape) for matrix in matrices))
        rank = check_count("rank", rank, 1, None)
        settings = {
            **where,
            "rank": rank,
            "alpha": check_scalar("alpha", alpha),
            "seed": check_count("seed", seed, 0, None),
            **loss_settings(
                encoder,
                len(class_names),
                loss=loss,
                weight=weight,
                top_k=top_k,
                templates=templates,
                chunk=chunk,
            ),
        }
        super().__init__(encoder, class_names, settings)
        generator = torch.Generator().manual_seed(seed)
        factors: dict[Matrix, tuple[Tensor, Tensor]] = {}
        for matrix in matrices:
            out, width = matrix.shape
            if rank > min(out, width):
                raise ValueError(
                    f"rank: expected at most {min(out, width)}, the full rank of {matrix.address} "
                    f"({out}, {width}), got {rank}"
                )
            a = torch.empty(rank, width, dtype=self.dtype)
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            factors[matrix] = a, torch.zeros(out, rank)
        self._attach(factors)

    @property
    def _scale(self) -> float:
        return float(self._settings["alpha"] / self._settings["rank"])

    def _find(self, model: nn.Module) -> tuple[Matrix, ...]:
        s = self._settings
        return find(model, towers=s["towers"], kinds=s["kinds"], layers=s["layers"])


def _listed(value: Iterable[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
