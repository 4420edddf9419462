"""Tip-Adapter and Tip-Adapter-F: a cache of few-shot features beside the class prompts.

    key_i = norm( mean over views of the features as the tower gave them )
    cache_k(z) = Σ_{i in class k} exp(-beta (1 - z key_i))
    logits = γ z T' + alpha cache

Labels are kept as class numbers, one-hot rows never: keys are sorted by class and the sum over a
class is a sum over neighbours.

Source: arXiv 2207.09519. Different from the authors' code: alpha and beta are chosen on validation
data (there on the test set, for ImageNet); keys that are trained are a copy (there a view, so that
training changed the training-free cache as well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastood.models.base import Encoder
from fastood.scores.bank import ClassBank, Similarities
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_scalar,
    check_width,
    row_blocks,
    unit_rows,
    working,
)
from fastood.tuning.inputs import labels_of
from fastood.tuning.method import Batch, Method, Needs, Term
from fastood.tuning.recipes import RECIPES, Recipe
from fastood.tuning.tip_grid import GridResult, grid_maxima, published_grid, search
from fastood.tuning.zero_shot import fixed_text

__all__ = ["TipAdapter", "TipAdapterF", "TipHead", "cache_values", "published_alpha_beta"]

_PUBLISHED = {"stanfordcars": (3.0, 1.0), "caltech101": (3.0, 1.0)}

_VIEWS = 10

_BATCH = 256
"""Images asked for at a time: live ones go through the image tower."""

Scale = Literal["cosine", "logit"]


def published_alpha_beta(dataset: str | None = None) -> tuple[float, float]:
    """The authors' initial (alpha, beta) of a set; (1.17, 1) of ImageNet, Pets, Food and others.

    >>> published_alpha_beta("stanford_cars"), published_alpha_beta()
    ((3.0, 1.0), (1.17, 1.0))
    """
    key = "".join(c for c in (dataset or "").lower() if c.isalnum())
    return _PUBLISHED.get(key, (1.17, 1.0))


def cache_values(
    image: Tensor, keys: Tensor, key_labels: Tensor, classes: int, beta: float
) -> Tensor:
    """cache_k(z) = Σ_{i in k} exp(-beta (1 - z key_i)), differentiable in image and keys.

    Args:
        image: (B, D) unit rows; keys: (M, D); key_labels: (M,) int64, ascending.
        classes: K.
    Returns:
        (B, K); 0 for a class without keys.
    """
    kernel = torch.exp(beta * (keys @ image.mT) - beta)
    counts = torch.bincount(key_labels, minlength=classes)
    each, rest = divmod(len(keys), max(classes, 1))
    if rest == 0 and each > 0 and bool((counts == each).all()):
        return kernel.view(classes, each, len(image)).sum(dim=1).mT
    return kernel.new_zeros(classes, len(image)).index_add(0, key_labels, kernel).mT


class TipHead:
    """What a trained or training-free cache makes of features; see ``TipAdapter``.

    Attributes:
        logit_scale: γ of ``scale="cosine"``, 1 of ``scale="logit"``.
        fingerprint: hex digest of all it computes with.
        dim: D.
    """

    def __init__(
        self,
        bank: ClassBank,
        keys: Tensor,
        key_labels: Tensor,
        *,
        alpha: float,
        beta: float,
        logit_scale: float,
        scale: Scale,
        fingerprint: str,
    ) -> None:
        self.bank, self.keys, self.key_labels = bank, keys, key_labels
        self.alpha, self.beta, self.scale = alpha, beta, scale
        self.gamma = logit_scale
        self.logit_scale = logit_scale if scale == "cosine" else 1.0
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def dim(self) -> int:
        return self.bank.dim

    @property
    def device(self) -> torch.device:
        return self.bank.device

    def to(self, *args: Any, **kwargs: Any) -> TipHead:
        """The same on another device or in another float dtype."""
        moved = object.__new__(TipHead)
        moved.__dict__.update(self.__dict__)
        moved.bank = self.bank.to(*args, **kwargs)
        moved.keys = self.keys.to(*args, **kwargs)
        moved.key_labels = self.key_labels.to(moved.keys.device)
        return moved

    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Similarities of ``features (B, D)`` with cache, of ``local (B, P, D)`` without.

        Raises:
            ValueError: on mismatched D or device, NaN, Inf or zero rows.
        """
        found = self.bank.similarities(features, local)
        image, patches = found.image, found.local
        if self.alpha != 0:  # 0 times a number is 0, but adding it may turn -0 into 0
            z = unit_rows(working(features))
            keys = self.keys.to(z.dtype)
            cache = torch.cat(
                [
                    cache_values(z[rows], keys, self.key_labels, len(self), self.beta)
                    for rows in row_blocks(len(z), max(len(keys), 1))
                ]
            )
            image = image + (self.alpha / self.gamma) * cache
        if self.scale == "logit":
            image = self.gamma * image
            patches = None if patches is None else self.gamma * patches
        return Similarities(image, patches)


