"""SeTAR+FT: what a search would drop becomes a low-rank update, and is trained.

Source: arXiv 2406.12629, section 3.3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder
from fastood.models.copies import network_of
from fastood.models.matrices import Matrix, list_matrices
from fastood.setar.lowrank import Part
from fastood.setar.matching import basis_of
from fastood.setar.recipe import Recipe as Picks
from fastood.tuning.low_rank_method import (
    LowRankMethod,
    check_patches,
    key_of,
    loss_settings,
)
from fastood.tuning.recipes import RECIPES, Recipe

__all__ = ["SeTARFT", "read_picks"]


class SeTARFT(LowRankMethod):
    """Low-rank updates that start from the singular directions a search would drop.

    A₀ = sqrt(S₁) V₁',  B₀ = W V₁ / sqrt(S₁),  W' = (W - B₀ A₀) + B A

    S₁, V₁ are of the dropped directions of each picked matrix, r of them; A (r, in) and B (out, r)
    are trained from A₀ and B₀, what is kept of W is frozen. So the model is at first the original
    one, bit for bit: the sum is taken as W + (B A - B₀ A₀). Directions whose singular value cannot
    be told from zero have zeros in both A and B. Their gradients are zero too, so they stay so:
    they count as trainable numbers and do nothing.

    Args:
        picks: a recipe of ``fastood search setar`` (its file, or a ``Recipe``), a JSON file with
            the authors' ``lora_settings``, or a list of ``[tower, kind, layer, ratio]``. It is kept
            as the list of picks that drop something, so that a saved method needs no other file.
        part, part_seed: which directions; default: the recipe's, or "minor".
        loss: ``"locoop"``, cross-entropy + weight · mean over OOD patches of Σ_k p_k log(p_k +
            1e-5), as in the search; or ``"ce"``, cross-entropy alone.
        weight, top_k: of the patch term; default: those of the search behind the recipe if it was
            of as many classes, else the published ones, see ``fastood.setar.published``.
        templates: prompts of the classes; default: those of the search behind the recipe, else
            SeTAR's, which has no full stop.
        chunk: texts in a graph at a time, as for ``LoRA``.
    Raises:
        ValueError: no picks, or none that drops something; numbers of directions above those of a
            matrix; an unknown loss; top_k outside 1..K-1.
        DataError: a recipe that cannot be read.
        ModelError: matrices the model does not have, or with NaN; all of what would be dropped is
            zero already; ``loss="locoop"`` without patch features.
    Warns:
        RuntimeWarning: the recipe was found on other weights of the same architecture.
    """

    name: ClassVar[str] = "setar-ft"
    recipe: ClassVar[Recipe] = RECIPES["setar-ft"]

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        picks: str | os.PathLike[str] | Picks | Sequence[Any] | None = None,
        part: Part | None = None,
        part_seed: int | None = None,
        loss: Literal["locoop", "ce"] = "locoop",
        weight: float | None = None,
        top_k: int | None = None,
        templates: str | Sequence[str] | None = None,
        chunk: int | None = None,
    ) -> None:
        check_patches(self.name, encoder, class_names, loss)
        given = read_picks(picks, part, part_seed)
        matched = [(pick, matrix) for pick, matrix in given.matched(encoder) if pick.count]
        given.warn_of_other_weights(encoder)
        searched = _objective(given, len(class_names))
        settings = {
            "picks": [[p.tower, p.kind, p.layer, p.ratio] for p, _ in matched],
            "part": given.part,
            "part_seed": given.seed,
            **loss_settings(
                encoder,
                len(class_names),
                loss=loss,
                weight=searched.get("weight") if weight is None else weight,
                top_k=searched.get("top_k") if top_k is None else top_k,
                templates=_templates(given) if templates is None else templates,
                chunk=chunk,
            ),
        }
        super().__init__(encoder, class_names, settings)
        factors: dict[Matrix, tuple[Tensor, Tensor]] = {}
        network = network_of(self._student)
        something = False
        for pick, matrix in matched:  # one decomposition in memory at a time
            w = matrix.weight(network).detach()
            basis = basis_of(w, matrix, encoder.name)
            count = pick.count or 0
            a, b = basis.factors(count, part=given.part, seed=given.seed)
            factors[matrix] = a.to(self.dtype), b.to(self.dtype)
            something |= not basis.negligible(count, part=given.part, seed=given.seed)
        if not something:
            raise ModelError(
                f"{encoder.name}: what {self.name} would train is zero already; was the recipe "
                "applied to this model (--adapt)? Train on the model it was found on"
            )
        for matrix, (a, b) in factors.items():
            # saved with A and B, which mean nothing without them: where singular values tie at the
            # cut, another machine may find other directions
            self.register_buffer(f"A0_{key_of(matrix)}", a.clone().contiguous())
            self.register_buffer(f"B0_{key_of(matrix)}", b.clone().contiguous())
        self._attach(factors)

    @property
    def _scale(self) -> float:
        return 1.0

    def _find(self, model: nn.Module) -> tuple[Matrix, ...]:
        known = {m.address: m for m in list_matrices(model)}
        return tuple(known[m.address] for m in self._matrices if m.address in known)

    def _start(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        a, b = (self.get_buffer(f"{name}_{key_of(matrix)}") for name in ("A0", "B0"))
        return a, b


def read_picks(picks: Any, part: Part | None = None, part_seed: int | None = None) -> Picks:
    """What ``SeTARFT`` is given as a recipe; no model is needed.

    Raises:
        ValueError: none, or nothing that drops something.
        DataError: a file that cannot be read.
    """
    if picks is None:
        raise ValueError(
            "picks: setar-ft starts from the recipe of a search, got none; `fastood search setar` "
            "writes one, and setar-ft:picks=FILE takes it"
        )
    if isinstance(picks, (str, os.PathLike)):
        found = Picks.read(picks)
    else:
        found = picks if isinstance(picks, Picks) else Picks(tuple(picks))
    if not found.changes:
        raise ValueError("picks: expected some that drop something, got ratios of 0 only")
    return Picks(
        found.picks,
        found.part if part is None else part,
        found.seed if part_seed is None else part_seed,
        found.model,
        found.search,
    )


def _templates(recipe: Picks) -> str | list[str]:
    """Of the search, if its prompts are known: authors' lists and a Swin's recipe have none."""
    found = recipe.search.get("templates")
    return found if isinstance(found, list) and found else "mcm"


def _objective(recipe: Picks, classes: int) -> Mapping[str, Any]:
    """``weight`` and ``top_k`` of the search, if it was of as many classes."""
    names, objective = recipe.search.get("class_names"), recipe.search.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(names, list) or len(names) != classes:
        return {}
    return {name: objective[name] for name in ("weight", "top_k") if name in objective}
