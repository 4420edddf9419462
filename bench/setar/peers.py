"""One candidate of a SeTAR search, evaluated as others do it: plainly, and in the authors' way.

Both were written from the description of what is computed. ``Plain`` is what a careful user would
write: weights resident, patches once, both towers in full for every candidate, prompts padded to
the longest. ``Authors`` has the structure of X1AOX1A/SeTAR: the model's weights are read again, a
full SVD of every accepted matrix and the candidate, the local path in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.models.local import open_clip_block
from fastood.models.matrices import Matrix

__all__ = ["Authors", "Plain"]

_CHUNK = 32


class Plain:
    """The loss of an open_clip model with some of its matrices replaced.

    Args:
        model: changed in place, and back.
        pixels: (N, 3, H, W); tokens: (K, L) padded; labels: (N,).
    """

    def __init__(
        self,
        model: Any,
        pixels: Tensor,
        tokens: Tensor,
        labels: Tensor,
        *,
        top_k: int,
        weight: float,
    ) -> None:
        self.model, self.pixels, self.labels = model, pixels, labels
        self.tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
        self.top_k, self.weight = top_k, weight

    @torch.no_grad()
    def __call__(self, changed: Sequence[tuple[Matrix, Tensor]]) -> float:
        """Args: changed: matrices and the weights they have instead."""
        before = [m.weight(self.model).clone() for m, _ in changed]
        for matrix, weight in changed:
            matrix.weight(self.model).copy_(weight)
        try:
            return self.loss(*self.images(), self.text())
        finally:
            for (matrix, _), weight in zip(changed, before, strict=True):
                matrix.weight(self.model).copy_(weight)

    def text(self) -> Tensor:
        """(K, D) unit rows; the whole width of the longest prompt for every prompt."""
        m, tokens = self.model, self.tokens
        length = tokens.shape[1]
        x = m.token_embedding(tokens) + m.positional_embedding[:length]
        for block in m.transformer.resblocks:
            x = block(x, attn_mask=m.attn_mask[:length, :length])
        x = m.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ m.text_projection
        return F.normalize(x, dim=-1)

    def images(self) -> tuple[Tensor, Tensor]:
        """(N, D) and (N, P, D) unit rows."""
        found = [self.image_chunk(x) for x in self.pixels.split(_CHUNK)]
        return torch.cat([i for i, _ in found]), torch.cat([p for _, p in found])

    def image_chunk(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        v = self.model.visual
        x = self.embed(pixels)
        blocks = list(v.transformer.resblocks)
        for block in blocks[:-1]:
            x = block(x)
        local = open_clip_block(blocks[-1], x)
        return self.finish(blocks[-1](x), local)

    def embed(self, pixels: Tensor) -> Tensor:
        v = self.model.visual
        x = v.conv1(pixels).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return v.ln_pre(x + v.positional_embedding)

    def finish(self, x: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        v = self.model.visual
        image = v.ln_post(x[:, 0]) @ v.proj
        patches = v.ln_post(local[:, 1:]) @ v.proj
        return F.normalize(image, dim=-1), F.normalize(patches, dim=-1)

    def loss(self, image: Tensor, local: Tensor, text: Tensor) -> float:
        """LoCoOp's, over all images as one batch."""
        scale = self.model.logit_scale.exp()
        cross_entropy = F.cross_entropy(scale * image @ text.T, self.labels)
        total, count = 0.0, 0
        for z, y in zip(local.split(_CHUNK), self.labels.split(_CHUNK), strict=True):
            s = scale * z @ text.T
            ood = ~s.topk(self.top_k, dim=2).indices.eq(y[:, None, None]).any(2)
            p = s.softmax(-1)[ood]
            total += float((p * (p + 1e-5).log()).sum())
            count += len(p)
        return float(cross_entropy) + self.weight * total / max(count, 1)


class Authors(Plain):
    """The same loss in the authors' way.

    Args:
        state: the original weights, of which every candidate starts.
    """

    def __init__(self, *args: Any, state: dict[str, Tensor], **options: Any) -> None:
        super().__init__(*args, **options)
        self.state = state

    @torch.no_grad()
    def candidate(self, settings: Sequence[tuple[Matrix, int]]) -> float:
        """Args: settings: matrices accepted so far and the candidate, with directions to drop."""
        self.model.load_state_dict({k: v.clone() for k, v in self.state.items()})
        for matrix, count in settings:
            weight = matrix.weight(self.model)
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            kept = len(s) - count
            weight.copy_(u[:, :kept] @ (s[:kept, None] * vh[:kept]))
        return self.loss(*self.images(), self.text())

    def image_chunk(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(pixels)
        local = x
        for block in self.model.visual.transformer.resblocks:
            local = open_clip_block(block, x)  # of every block; the last one is used
            x = block(x)
        return self.finish(x, local)
