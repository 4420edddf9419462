"""A model with its classes and the scores asked of it: image sets in, oriented scores out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastood.data.classes import plain_name
from fastood.data.imageset import ImageSet
from fastood.errors import ModelError
from fastood.features.featureset import FeatureSet
from fastood.pipeline.checks import (
    check_labels,
    check_same_classes,
    check_set,
    check_training,
)
from fastood.pipeline.heads import build_head
from fastood.pipeline.methods import Fits, check_methods, split_fit_options
from fastood.scores.bank import ClassBank, Head
from fastood.scores.fitted import FIT_OPTIONS
from fastood.scores.many import scores_of_features
from fastood.scores.registry import SCORES, Methods, default_methods, entries, resolve
from fastood.scores.result import ScoreKey, Scores

if TYPE_CHECKING:
    from fastood.calibration import Threshold
    from fastood.features.cache import FeatureCache
    from fastood.features.encode import Progress
    from fastood.models.base import Encoder
    from fastood.pipeline.evaluation import Evaluation

__all__ = ["Pipeline", "ScoredSet"]


@dataclass(frozen=True)
class ScoredSet:
    """Every asked score of every readable image of a set.

    Attributes:
        features: the set they were computed from (names, paths, what was skipped).
        predicted: (n,) index into the pipeline's ``class_names``.
        labels: (n,) index of the true class among them, -1 where unknown; None if the set's
            classes are not the pipeline's.
        scores: label to ``Scores``, all ``higher="id"``.
    """

    features: FeatureSet
    predicted: np.ndarray
    labels: np.ndarray | None
    scores: Mapping[str, Scores]

    def __len__(self) -> int:
        return len(self.predicted)


class Pipeline:
    """A frozen model, its class prompts, and the scores to compute.

    Args:
        encoder: the network; None if every set comes as features.
        class_names: K names; None takes those of a classifier that has its own.
        templates: template set by name (``"mcm"``), one template, or several.
        methods: scores, as for ``fastood.score``; None takes all that need neither negative
            labels nor training features. Options of ``fit_mahalanobis`` may be given among those
            of ``mahalanobis``.
        negatives: whole prompts of negative labels, for ``neg_label``.
        groups: number of groups they are split into.
        text: (K, D) ready class features instead of a text tower.
        head: an adapted model with ``similarities(features, local)`` instead of class features.
        adapt: files of ``fastood train``, in the order they were trained: changed towers first,
            then at most one that brings a head with classes of its own.
        train: labelled images or features that ``mahalanobis`` and ``knn`` are fitted to.
        logit_scale: γ where there is no encoder to read it from; 100 if left open, as for CLIP.
        allow_duplicates: let classes share a name (they tie exactly), with a warning.
        cache: where features are kept; None keeps them in memory.
        batch_size, workers, strict, verify: see ``encode_images``.
        progress: called with (images done, images in total, set name).

    Raises:
        ValueError: duplicate or empty class names, unknown scores or options, unmet needs.
        ModelError: a model without text tower, patch features or classes where they are needed.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        class_names: Sequence[str] | None = None,
        *,
        templates: str | Iterable[str] = "mcm",
        methods: Methods | None = None,
        negatives: Sequence[str] | None = None,
        groups: int = 100,
        text: Tensor | None = None,
        head: Head | None = None,
        adapt: Sequence[str | os.PathLike[str]] = (),
        train: ImageSet | FeatureSet | None = None,
        logit_scale: float | None = None,
        allow_duplicates: bool = False,
        cache: FeatureCache | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        strict: bool = False,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(class_names, str):
            raise TypeError(f"class_names: expected a list of names, got the text {class_names!r}")
        if isinstance(adapt, (str, os.PathLike)):
            raise TypeError(f"adapt: expected a list of files, got {adapt!r}")
        self.adaptations: tuple[Mapping[str, Any], ...] = ()
        self._loaded = None if encoder is None else encoder.name  # before adaptations rename it
        if adapt:
            encoder, head, class_names = self._adapted(encoder, class_names, head, text, adapt)
        self.encoder, self.cache, self.progress = encoder, cache, progress
        self._encode_options: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "strict": strict,
            "verify": verify,
        }
        self.warnings: list[str] = []
        self._names: tuple[str, ...] | None = None if class_names is None else tuple(class_names)
        if logit_scale is None:
            logit_scale = 100.0 if encoder is None else encoder.logit_scale
        self.logit_scale = float(logit_scale)

        if methods is None:
            has_local = encoder is not None and encoder.no_local is None
            methods = default_methods(local=has_local, classes=len(self._names or ("", "")))
        asked, fit_options = split_fit_options(methods)
        check_training(entries(methods), train)
        check_labels(asked)
        has_negatives = negatives is not None or getattr(head, "negatives", None) is not None
        self._check_needs(asked, has_negatives, train)
        self._warn_unused(asked, negatives, train)
        self._groups = groups
        built = build_head(
            encoder,
            self._names,
            head=head,
            text=text,
            templates=templates,
            negatives=negatives,
            groups=groups,
            allow_duplicates=allow_duplicates,
            cache=cache,
        )
        self.head, self._names, self.digest = built.head, built.names, built.digest
        self.templates = built.templates
        self.warnings += built.warnings
        fits = Fits(fit_options, lambda: self.encode(_given(train)))
        self._methods = resolve(
            fits.filled(asked),
            logit_scale=self.logit_scale,
            negatives=has_negatives,
            classes=None if self._names is None else len(self._names),
        )
        self._fit_digests = fits.digests

    # -- what was set up ---------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        if self._names is None:
            raise ModelError("class_names: this model does not name its classes; give them")
        return self._names

    @property
    def wants_local(self) -> bool:
        """Whether any score needs patch features."""
        return any(spec.needs == "local" for spec, _ in self._methods.values())

    @property
    def model_fingerprint(self) -> str | None:
        """Digest of the weights and, with an adapted head, of the adaptation."""
        own = None if self.encoder is None else self.encoder.fingerprint
        adaptation = getattr(self.head, "fingerprint", None)
        return own if adaptation is None else f"{own}+{adaptation}"

    def keys(self) -> dict[str, ScoreKey]:
        """What each label stands for: score, complete options, model, prompts."""
        return {
            label: ScoreKey(
                spec.name,
                {**options, **self._fit_digests.get(label, {}), **self._grouping(spec.needs)},
                self.model_fingerprint,
                None if spec.needs == "fit" else self.digest,  # they look at features alone
            )
            for label, (spec, options) in self._methods.items()
        }

    def _grouping(self, needs: str | None) -> dict[str, Any]:
        """The number of groups of negative labels, which scores with them depend on."""
        if needs != "negatives":
            return {}
        own = getattr(self.head, "negatives", None)
        return {"groups": self._groups if own is None else len(own)}

    def formulas(self) -> dict[str, tuple[str, str]]:
        """Formula and source of each label."""
        return {label: (spec.formula, spec.source) for label, (spec, _) in self._methods.items()}

    # -- the way from images to scores -------------------------------------------------------

    def encode(self, images: ImageSet | FeatureSet, *, local: bool = False) -> FeatureSet:
        """Features of a set: computed, mapped from the cache, or returned as given."""
        if isinstance(images, FeatureSet):
            return images
        if self.encoder is None:
            raise ModelError(f"{images.name}: images need a model; without one, give features")
        from fastood.features.encode import encode_images

        return encode_images(
            self.encoder,
            images,
            local=local,
            cache=self.cache,
            progress=self.progress,
            **self._encode_options,
        )

    def check(self, *sets: ImageSet | FeatureSet) -> None:
        """Refuse sets that cannot be scored: features of another width, images without a model.

        Raises:
            DataError, ModelError, ValueError: as ``score`` would, but before any work.
        """
        width = getattr(self.head, "dim", None)
        if width is None and self.encoder is not None:
            width = self.encoder.embed_dim
        for given in sets:
            check_set(
                given,
                encoder=self.encoder,
                width=width if isinstance(width, int) else None,
                local=self.wants_local,
            )

    def score(self, images: ImageSet | FeatureSet) -> ScoredSet:
        """All asked scores of all readable images.

        Raises:
            DataError: if no image is readable, or one is not and ``strict``; if patch features are
                needed and the features given have none.
            ValueError: if features of another width than the classes are given.
        """
        self.check(images)
        features = self.encode(images, local=self.wants_local)
        device = self._device()
        parts: dict[str, list[np.ndarray]] = {label: [] for label in self._methods}
        predicted: list[np.ndarray] = []
        with torch.inference_mode():
            for chunk in features.blocks():
                image = chunk.image.to(device)
                local = (
                    chunk.local.to(device) if self.wants_local and chunk.local is not None else None
                )
                found = scores_of_features(self._methods, self.head, image, local, classes=True)
                if self._names is not None and found.k != len(self._names):
                    raise ValueError(
                        f"class_names: expected one for each of {found.k} classes of the head, "
                        f"got {len(self._names)}"
                    )
                if found.classes is not None:
                    predicted.append(found.classes.cpu().numpy())
                for label, values in found.values.items():
                    parts[label].append(values.cpu().numpy())
        return ScoredSet(
            features,
            np.concatenate(predicted),
            self._own_labels(features),
            {
                label: Scores(np.concatenate(parts[label]), "id", key, features.name)
                for label, key in self.keys().items()
            },
        )

    def evaluate(
        self,
        id_set: ImageSet | FeatureSet,
        ood_sets: Sequence[ImageSet | FeatureSet],
        **options: Any,
    ) -> Evaluation:
        """Score one ID set and any number of OOD sets, and compare them.

        Each set is encoded once, whatever the number of scores. See
        ``fastood.pipeline.evaluation.evaluate_sets`` for the options.
        """
        from fastood.pipeline.evaluation import evaluate_sets

        return evaluate_sets(self, id_set, ood_sets, **options)

    def calibrate(
        self, id_set: ImageSet | FeatureSet, *, score: str | None = None, tpr: float = 0.95
    ) -> Threshold:
        """A threshold that accepts ``tpr`` of in-distribution images, from a set of them.

        Args:
            score: label of the score; may be left out if there is only one.
        """
        from fastood.calibration import calibrate

        label = self.label(score)
        found = calibrate(self.score(id_set).scores[label], tpr=tpr)
        return replace(found, recipe=self.recipe())

    def recipe(self) -> dict[str, Any]:
        """Model, classes and templates by name, as a saved threshold keeps them."""
        return {
            "model": self._loaded,
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "adapt": [str(Path(made["file"]).absolute()) for made in self.adaptations],
        }

    def label(self, score: str | None) -> str:
        """The label ``score``, or the only one there is."""
        if score is None and len(self._methods) == 1:
            return next(iter(self._methods))
        if score not in self._methods:
            raise ValueError(f"score: expected one of {', '.join(self._methods)}, got {score!r}")
        return score

    def plan(
        self,
        id_set: ImageSet | FeatureSet,
        ood_sets: Sequence[ImageSet | FeatureSet],
        *,
        calibration: ImageSet | FeatureSet | None = None,
        tpr: float = 0.95,
        aupr: str = "ap",
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """What an evaluation with these options would be of, known before anything is encoded."""
        from fastood.pipeline.checks import check_settings
        from fastood.pipeline.evaluation import describe_plan

        tpr = check_settings(tpr=tpr, aupr=aupr, resamples=resamples, seed=seed)
        settings = {"tpr": tpr, "aupr": aupr, "resamples": resamples, "seed": seed}
        return describe_plan(self, id_set, ood_sets, calibration=calibration, settings=settings)

    # -- construction ------------------------------------------------------------------------

    def _adapted(
        self,
        encoder: Encoder | None,
        class_names: Sequence[str] | None,
        head: Head | None,
        text: Tensor | None,
        files: Sequence[str | os.PathLike[str]],
    ) -> tuple[Encoder, Head | None, Sequence[str] | None]:
        """The model with its adaptations, and their classes if they bring any."""
        from fastood.tuning.adaptation import adapt

        if encoder is None:
            raise ModelError("adapt: expected the model that was adapted, got none")
        found = adapt(encoder, files)
        self.adaptations = found.made_of
        if found.head is None:
            return found.encoder, head, class_names
        if head is not None or text is not None:
            raise ValueError(
                f"adapt: {files[-1]} brings its own classes; expected no head or text beside it"
            )
        if class_names is not None:
            check_same_classes(class_names, found.class_names or (), str(files[-1]))
        return found.encoder, found.head, found.class_names

    def _check_needs(
        self,
        asked: Mapping[str, tuple[str, Mapping[str, Any]]],
        negatives: bool,
        train: ImageSet | FeatureSet | None,
    ) -> None:
        """Refuse what cannot work before a single prompt is encoded."""
        check_methods(
            asked,
            trained=train is not None,
            logit_scale=self.logit_scale,
            negatives=negatives,
            classes=None if self._names is None else len(self._names),
        )
        reason = None if self.encoder is None else self.encoder.no_local
        for name, _ in asked.values():
            if reason is not None and SCORES[name].needs == "local":
                raise ModelError(f"{name}: {reason}")

    def _warn_unused(
        self,
        asked: Mapping[str, tuple[str, Mapping[str, Any]]],
        negatives: Sequence[str] | None,
        train: ImageSet | FeatureSet | None,
    ) -> None:
        names = {name for name, _ in asked.values()}
        if negatives is not None and "neg_label" not in names:
            self.warnings.append("negatives: given, but no score asked for uses them (neg_label)")
        if train is not None and not names & set(FIT_OPTIONS):
            self.warnings.append(
                "train: given, but no score asked for is fitted (mahalanobis, knn)"
            )

    def _device(self) -> torch.device:
        if self.encoder is not None:
            return self.encoder.device
        return self.head.device if isinstance(self.head, ClassBank) else torch.device("cpu")

    def _own_labels(self, features: FeatureSet) -> np.ndarray | None:
        """The set's labels as indices of our classes, or None if its classes are others."""
        theirs, ours, labels = features.class_names, self._names, features.labels
        if labels is None or theirs is None or ours is None:
            return None
        if tuple(theirs) == ours:  # also where two classes share a name
            return np.where(labels < 0, -1, labels)
        own = {name: k for k, name in enumerate(ours)}
        spelled = {plain_name(name): k for k, name in enumerate(ours)}
        if len(spelled) < len(ours):  # "a_b" beside "a b": only the exact name tells them apart
            spelled = {}
        index = [own.get(name, spelled.get(plain_name(name), -1)) for name in theirs]
        if -1 in index or len(own) < len(ours):
            return None
        return np.where(labels < 0, -1, np.asarray(index, dtype=np.int64)[np.maximum(labels, 0)])


def _given(train: ImageSet | FeatureSet | None) -> ImageSet | FeatureSet:
    if train is None:  # _check_needs has refused this already
        raise ValueError("train: mahalanobis and knn need training images")
    return train
