"""Prompt learning: a context of free vectors before, around or after each class name.

Both towers are frozen; what trains is the context alone. CoOp minimises the cross-entropy of
images, LoCoOp also flattens the predictions of patches that do not show the class, EBM adds the
energy-bound loss. Letters: B images, P patches, D width, K classes, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.scores.inputs import check_count, check_scalar, matmul_classes, unit_rows
from fastood.tuning.bank import AdaptedBank
from fastood.tuning.context import initial_context, prompt_encoder
from fastood.tuning.ebm import check_options, ebm_terms
from fastood.tuning.locoop import locoop_terms
from fastood.tuning.method import Batch, Method, Needs, Term
from fastood.tuning.parts import classified, images_of, or_nothing
from fastood.tuning.recipes import RECIPES, default_top_k

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = ["EBM", "CoOp", "LoCoOp"]

Position = Literal["end", "middle", "front"]


class CoOp(Method):
    """Context Optimization: s = z T(context)', prompts ``[v1 .. vM] [name].``

    The loss is the cross-entropy of s / tau, tau = 1 / γ.

    Args:
        n_ctx: M, number of context vectors; default 16, or as many as ``ctx_init`` has tokens.
        ctx_init: text whose token embeddings the context starts from, for example
            ``"a photo of a"``; None draws them from N(0, 0.02).
        position: of the class name: ``"end"`` (last), ``"middle"`` or ``"front"``. Last is also
            fastest, the context then being run once for all classes.
        class_specific: a context for each class rather than one for all.
        seed: of the private generator that draws the context.
        chunk: classes whose text may be in memory for the backward pass at a time; None: all.
    Attributes:
        context: (M, W), or (K, M, W) if class-specific; float32 (float64 for a float64 tower).
    Raises:
        ValueError: a context that does not fit the token window, names that overflow it (named),
            ``n_ctx`` and ``ctx_init`` that disagree.
        ModelError: an encoder without a text tower.
    Notes:
        Source: arXiv 2109.01134. Deterministic.
        Patches (our choice, the paper has none): compared with the learned prompts.
    """

    name = "coop"
    needs: ClassVar[Needs] = "features"
    recipe = RECIPES["coop"]
    local_note = "patches are compared with the learned prompts"
    default_n_ctx: ClassVar[int] = 16
    context: nn.Parameter

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        n_ctx: int | None = None,
        ctx_init: str | None = None,
        position: Position = "end",
        class_specific: bool = False,
        seed: int = 1,
        chunk: int | None = None,
    ) -> None:
        if not isinstance(class_specific, bool):
            raise ValueError(f"class_specific: expected True or False, got {class_specific!r}")
        super().__init__(encoder, class_names, {})
        self.prompts = prompt_encoder(
            encoder,
            self.words,
            n_ctx=n_ctx,
            ctx_init=ctx_init,
            default=self.default_n_ctx,
            position=position,
            class_specific=class_specific,
            chunk=chunk,
        )
        start = initial_context(self.prompts, ctx_init=ctx_init, seed=seed)
        self.context = nn.Parameter(start.to(encoder.device, self.dtype))
        self._settings = {
            "n_ctx": self.prompts.layout.n_ctx,
            "ctx_init": ctx_init,
            "position": position,
            "class_specific": class_specific,
            "seed": seed,
            "chunk": chunk,
        }

    def text(self) -> Tensor:
        """(K, D) features of the learned prompts, not normalised; every process makes its share."""
        if self.world.size == 1:
            return self.prompts(self.context).to(self.dtype)
        k = len(self.class_names)
        own = self.world.part(k)
        if own.stop > own.start:
            part = self.prompts(self.context, classes=own).to(self.dtype)
        else:
            part = self.context.new_zeros(0, self.encoder.embed_dim)
        return self.world.gather_rows(part, k)

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        text = self.text()
        return or_nothing(batch, text, lambda: self._terms(batch, text), self._names())

    def _names(self) -> Sequence[tuple[str, float]]:
        """Names and weights of the terms, in order."""
        return (("cross_entropy", 1.0),)

    def _terms(self, batch: Batch, text: Tensor) -> tuple[list[Term], Tensor]:
        z = unit_rows(images_of(batch, self.encoder.embed_dim, self.dtype))
        term, nearest = classified(matmul_classes(z, unit_rows(text)), batch.labels, self.tau)
        return [term], nearest

    @torch.no_grad()
    def head(self) -> AdaptedBank:
        text = self.prompts(self.context).to(self.dtype)
        return AdaptedBank(
            text, fingerprint=self.fingerprint(), logit_scale=self.encoder.logit_scale
        )


class LoCoOp(CoOp):
    """CoOp that also learns from patches without the class: they shall look like no class.

    With the loss of ``fastood.tuning.locoop_loss``: cross-entropy + weight · the mean over OOD
    patches of Σ_k p_k log(p_k + 1e-5); a patch is OOD if its label is outside the ``top_k`` best.

    Args:
        weight: of the patch term.
        top_k: rank of the label from which a patch is OOD; default ``default_top_k(K)``, a fifth
            of the classes, 200 for ImageNet's 1000 as published.
        context: n_ctx, ctx_init, position, class_specific, seed, chunk as for ``CoOp``.
    Raises:
        ValueError: as ``CoOp``; top_k outside 1..K-1 (no patch could be OOD).
        ModelError: an encoder without patch features.
    Notes:
        Source: arXiv 2306.01293. Deterministic.
        Patches, as the paper has them: compared with the learned prompts.
    """

    name = "locoop"
    needs = "local"
    recipe = RECIPES["locoop"]
    local_note = "patches are compared with the learned prompts, as in training"

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        weight: float = 0.25,
        top_k: int | None = None,
        **context: Any,
    ) -> None:
        if encoder.no_local is not None:
            raise ModelError(
                f"locoop trains with patch features; {encoder.name} has none: {encoder.no_local}"
            )
        k = len(class_names)
        if k < 2:
            raise ValueError(f"class_names: expected at least 2 classes for LoCoOp, got {k}")
        if top_k is None:
            top_k = default_top_k(k)
        elif isinstance(top_k, int) and top_k >= k:
            raise ValueError(
                f"top_k: expected fewer than the {k} classes, got {top_k}: no patch could be OOD; "
                f"the default is {default_top_k(k)}"
            )
        weight = check_scalar("weight", weight)
        top_k = check_count("top_k", top_k, 1, k - 1, high_name="K - 1 = ")
        super().__init__(encoder, class_names, **context)
        self._settings |= {"weight": weight, "top_k": top_k}

    def _names(self) -> Sequence[tuple[str, float]]:
        return (
            ("cross_entropy", 1.0),
            ("patches", self._settings["weight"]),
            ("ood_patches", 0.0),
        )

    def _terms(self, batch: Batch, text: Tensor) -> tuple[list[Term], Tensor]:
        if batch.local is None:
            raise ValueError(
                "local: LoCoOp trains with patch features (B, P, D), got none; encode the images "
                "with local=True"
            )
        settings = self._settings
        z = images_of(batch, self.encoder.embed_dim, self.dtype)
        found = locoop_terms(
            z, batch.local, text, batch.labels, tau=self.tau, top_k=settings["top_k"]
        )
        b, ood = len(z), found.ood_patches
        share = Term("ood_patches", ood.to(z.dtype), float(b * batch.local.shape[1]), 0.0)
        terms = [
            Term("cross_entropy", found.cross_entropy * b, b),
            Term("patches", found.patches * ood, ood, settings["weight"]),
            share,
        ]
        return terms, found.predicted


class EBM(CoOp):
    """Prompt tuning with the energy-bound loss of ``fastood.ebm_loss``.

    Args:
        weight, mask, keep, mask_by, edit, ce_on, renorm: as for ``fastood.ebm_loss``.
        context: n_ctx, ctx_init, position, class_specific, seed, chunk as for ``CoOp``.
    Raises:
        ValueError: as ``CoOp``; options that ``ebm_loss`` does not have.
    Notes:
        Source: arXiv 2510.11296, whose equations and defaults are inferred here (see
        ``ebm_loss``); no claim is made to reproduce the paper's numbers. Deterministic.
        The masked and the original energy also approach each other as the model gets unsure of
        every image, which is no success. So ``terms`` adds numbers to watch, of weight 0:
        ``cross_entropy`` of the original logits, ``p_top1`` (mean largest probability) and
        ``edited_rise`` (mean of st - s_y1). A validation accuracy a point below CoOp's, or
        ``p_top1`` falling throughout, says that ``weight`` is too large.
        Patches (our choice, the paper has none): compared with the learned prompts.
    """

    name = "ebm"
    recipe = RECIPES["ebm"]

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        weight: float = 0.1,
        mask: Literal["sign", "topp"] = "sign",
        keep: float = 0.5,
        mask_by: Literal["top1", "label"] = "top1",
        edit: Literal["top1", "all"] = "top1",
        ce_on: Literal["edited", "original"] = "edited",
        renorm: bool = False,
        **context: Any,
    ) -> None:
        options = check_options(
            weight=weight,
            mask=mask,
            keep=keep,
            mask_by=mask_by,
            edit=edit,
            ce_on=ce_on,
            renorm=renorm,
        )
        super().__init__(encoder, class_names, **context)
        self._options = options
        self._settings |= options

    def _names(self) -> Sequence[tuple[str, float]]:
        return (("ebm", 1.0), ("cross_entropy", 0.0), ("p_top1", 0.0), ("edited_rise", 0.0))

    def _terms(self, batch: Batch, text: Tensor) -> tuple[list[Term], Tensor]:
        z = images_of(batch, self.encoder.embed_dim, self.dtype)
        found = ebm_terms(z, text, batch.labels, tau=self.tau, **self._options)
        with torch.no_grad():
            s = matmul_classes(unit_rows(z), unit_rows(text))
            plain, nearest = classified(s, batch.labels, self.tau)
        b = len(z)
        p_top1, rise = (found.diagnostics * b).unbind()
        terms = [
            Term("ebm", found.loss * b, b),
            plain._replace(weight=0.0),
            Term("p_top1", p_top1, b, 0.0),
            Term("edited_rise", rise, b, 0.0),
        ]
        return terms, nearest
