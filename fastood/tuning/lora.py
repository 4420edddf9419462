"""LoRA: low-rank updates of a CLIP's towers, trained on pixels with fixed prompts.

Source: arXiv 2106.09685; as a baseline of OOD detection arXiv 2406.12629 (SeTAR).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder, ImageFeatures
from fastood.models.copies import copy_encoder
from fastood.models.matrices import Matrix, find
from fastood.prompts.encoder import PromptEncoder
from fastood.prompts.layout import fixed
from fastood.prompts.tower import text_tower
from fastood.scores.inputs import check_count, check_scalar, matmul_classes, unit_rows
from fastood.tuning.locoop import locoop_terms
from fastood.tuning.lowrank import Factors, attach, merge
from fastood.tuning.method import Batch, Method, Needs, Term
from fastood.tuning.parts import classified, images_of, or_nothing
from fastood.tuning.recipes import RECIPES, Recipe

__all__ = ["LoRA"]


class LoRA(Method):
    """Low-rank updates of chosen matrices of both towers; prompts stay fixed.

    Trained on pixels: ``adapted(encoder)`` is the encoder with merged weights, and any prompts,
    scores and adapters work with it. Texts are encoded anew in every step where the text tower is
    adapted. The default is SeTAR's baseline: all ``up`` matrices of both towers, rank 32 (ViT-B/16;
    64 for ViT-L/14), alpha 8 (inferred: the 16 of their configuration is never passed on).

    Args:
        kinds, towers, layers: which matrices, see ``fastood.models.matrices.find``.
        rank: r.
        alpha: updates are scaled by alpha / r.
        loss: ``"locoop"``, cross-entropy + weight · mean over OOD patches of Σ_k p_k log(p_k +
            1e-5), as SeTAR trains; or ``"ce"``, cross-entropy alone.
        weight: of the patch term; SeTAR's for ViT-B/16 on ImageNet.
        top_k: rank of the label from which a patch is OOD; default round(.3 K), which is SeTAR's
            300 of ImageNet's 1000 and 4 of Pascal-VOC's 14 classes.
        templates: prompts of the classes; SeTAR's has no full stop.
        seed: of A, drawn uniformly as ``nn.Linear`` draws; B starts at 0.
        chunk: texts in a graph at a time; the others are run again in the backward pass. None
            keeps one graph of all.
    Raises:
        ValueError: rank < 1 or above a matrix's; an unknown loss; top_k outside 1..K-1.
        ModelError: matrices the model does not have; ``loss="locoop"`` without patch features.
    """

    name: ClassVar[str] = "lora"
    needs: ClassVar[Needs] = "pixels"
    changes_towers: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = RECIPES["lora"]
    local_note: ClassVar[str] = "patches of the changed image tower, against the changed texts"

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        kinds: Iterable[str] | str = ("up",),
        towers: Iterable[str] | str = ("image", "text"),
        layers: Iterable[int] | int | None = None,
        rank: int = 32,
        alpha: float = 8.0,
        loss: Literal["locoop", "ce"] = "locoop",
        weight: float = 0.1,
        top_k: int | None = None,
        templates: str | Sequence[str] = "mcm",
        seed: int = 1,
        chunk: int | None = None,
    ) -> None:
        if loss not in ("locoop", "ce"):
            raise ValueError(f'loss: expected "locoop" or "ce", got {loss!r}')
        rank = check_count("rank", rank, 1, None)
        k = len(class_names)
        if loss == "locoop":
            if encoder.no_local is not None:
                raise ModelError(
                    f'lora with loss="locoop" trains with patch features; {encoder.name} has none '
                    f'({encoder.no_local}); use loss="ce"'
                )
            if k < 2:
                raise ValueError(f"class_names: expected at least 2 classes, got {k}")
            if top_k is None:
                top_k = min(max(1, round(0.3 * k)), k - 1)
            elif isinstance(top_k, int) and top_k >= k:
                raise ValueError(
                    f"top_k: expected below the {k} classes, got {top_k}: no patch could be OOD"
                )
            top_k = check_count("top_k", top_k, 1, k - 1, high_name="K - 1 = ")
        settings = {
            "kinds": _listed(kinds),
            "towers": _listed(towers),
            "layers": [layers] if isinstance(layers, int) else layers and list(layers),
            "rank": rank,
            "alpha": check_scalar("alpha", alpha),
            "loss": loss,
            "weight": check_scalar("weight", weight),
            "top_k": top_k,
            "templates": templates if isinstance(templates, str) else list(templates),
            "seed": check_count("seed", seed, 0, None),
            "chunk": None if chunk is None else check_count("chunk", chunk, 1, None),
        }
        super().__init__(encoder, class_names, settings)
        self._student = copy_encoder(encoder)
        model = _model(self._student).requires_grad_(False)
        self._matrices = self._find(model)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for matrix in self._matrices:
            out, width = matrix.shape
            if rank > min(out, width):
                raise ValueError(
                    f"rank: expected at most {min(out, width)}, the full rank of {matrix.address} "
                    f"({out}, {width}), got {rank}"
                )
            a = torch.empty(rank, width, dtype=self.dtype)
            nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            self.A[_key(matrix)] = nn.Parameter(a.to(encoder.device))
            self.B[_key(matrix)] = nn.Parameter(
                torch.zeros(out, rank, dtype=self.dtype, device=encoder.device)
            )
        attach(model, self._updates(self._matrices), scale=self._scale)
        self._prompts = _Prompts(self._student, self.words, settings["templates"], chunk)
        moving = {matrix.tower for matrix in self._matrices}
        self._image_moves, self._text_moves = "image" in moving, "text" in moving
        self._text: Tensor | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What is updated."""
        return self._matrices

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        text = self.text()

        def make() -> tuple[list[Term], Tensor]:
            with_patches = self._settings["loss"] == "locoop"
            found = self._encode(batch.image, local=with_patches)
            z = images_of(Batch(found.image, batch.labels), self.encoder.embed_dim, self.dtype)
            if not with_patches or found.local is None:
                s = matmul_classes(unit_rows(z), text)
                term, nearest = classified(s, batch.labels, self.tau)
                return [term], nearest
            local = found.local.to(self.dtype)
            parts = locoop_terms(
                z, local, text, batch.labels, tau=self.tau, top_k=self._settings["top_k"]
            )
            b, ood = len(z), parts.ood_patches
            return [
                Term("cross_entropy", parts.cross_entropy * b, b),
                Term("patches", parts.patches * ood, ood, self._settings["weight"]),
                Term("ood_patches", ood.to(z.dtype), float(b * local.shape[1]), 0.0),
            ], parts.predicted

        return or_nothing(batch, self._connected(text), make)

    def text(self) -> Tensor:
        """(K, D) unit text features of the updated tower, differentiable in its updates."""
        if self._text_moves:
            return self._prompts().to(self.dtype)
        if self._text is None:
            with torch.no_grad():
                self._text = self._prompts().to(self.dtype)
        return self._text

    def adapted(self, encoder: Encoder) -> Encoder:
        """A copy of ``encoder`` with the updates merged into its weights.

        Its fingerprint is another, so that texts are encoded again and caches do not mix.

        Raises:
            ModelError: if its matrices are not those of the encoder trained on.
        """
        found = copy_encoder(encoder, name=f"{encoder.name} + lora")
        model = _model(found)
        kept = [p.requires_grad for p in model.parameters()]
        matrices = self._find(model)
        mine = [(m.address, m.shape) for m in self._matrices]
        if [(m.address, m.shape) for m in matrices] != mine:
            raise ModelError(f"{encoder.name} does not have the matrices of {self.encoder.name}")
        attach(model, self._updates(matrices), scale=self._scale)
        merge(model)
        for parameter, needed in zip(model.parameters(), kept, strict=True):
            parameter.requires_grad_(needed)
        return found

    @property
    def _scale(self) -> float:
        return float(self._settings["alpha"] / self._settings["rank"])

    def _find(self, model: nn.Module) -> tuple[Matrix, ...]:
        s = self._settings
        return find(model, towers=s["towers"], kinds=s["kinds"], layers=s["layers"])

    def _updates(self, matrices: Sequence[Matrix]) -> dict[Matrix, Factors]:
        return {m: (self.A[_key(m)], self.B[_key(m)]) for m in matrices}

    def _encode(self, pixels: Tensor, *, local: bool) -> ImageFeatures:
        # encoders switch gradients off around this function; here they are what is wanted
        encode = inspect.unwrap(type(self._student).encode_image)
        with torch.set_grad_enabled(self._image_moves and torch.is_grad_enabled()):
            found: ImageFeatures = encode(self._student, pixels, local=local)
        return found

    def _connected(self, text: Tensor) -> Tensor:
        """``text``, connected to a trained number also where the text tower is not trained."""
        if text.requires_grad or not torch.is_grad_enabled():
            return text
        return text + 0.0 * next(iter(self.B.values())).sum()