class TipAdapter(Method):
    """Tip-Adapter: similarities = z T' + (alpha/γ) cache(z), nothing is trained.

    ``prepare`` builds the cache from the training images, ``choose`` picks alpha and beta on
    validation data by the published grid. Patches meet the class prompts alone: the cache holds
    whole images (our choice; the paper has no patches).

    Args:
        alpha, beta: weight and sharpness of the cache; default the authors' for ImageNet, see
            ``published_alpha_beta``. At alpha = 0 this is zero-shot CLIP.
        templates: prompts of the classes; the authors use the set's own (``"pets"``, ``"food"``,
            ``"dtd"``, ``"openai-imagenet-7"`` for ImageNet).
        scale: ``"cosine"`` divides the logits by γ, so that they stand beside zero-shot
            similarities; ``"logit"`` gives them as they are, and tau = 1 then means what tau = 1/γ
            means otherwise. Which of them OOD studies used is not known (unverified).
        views: augmented views averaged in a key, where the images can be augmented anew (the
            authors: 10 of random crops (.5, 1) and flips); None takes those there are, or 10.
        chosen: how alpha and beta were chosen; filled by ``choose``, kept with the method.
    Raises:
        ValueError: alpha or beta negative, an unknown scale.
    """

    name: ClassVar[str] = "tip"
    needs: ClassVar[Needs] = "features"
    recipe: ClassVar[Recipe] = RECIPES["tip"]
    local_note: ClassVar[str] = "patches meet the class prompts, without the cache (our choice)"

    text: Tensor
    key_labels: Tensor
    keys: Tensor

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        alpha: float = 1.17,
        beta: float = 1.0,
        templates: str | Sequence[str] = "coop",
        scale: Scale = "cosine",
        views: int | None = None,
        chosen: Mapping[str, Any] | None = None,
    ) -> None:
        alpha, beta = _not_negative("alpha", alpha), _not_negative("beta", beta)
        if scale not in ("cosine", "logit"):
            raise ValueError(f'scale: expected "cosine" or "logit", got {scale!r}')
        if views is not None:
            views = check_count("views", views, 1, None)
        templates = templates if isinstance(templates, str) else list(templates)
        super().__init__(
            encoder,
            class_names,
            {
                "alpha": alpha,
                "beta": beta,
                "templates": templates,
                "scale": scale,
                "views": views,
                "chosen": None if chosen is None else dict(chosen),
            },
        )
        text = fixed_text(encoder, self.words, templates, self.dtype)
        self.register_buffer("text", text, persistent=False)
        empty = self.text.new_empty(0, encoder.embed_dim)
        self.register_buffer("key_labels", torch.empty(0, dtype=torch.int64, device=empty.device))
        self._set_keys(empty)

    @property
    def alpha(self) -> float:
        return float(self._settings["alpha"])

    @property
    def beta(self) -> float:
        return float(self._settings["beta"])

    def _set_keys(self, keys: Tensor) -> None:
        self.register_buffer("keys", keys)

    def prepare(self, data: Any) -> None:
        """Build the cache from the training images: the mean of their views, normalised.

        Raises:
            ValueError: as ``set_cache``.
        """
        views = self._settings["views"] or getattr(data, "views", None) or _VIEWS
        index = torch.arange(len(data.labels))
        total: Tensor | None = None
        for view in range(int(views)):
            parts = [data.batch(some, view).image.to(self.text) for some in index.split(_BATCH)]
            rows = torch.cat(parts) if parts else self.text.new_empty(0, self.text.shape[1])
            total = rows if total is None else total + rows
        if total is None:
            raise ValueError("data: expected at least one view of the training images")
        self.set_cache(total / views, data.labels)

    def set_cache(self, features: Tensor, labels: Tensor) -> None:
        """Make ``features (N, D)``, any norm, the keys, and ``labels (N,)`` their classes.

        Raises:
            ValueError: widths that do not fit, labels outside 0..K-1, classes without an image.
        """
        check_features("features", features, (2,), "(N, D)")
        features = features.detach().to(self.text)
        check_width(features, self.text, ("features", "text"))
        owners = labels_of(labels, features, len(self.text))
        without = (torch.bincount(owners, minlength=len(self.text)) == 0).nonzero()[:, 0].tolist()
        if without:
            shown = ", ".join(self.class_names[i] for i in without[:5])
            raise ValueError(
                f"labels: expected at least one image of every class, {len(without)} of "
                f"{len(self.text)} have none, first: {shown}"
            )
        order = torch.argsort(owners, stable=True)
        self.key_labels = owners[order]
        self._set_keys(unit_rows(features)[order])

    def choose(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        dataset: str | None = None,
        max_beta: float | None = None,
        max_alpha: float | None = None,
        select_on: Literal["validation", "test"] = "validation",
    ) -> GridResult:
        """Take alpha and beta from the published grid, by accuracy on held-out images.

        Args:
            features, labels: (N, D) and (N,) of validation images.
            dataset: whose grid maxima to use, if not given themselves; default ImageNet's.
            select_on: ``"test"`` says that the images are those that will be reported on. The
                authors do so for ImageNet; it makes accuracies optimistic, and is recorded.
        Raises:
            ValueError: no images, or as ``fastood.tuning.tip_grid.search``.
        """
        if select_on not in ("validation", "test"):
            raise ValueError(f'select_on: expected "validation" or "test", got {select_on!r}')
        self._need_cache()
        default_beta, default_alpha = grid_maxima(dataset)
        betas, alphas = published_grid(
            default_beta if max_beta is None else max_beta,
            default_alpha if max_alpha is None else max_alpha,
        )
        check_features("features", features, (2,), "(N, D)")
        found = search(
            features.to(self.text.device),
            labels,
            self.text,
            self.keys.detach(),
            self.key_labels,
            logit_scale=self.encoder.logit_scale,
            betas=betas,
            alphas=alphas,
        )
        before = self._settings["chosen"] or {}
        self._settings["chosen"] = {
            "on": select_on,
            "images": found.images,
            "accuracy": found.accuracy,
            "initial": before.get("initial", [self.alpha, self.beta]),
            "grid": [len(betas), betas[-1], len(alphas), alphas[-1]],
        }
        self._settings["alpha"], self._settings["beta"] = found.alpha, found.beta
        return found

    def head(self) -> TipHead:
        """Class prompts and cache as they are now.

        Raises:
            ValueError: before ``prepare`` or ``set_cache``.
        """
        self._need_cache()
        return TipHead(
            ClassBank(self.text),
            self.keys.detach().clone(),
            self.key_labels.clone(),
            alpha=self.alpha,
            beta=self.beta,
            logit_scale=self.encoder.logit_scale,
            scale=self._settings["scale"],
            fingerprint=self.fingerprint(),
        )

    def terms(self, batch: Batch) -> tuple[list[Term], Tensor]:
        """Cross-entropy of the logits, and the predicted classes."""
        self._need_cache()
        z = unit_rows(batch.image.to(self.text))
        alpha, beta = self._trained_with()
        cache = cache_values(z, self.keys, self.key_labels, len(self.text), beta)
        logits = self.encoder.logit_scale * (z @ unit_rows(self.text).mT) + alpha * cache
        y = labels_of(batch.labels, z, len(self.text))
        loss = F.cross_entropy(logits, y, reduction="sum")
        return [Term("cross_entropy", loss, float(len(y)))], logits.detach().argmax(dim=-1)

    def _trained_with(self) -> tuple[float, float]:
        """alpha and beta as they were before ``choose``: training never sees the chosen ones."""
        chosen = self._settings["chosen"] or {}
        alpha, beta = chosen.get("initial", (self.alpha, self.beta))
        return float(alpha), float(beta)

    def _need_cache(self) -> None:
        if not len(self.keys):
            raise ValueError(f"{self.name}: the cache is empty; call prepare or set_cache first")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # as many keys as were saved
        saved = state_dict.get(prefix + "keys")
        if isinstance(saved, Tensor) and saved.shape != self.keys.shape:
            check_width(self.text, saved.to(self.text), ("text", "keys"))
            self._set_keys(torch.empty_like(saved, device=self.text.device, dtype=self.text.dtype))
            self.key_labels = self.key_labels.new_empty(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the keys are trained, from those of Tip-Adapter on.

    Cross-entropy of the logits with the initial alpha and beta; afterwards ``choose`` picks both on
    validation data. Keys are not normalised again while they are trained, as published. Everything
    else as ``TipAdapter``.
    """

    name: ClassVar[str] = "tip-f"
    recipe: ClassVar[Recipe] = RECIPES["tip-f"]

    def _set_keys(self, keys: Tensor) -> None:
        self.keys = nn.Parameter(keys.clone())


def _not_negative(name: str, value: Any) -> float:
    number = check_scalar(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    return number
