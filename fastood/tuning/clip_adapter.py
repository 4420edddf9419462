"""CLIP-Adapter: a small network that moves image features, its output mixed with its input."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastood.models.common import seeded
from fastood.scores.bank import ClassBank, Similarities
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_scalar,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)
from fastood.tuning.bank import AdaptedBank
from fastood.tuning.method import Batch, Method, Term
from fastood.tuning.parts import classified, images_of, or_nothing
from fastood.tuning.recipes import RECIPES
from fastood.tuning.zero_shot import fixed_text

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["ClipAdapter", "ClipAdapterHead"]


class ClipAdapter(Method):
    """An adapter on the image feature, fixed class prompts.

    With f the raw image feature (not normalised)::

        A(f) = relu(W2 relu(W1 f))        W1 (D / reduction, D), W2 (D, D / reduction), no bias
        s = norm(ratio · A(f) + (1 - ratio) · f) · T'

    Args:
        ratio: share of the adapter's output, 0..1.
        reduction: by which the hidden layer is narrower than D.
        templates: of the prompts, as for ``encode_classes``.
        seed: of the initial weights (torch's default for linear layers).
    Raises:
        ValueError: settings out of range; an encoder narrower than ``reduction``.
    Notes:
        Source: Gao et al., CLIP-Adapter; numbers as CRoFT (arXiv 2405.16417) trains it. Without
        biases A(cf) = c A(f) for c > 0, so features normalised beforehand give the same s.
        Patches (our choice, the paper has none): unadapted, compared with the same prompts.
    """

    name = "clip-adapter"
    needs = "features"
    recipe = RECIPES["clip-adapter"]
    local_note = "patches stay as they are, unadapted (our choice)"
    text: Tensor

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        ratio: float = 0.2,
        reduction: int = 4,
        templates: str | Sequence[str] = "coop",
        seed: int = 1,
    ) -> None:
        ratio = check_scalar("ratio", ratio)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio: expected 0 <= ratio <= 1, got {ratio}")
        width = encoder.embed_dim
        reduction = check_count("reduction", reduction, 1, width, high_name="D = ")
        seed = check_count("seed", seed, 0, None)
        settings = {
            "ratio": ratio,
            "reduction": reduction,
            "templates": templates if isinstance(templates, str) else list(templates),
            "seed": seed,
        }
        super().__init__(encoder, class_names, settings)
        self.ratio = ratio
        text = fixed_text(encoder, self.words, templates, self.dtype)
        self.register_buffer("text", text, persistent=False)
        with seeded(seed):
            adapter = nn.Sequential(
                nn.Linear(width, width // reduction, bias=False),
                nn.ReLU(),
                nn.Linear(width // reduction, width, bias=False),
                nn.ReLU(),
            )
        self.adapter = adapter.to(text.device, self.dtype)

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        def make() -> tuple[list[Term], Tensor]:
            f = images_of(batch, self.encoder.embed_dim, self.dtype)
            z = unit_rows(adapted(self.adapter, f, self.ratio))
            term, nearest = classified(matmul_classes(z, self.text), batch.labels, self.tau)
            return [term], nearest

        # what the loss is connected to where there is no image: the weights
        return or_nothing(batch, torch.stack([p.sum() for p in self.adapter.parameters()]), make)

    def head(self) -> ClipAdapterHead:
        bank = AdaptedBank(
            self.text, fingerprint=self.fingerprint(), logit_scale=self.encoder.logit_scale
        )
        return ClipAdapterHead(self.adapter, bank, self.ratio)


class ClipAdapterHead:
    """A trained adapter before a bank of class prompts.

    Attributes:
        bank: of the prompts.
        fingerprint, logit_scale, dim: digest of the adaptation, γ and D of the encoder.
    """

    def __init__(self, adapter: nn.Module, bank: AdaptedBank, ratio: float) -> None:
        self._adapter = copy.deepcopy(adapter).requires_grad_(False).eval()
        self.bank: ClassBank = bank
        self.ratio = ratio
        self.fingerprint, self.logit_scale, self.dim = bank.fingerprint, bank.logit_scale, bank.dim

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def device(self) -> torch.device:
        return self.bank.device

    def adapted(self, features: Tensor) -> Tensor:
        """(B, D) features as the adapter moves them, not normalised.

        Raises:
            ValueError: another D or device; NaN, Inf or zero rows.
        """
        f = check_features("image", features, (2,), "(B, D)")
        check_width(f, self.bank.text)
        return adapted(self._adapter, working(f).to(self.bank.text.dtype), self.ratio)

    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Cosines of adapted ``features (B, D)`` and of ``local (B, P, D)`` as they are.

        Raises:
            ValueError: on mismatched D or device, NaN, Inf or zero rows.
        """
        return self.bank.similarities(self.adapted(features), local)


def adapted(adapter: nn.Module, features: Tensor, ratio: float) -> Tensor:
    """ratio · A(f) + (1 - ratio) · f in the dtype of the features."""
    moved: Tensor = adapter(features)
    return ratio * moved.to(features.dtype) + (1 - ratio) * features