class _Prompts:
    """Class prompts as the student encodes them now: (K, D) unit rows, with gradient."""

    def __init__(
        self, encoder: Encoder, words: Sequence[str], templates: Any, chunk: int | None
    ) -> None:
        from fastood.data.prompts import fill, resolve_templates

        self._encode = []
        for template in resolve_templates(templates):
            prompts = [fill(template, word) for word in words]
            for note in encoder.warn_prompts(prompts):  # names cut, words without meaning
                warnings.warn(note, RuntimeWarning, stacklevel=4)
            tokens = encoder.tokenize(prompts)
            module = encoder.text_module()
            if tokens is None or module is None:
                raise ModelError(f"{encoder.name} has no text tower that takes tokens")
            tower = text_tower(module)
            self._encode.append(
                _whole(encoder, tokens)
                if isinstance(tower, str)
                else _packed(PromptEncoder(encoder, fixed(tokens, tower.ends(tokens)), chunk=chunk))
            )

    def __call__(self) -> Tensor:
        rows = [unit_rows(encode()) for encode in self._encode]
        return rows[0] if len(rows) == 1 else unit_rows(torch.stack(rows).mean(dim=0))


def _whole(encoder: Encoder, tokens: Tensor) -> Any:
    return lambda: encoder.encode_tokens(tokens.to(encoder.device))


def _packed(prompts: PromptEncoder) -> Any:
    return lambda: prompts(None)


def _model(encoder: Encoder) -> nn.Module:
    found: nn.Module = encoder.model  # type: ignore[attr-defined]
    return found


def _key(matrix: Matrix) -> str:
    return matrix.address.replace(".", "_")


def _listed(value: Iterable[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
