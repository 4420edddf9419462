"""What LoRA and SeTAR+FT share: low-rank updates of a model's towers, trained on pixels.

They differ in which matrices are updated, in where A and B start, and in what stays frozen below.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastood.errors import ModelError
from fastood.models.base import Encoder, ImageFeatures
from fastood.models.classifier import ClassifierEncoder, class_order
from fastood.models.copies import copy_encoder, network_of
from fastood.models.matrices import Matrix
from fastood.prompts.encoder import PromptEncoder
from fastood.prompts.layout import fixed
from fastood.prompts.tower import text_tower
from fastood.scores.inputs import check_count, check_scalar, matmul_classes, unit_rows
from fastood.setar.authors import backbone_of, published
from fastood.tuning.augment import Augmentation
from fastood.tuning.locoop import locoop_terms
from fastood.tuning.lowrank import Factors, attach, merge
from fastood.tuning.method import Batch, Method, Needs, Term
from fastood.tuning.parts import classified, images_of, or_nothing

__all__ = ["SETAR_TRAIN", "LowRankMethod", "check_patches", "loss_settings"]

SETAR_TRAIN = Augmentation(scale=(0.9, 1.0))
"""SeTAR+FT and its LoRA baseline: crop (.9, 1), flip.

That is what the authors do for CLIPs. For their Swin they crop (.08, 1), change brightness,
contrast and saturation by up to .4, and let it skip paths at random (it trains in training mode),
which is not done here.
"""


class LowRankMethod(Method):
    """Low-rank updates of chosen matrices of both towers; prompts stay fixed.

    Of a classifier the image tower is updated and the last layer stays: its logits stand where
    cosines stand for CLIP, those of patches too, and tau is 1.

    Subclasses say what is updated and call ``_attach``. Their settings hold ``loss``, ``weight``,
    ``top_k``, ``templates`` and ``chunk`` as ``loss_settings`` gives them.

    ``adapted(encoder)`` is the encoder with merged weights, and any prompts, scores and adapters
    work with it. Texts are encoded anew in every step where the text tower is updated.
    """

    needs: ClassVar[Needs] = "pixels"
    changes_towers: ClassVar[bool] = True
    local_note: ClassVar[str] = "patches of the changed image tower, against the changed texts"

    def __init__(
        self, encoder: Encoder, class_names: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        super().__init__(encoder, class_names, settings)
        self._student = copy_encoder(encoder)
        self._linear = encoder.head() is not None
        self._matrices: tuple[Matrix, ...] = ()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self._text: Tensor | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What is updated."""
        return self._matrices

    @property
    def trainable(self) -> int:
        """Trained numbers: Σ r (in + out)."""
        return sum(p.numel() for p in self.parameters())

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        text = self.text()
        with_patches = self._settings["loss"] == "locoop"
        weight = self._settings["weight"]

        def make() -> tuple[list[Term], Tensor]:
            found = self._encode(batch.image, local=with_patches)
            z = images_of(Batch(found.image, batch.labels), self.encoder.embed_dim, self.dtype)
            if self._linear:
                z = _and_one(z)
            if not with_patches or found.local is None:
                s = matmul_classes(z if self._linear else unit_rows(z), text)
                term, nearest = classified(s, batch.labels, self.tau)
                return [term], nearest
            local = found.local.to(self.dtype)
            parts = locoop_terms(
                z,
                _and_one(local) if self._linear else local,
                text,
                batch.labels,
                tau=self.tau,
                top_k=self._settings["top_k"],
                normalize=not self._linear,
            )
            b, ood = len(z), parts.ood_patches
            return [
                Term("cross_entropy", parts.cross_entropy * b, b),
                Term("patches", parts.patches * ood, ood, weight),
                Term("ood_patches", ood.to(z.dtype), float(b * local.shape[1]), 0.0),
            ], parts.predicted

        names = [("cross_entropy", 1.0)]
        if with_patches:
            names += [("patches", weight), ("ood_patches", 0.0)]
        return or_nothing(batch, self._connected(text), make, names)

    def text(self) -> Tensor:
        """(K, D) unit text features of the updated tower, differentiable in its updates.

        Of a classifier (K, D + 1): weights and bias of its last layer.
        """
        if self._moves("text"):
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
        found = copy_encoder(encoder, name=f"{encoder.name} + {self.name}")
        model = network_of(found)
        kept = [p.requires_grad for p in model.parameters()]
        matrices = self._find(model)
        mine = [(m.address, m.shape) for m in self._matrices]
        if [(m.address, m.shape) for m in matrices] != mine:
            raise ModelError(f"{encoder.name} does not have the matrices of {self.encoder.name}")
        self._put_on(model, matrices)
        merge(model)
        for parameter, needed in zip(model.parameters(), kept, strict=True):
            parameter.requires_grad_(needed)
        return found

    # -- for subclasses --------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        """By which B A is multiplied."""
        raise NotImplementedError

    def _find(self, model: nn.Module) -> tuple[Matrix, ...]:
        """The matrices of ``model`` that are updated."""
        raise NotImplementedError

    def _start(self, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ whose product is part of the weights already; None if nothing is."""
        del matrix
        return None

    def _attach(self, factors: Mapping[Matrix, tuple[Tensor, Tensor]]) -> None:
        """Train these A (r, in) and B (out, r); the copy of the encoder has them from now on."""
        device, dtype = self.encoder.device, self.dtype
        for matrix, (a, b) in factors.items():
            for held, x in ((self.A, a), (self.B, b)):
                held[key_of(matrix)] = nn.Parameter(
                    x.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
                )
        self._matrices = tuple(factors)
        model = network_of(self._student).requires_grad_(False)
        self._put_on(model, self._matrices)
        self._prompts: Callable[[], Tensor]
        if self._linear:
            self._prompts = _last_layer(self._student, self.class_names)
        else:
            self._prompts = _Prompts(
                self._student, self.words, self._settings["templates"], self._settings["chunk"]
            )

    def _put_on(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        updates: dict[Matrix, Factors] = {
            m: (self.A[key_of(m)], self.B[key_of(m)]) for m in matrices
        }
        start = {m: found for m in matrices if (found := self._start(m)) is not None}
        attach(model, updates, scale=self._scale, start=start)

    def _moves(self, tower: str) -> bool:
        return any(matrix.tower == tower for matrix in self._matrices)

    def _encode(self, pixels: Tensor, *, local: bool) -> ImageFeatures:
        # encoders switch gradients off around this function; here they are what is wanted
        encode = inspect.unwrap(type(self._student).encode_image)
        with torch.set_grad_enabled(self._moves("image") and torch.is_grad_enabled()):
            found: ImageFeatures = encode(self._student, pixels, local=local)
        return found

    def _connected(self, text: Tensor) -> Tensor:
        """``text``, connected to a trained number also where the text tower is not trained."""
        if text.requires_grad or not torch.is_grad_enabled():
            return text
        return text + 0.0 * next(iter(self.B.values())).sum()


def check_patches(name: str, encoder: Encoder, class_names: Sequence[str], loss: str) -> None:
    """Refuse a loss that cannot be computed for this encoder and these classes.

    Raises:
        ValueError: an unknown loss; fewer than two classes for ``"locoop"``.
        ModelError: ``"locoop"`` without patch features.
    """
    if loss not in ("locoop", "ce"):
        raise ValueError(f'loss: expected "locoop" or "ce", got {loss!r}')
    if loss == "locoop" and encoder.no_local is not None:
        raise ModelError(
            f'{name} with loss="locoop" trains with patch features; {encoder.name} has none '
            f'({encoder.no_local}); use loss="ce"'
        )
    if loss == "locoop" and len(class_names) < 2:
        raise ValueError(f"class_names: expected at least 2 classes, got {len(class_names)}")


def loss_settings(
    encoder: Encoder,
    classes: int,
    *,
    loss: str,
    weight: float | None,
    top_k: int | None,
    templates: str | Sequence[str],
    chunk: int | None,
) -> dict[str, Any]:
    """The settings of the loss and the prompts, checked, as JSON values.

    ``weight`` and ``top_k`` are by default those published for the network.

    Raises:
        ValueError: numbers out of range.
    """
    rule = published(backbone_of(network_of(encoder)), max(classes, 2))
    if loss == "locoop":
        if top_k is None:
            top_k = rule.top_k
        elif isinstance(top_k, int) and top_k >= classes:
            raise ValueError(
                f"top_k: expected below the {classes} classes, got {top_k}: no patch could be OOD"
            )
        top_k = check_count("top_k", top_k, 1, classes - 1, high_name="K - 1 = ")
    return {
        "loss": loss,
        "weight": check_scalar("weight", rule.weight if weight is None else weight),
        "top_k": top_k,
        "templates": templates if isinstance(templates, str) else list(templates),
        "chunk": None if chunk is None else check_count("chunk", chunk, 1, None),
    }


def key_of(matrix: Matrix) -> str:
    """Of its factors in a state dict."""
    return matrix.address.replace(".", "_")


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
                warnings.warn(note, RuntimeWarning, stacklevel=5)
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


def _and_one(x: Tensor) -> Tensor:
    """For the bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def _last_layer(encoder: Encoder, class_names: Sequence[str]) -> Callable[[], Tensor]:
    """(K, D + 1) weights and bias of a classifier in the order of ``class_names``.

    Raises:
        ModelError: another number of classes, or a last layer that is not linear.
    """
    layer = encoder.classifier() if isinstance(encoder, ClassifierEncoder) else None
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{encoder.name}: expected a linear last layer, got {type(layer).__name__}"
        )
    weight = layer.weight
    if len(class_names) != len(weight):
        raise ModelError(
            f"class_names: expected the {len(weight)} classes of {encoder.name}, got "
            f"{len(class_names)}; its last layer is not trained"
        )
    order = class_order(encoder, class_names)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    rows = torch.cat([weight, bias[:, None]], dim=1).detach()[order].to(encoder.device)
    return lambda: rows


def _whole(encoder: Encoder, tokens: Tensor) -> Any:
    return lambda: encoder.encode_tokens(tokens.to(encoder.device))


def _packed(prompts: PromptEncoder) -> Any:
    return lambda: prompts(None)
