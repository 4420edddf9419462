"""Zero-shot CLIP (ZOCLIP) as a method: nothing is trained, tables treat it like the others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastood.scores.inputs import matmul_classes, unit_rows
from fastood.tuning.bank import AdaptedBank
from fastood.tuning.method import Batch, Method, Term
from fastood.tuning.parts import classified, images_of, or_nothing
from fastood.tuning.recipes import RECIPES

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["ZeroShot", "fixed_text"]


def fixed_text(
    encoder: Encoder, words: Sequence[str], templates: str | Sequence[str], dtype: torch.dtype
) -> Tensor:
    """(K, D) unit features of ordinary class prompts, an ensemble as ``encode_classes`` makes it.

    Raises:
        ModelError: an encoder without text tower.
        ValueError: unusable templates.
    """
    from fastood.features.text import encode_classes

    found = encode_classes(encoder, words, templates=templates, allow_duplicates=True)
    for note in found.warnings:  # names cut at the token window, words without meaning
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    text = found.features.to(dtype)
    # float32 rows have unit norm to float32's rounding only
    return unit_rows(text) if dtype == torch.float64 else text


class ZeroShot(Method):
    """Similarities of fixed prompts, s = z T'.

    Args:
        templates: a set of ``fastood.data.prompts.TEMPLATES``, one template or several; the
            default is CoOp's, ``a photo of a {}.`` with its full stop.
    Notes:
        Patches (our choice where papers do not say): compared with the same prompts.
    """

    name = "zoclip"
    needs = "features"
    recipe = RECIPES["zoclip"]
    local_note = "patches are compared with the same prompts"
    text: Tensor

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        templates: str | Sequence[str] = "coop",
    ) -> None:
        kept = templates if isinstance(templates, str) else list(templates)
        super().__init__(encoder, class_names, {"templates": kept})
        text = fixed_text(encoder, self.words, templates, self.dtype)
        self.register_buffer("text", text, persistent=False)

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        def make() -> tuple[list[Term], Tensor]:
            z = unit_rows(images_of(batch, self.encoder.embed_dim, self.dtype))
            term, nearest = classified(matmul_classes(z, self.text), batch.labels, self.tau)
            return [term], nearest

        return or_nothing(batch, self.text, make)

    def head(self) -> AdaptedBank:
        return AdaptedBank(
            self.text, fingerprint=self.fingerprint(), logit_scale=self.encoder.logit_scale
        )
