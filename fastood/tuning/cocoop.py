"""CoCoOp: a context that a small network shifts for every image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastood.models.common import seeded
from fastood.prompts.encoder import PromptEncoder
from fastood.scores.bank import Similarities
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_width,
    matmul_classes,
    row_blocks,
    unit_rows,
    working,
)
from fastood.tuning.context import initial_context, prompt_encoder
from fastood.tuning.method import Batch, Method, Term
from fastood.tuning.parts import classified, images_of, or_nothing
from fastood.tuning.prompt_methods import Position
from fastood.tuning.recipes import RECIPES

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["CoCoOp", "CoCoOpHead"]


class CoCoOp(Method):
    """Conditional Context Optimization: every image has prompts of its own.

    With z the unit image feature and v the context::

        v(z) = v + W2 relu(W1 z)          W1 (D / 16, D), W2 (W, D / 16), with bias
        s_k = z · T_k(v(z))

    A step runs B · K prompts; images are batched and the context of an image is run once for all
    its classes. The loss is the cross-entropy of s / tau, tau = 1 / γ.

    Args:
        n_ctx: number of context vectors; default as many as ``ctx_init`` has tokens, or 4.
        ctx_init: text whose token embeddings the context starts from; None draws N(0, 0.02).
        position: of the class name, as for ``CoOp``.
        reduction: by which the hidden layer of the network is narrower than D.
        seed: of the network's initial weights (torch's default for linear layers) and of a context
            that is drawn.
        chunk: prompts in memory for the backward pass at a time; None: all.
    Attributes:
        context: (n_ctx, W); meta: the network. float32 (float64 for a float64 tower).
    Raises:
        ValueError, ModelError: as ``CoOp``.
    Notes:
        Source: arXiv 2203.05557. With the network at zero it is CoOp.
        Patches (our choice, the paper has none): the image's own prompts are applied to its
        patches.
    """

    name = "cocoop"
    needs = "features"
    recipe = RECIPES["cocoop"]
    local_note = "an image's patches are compared with the image's own prompts (our choice)"

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        n_ctx: int | None = None,
        ctx_init: str | None = "a photo of a",
        position: Position = "end",
        reduction: int = 16,
        seed: int = 1,
        chunk: int | None = None,
    ) -> None:
        super().__init__(encoder, class_names, {})
        width = encoder.embed_dim
        reduction = check_count("reduction", reduction, 1, width, high_name="D = ")
        self.prompts = prompt_encoder(
            encoder,
            self.words,
            n_ctx=n_ctx,
            ctx_init=ctx_init,
            default=4,
            position=position,
            chunk=chunk,
        )
        start = initial_context(self.prompts, ctx_init=ctx_init, seed=seed)
        self.context = nn.Parameter(start.to(encoder.device, self.dtype))
        with seeded(seed):
            meta = nn.Sequential(
                nn.Linear(width, width // reduction),
                nn.ReLU(),
                nn.Linear(width // reduction, self.prompts.width),
            )
        self.meta = meta.to(encoder.device, self.dtype)
        self._settings = {
            "n_ctx": self.prompts.layout.n_ctx,
            "ctx_init": ctx_init,
            "position": position,
            "reduction": reduction,
            "seed": seed,
            "chunk": chunk,
        }

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        def make() -> tuple[list[Term], Tensor]:
            z = unit_rows(images_of(batch, self.encoder.embed_dim, self.dtype))
            text = conditional_text(self.prompts, self.context, self.meta, z)
            term, nearest = classified(matmul_classes(z, text), batch.labels, self.tau)
            return [term], nearest

        # what the loss is connected to where there is no image
        return or_nothing(batch, torch.stack([p.sum() for p in self.parameters()]), make)

    def head(self) -> CoCoOpHead:
        return CoCoOpHead(
            self.prompts,
            self.context,
            self.meta,
            fingerprint=self.fingerprint(),
            logit_scale=self.encoder.logit_scale,
            dim=self.encoder.embed_dim,
        )


class CoCoOpHead:
    """Trained conditional prompts: the text of all classes is encoded for every image.

    Attributes:
        fingerprint, logit_scale, dim: digest of the adaptation, γ and D of the encoder.
    """

    def __init__(
        self,
        prompts: PromptEncoder,
        context: Tensor,
        meta: nn.Module,
        *,
        fingerprint: str,
        logit_scale: float,
        dim: int,
    ) -> None:
        self._prompts = prompts
        self._context = context.detach().clone()
        self._meta = copy.deepcopy(meta).requires_grad_(False).eval()
        self.fingerprint, self.logit_scale, self.dim = fingerprint, logit_scale, dim

    def __len__(self) -> int:
        return len(self._prompts.layout)

    @property
    def device(self) -> torch.device:
        return self._context.device

    @torch.no_grad()
    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Cosines of ``features (B, D)``, and ``local (B, P, D)``, with each image's own prompts.

        Raises:
            ValueError: on mismatched B, D or device, NaN, Inf or zero rows.
        """
        z = self._rows("image", features, (2,), "(B, D)")
        zl = None if local is None else self._rows("local", local, (3,), "(B, P, D)")
        if zl is not None and len(zl) != len(z):
            raise ValueError(f"local: expected patches of {len(z)} images, got {len(zl)}")
        k, image, patches = len(self), [z.new_empty(0, len(self))], []
        # one image's text is K D numbers, none of which is needed for the next
        for some in row_blocks(len(z), k * self.dim):
            if not len(z):
                break
            text = conditional_text(self._prompts, self._context, self._meta, z[some])
            image.append(matmul_classes(z[some], text))
            if zl is not None:
                patches.append(matmul_classes(zl[some], text))
        if zl is None:
            return Similarities(torch.cat(image))
        none = zl.new_empty(0, zl.shape[1], k)
        return Similarities(torch.cat(image), torch.cat([none, *patches]))

    def _rows(self, name: str, x: Tensor, dims: tuple[int, ...], shape: str) -> Tensor:
        x = check_features(name, x, dims, shape)
        check_width(x, self._context.new_empty(len(self), self.dim), (name, "text"))
        return unit_rows(working(x).to(self._context.dtype))


def conditional_text(
    prompts: PromptEncoder, context: Tensor, meta: nn.Module, image: Tensor
) -> Tensor:
    """(B, K, D) unit text features of the prompts of each unit image feature ``(B, D)``."""
    shifted = context + meta(image).to(context.dtype)[:, None]
    return unit_rows(prompts(shifted).to(context.dtype))
