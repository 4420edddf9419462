"""One detector class for every score: encoder, head, score and, where needed, a fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastood.detectors.checks import require_features, require_finite_scores
from fastood.detectors.encoding import Batch, encode, feature_batches
from fastood.detectors.fitting import Fitted
from fastood.detectors.settings import Configured
from fastood.errors import FastoodError
from fastood.features.featureset import FeatureSet
from fastood.models.base import ImageFeatures
from fastood.scores.bank import Similarities
from fastood.scores.many import score as score_features
from fastood.scores.many import scores_of_similarities
from fastood.scores.registry import SCORES
from fastood.scores.result import ScoreKey, Scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Detector", "NotFittedError"]


class NotFittedError(FastoodError, RuntimeError):
    """A detector that learns from training features was asked before ``fit``."""


class Detector(Configured):
    """An OOD detector around one score. ``predict``: higher = OOD; ``confidence``: higher = ID.

    Args:
        score: a registered score, for example ``"mcm"`` (``fastood.scores.SCORES``).
        encoder: an ``Encoder``, any callable images → (B, D) features (for patch scores a pair
            with local features (B, P, D)), or None to work on features only. Networks are called
            as they are: put them into evaluation mode.
        head: the class side: text embeddings (K, D), a ``ClassBank``, the result of
            ``encode_classes``, or any object with ``similarities(features, local=None)``. None
            takes the encoder's own head, if it is a classifier. Not needed by knn and mahalanobis.
        logit_scale: γ of the model; where the field ties tau to the model, tau defaults to 1/γ.
            Default: the head's or the encoder's own; 0.01 if neither tells.
        prompts: digest of class names, templates and negatives, for ``key``; known already if
            ``head`` comes from ``encode_classes``. Default for bare class features: a digest of
            the features themselves.
        fingerprint: of the model, for ``key``; default: the encoder's own.
        **options: of the score (``tau``, ``c``, ``weight``, ``k``, ...) and of its fit
            (``normalize``, ``eps``, ``shrinkage``).

    Attributes:
        options: the complete options of the score.
        requires_fit: whether ``fit`` must come before ``predict``.
        hyperparameter_space: candidates for pytorch-ood's and OpenOOD's searches.

    Raises:
        ValueError: on an unknown score or option, negatives that are missing.
        TypeError: on a head that is none.

    Notes:
        NaN, Inf and zero features raise on every device. Labels follow pytorch-ood: OOD < 0; such
        samples are left out of a fit. Use the named constructors (``MCM``, ...) in pytorch-ood's
        benchmark: it then encodes each image once for all of them.

    Example:
        >>> text = torch.eye(3)
        >>> detector = Detector("mcm", head=text, tau=0.5)
        >>> detector.predict_features(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
        tensor([-0.7870, -0.3333])
    """

    # -- fitting -------------------------------------------------------------------------------

    def fit(self, data_loader: Any, *, device: torch.device | str | None = None) -> Self:
        """Fit on the ID samples of a loader of ``(images, labels)``; OOD labels < 0 are left out.

        Dicts with ``data`` and ``label``, a ``FeatureSet``, and (without an encoder) batches of
        features will do too. Returns at once where nothing is to be fitted, as pytorch-ood does.

        Raises:
            ValueError: if no ID sample comes, labels are missing, or features are unusable.
        """
        if device is not None:
            self.to(device)
        if not self.requires_fit:
            return self
        parts: list[Tensor] = []
        labels: list[Tensor] | None = []
        with torch.no_grad():
            for features, _, y in self._batches(data_loader, id_only=True):
                parts.append(features.to(self._device or features.device))
                if y is None:
                    labels = None
                elif labels is not None:
                    labels.append(y.cpu())
        if not parts:
            raise ValueError("data_loader: no in-distribution sample in it (labels >= 0)")
        return self.fit_features(torch.cat(parts), None if labels is None else torch.cat(labels))

    def fit_features(self, features: Tensor, labels: Any = None) -> Self:
        """Fit on ``features (N, D)`` with ``labels (N,)``; knn can do without labels.

        Raises:
            ValueError: on shapes that do not fit, NaN, Inf, zero rows, no ID sample, k > N, or
                missing labels.
        """
        if not self.requires_fit:
            return self
        features = require_features("features", features, 2, "(N, D)").detach()
        self._fitted = Fitted(
            self.score,
            features.to(self._device or features.device),
            None if labels is None else torch.as_tensor(labels),
            self._fit_options,
            self.options.get("k"),
        )
        return self

    # -- scoring -------------------------------------------------------------------------------

    def __call__(self, images: Tensor) -> Tensor:
        """The same as ``predict``."""
        return self.predict(images)

    def predict(self, images: Tensor) -> Tensor:
        """(B,) outlier scores of images ready for the encoder; **higher = OOD**.

        Raises:
            ValueError: without an encoder, on NaN, Inf or zero features (names the rows).
            NotFittedError: before ``fit`` where one is needed.
        """
        return -self.confidence(images)

    def predict_features(self, features: Tensor, local: Tensor | None = None) -> Tensor:
        """(B,) outlier scores of ``features (B, D)``; **higher = OOD**."""
        return -self.confidence_features(features, local)

    def predict_similarities(self, similarity: Tensor, local: Tensor | None = None) -> Tensor:
        """(B,) outlier scores of ready similarities (B, K), local (B, P, K); **higher = OOD**.

        In cosine units. Logits of a classifier are similarities at γ = 1: say ``logit_scale=1.0``.
        """
        if self.requires_fit or SCORES[self.score].needs == "negatives":
            raise ValueError(f"{self.score}: similarities to classes are not enough, give features")
        if self.needs_local and local is None:
            raise ValueError(f"{self.score}: needs patch similarities; give local=(B, P, K)")
        with torch.no_grad():
            asked = {self.score: (SCORES[self.score], self.options)}
            found = scores_of_similarities(asked, Similarities(similarity, local))
        return -require_finite_scores(self.score, found.values[self.score])

    def confidence(self, images: Tensor) -> Tensor:
        """(B,) scores of images, **higher = ID**: exactly what the functional score returns."""
        self._check_ready()
        return self.confidence_features(*self.encode(images))

    @torch.no_grad()
    def confidence_features(self, features: Tensor, local: Tensor | None = None) -> Tensor:
        """(B,) scores of ``features (B, D)``, ``local (B, P, D)``; **higher = ID**."""
        self._check_ready()
        features, local = self._checked(features, local)
        if self._fitted is not None:
            compute = SCORES[self.score].compute
            assert compute is not None  # a score that is fitted has one
            value = compute(features, fit=self._fitted.bank, **self.options)
        else:
            value = score_features(
                features,
                self.head,
                methods={self.score: (self.score, self.options)},
                local=local if self.needs_local else None,
            )[self.score]
        return require_finite_scores(self.score, value)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """(B,) int64: the nearest class, by the head if there is one, else by the fit.

        Raises:
            ValueError: if neither knows classes.
        """
        features, _ = self._checked(features, None)
        if self.head is not None:
            return self.head.similarities(features).image.max(dim=-1).indices
        found = None if self._fitted is None else self._fitted.classify(features)
        if found is None:
            raise ValueError(f"{self.score}: knows no classes; give a head, or labels to the fit")
        return found

    @torch.no_grad()
    def encode(self, images: Tensor) -> ImageFeatures:
        """Features of images ready for the encoder, with patches if the score needs them."""
        return encode(self.encoder, images, local=self.needs_local, device=self._device)

    # -- scores that know what they are --------------------------------------------------------

    def scores(self, source: Any, *, name: str = "") -> Scores:
        """Scores with orientation and key, ready for ``calibrate`` and the metrics.

        Args:
            source: features (B, D), images (B, 3, H, W), a ``FeatureSet``, or a loader of batches
                (of images with an encoder, of features without).
            name: of the image set; default: the FeatureSet's.
        Returns:
            ``Scores`` on the CPU with ``higher="id"``.
        Raises:
            ValueError: as ``confidence``; features of another model than the encoder.
        """
        self._check_ready()
        key = self.key
        if isinstance(source, FeatureSet) and source.provenance.get("fingerprint"):
            origin = source.provenance
            key = _agree(key, str(origin["fingerprint"]), str(origin.get("model")))
        values = [
            self.confidence_features(features, local).cpu().numpy()
            for features, local, _ in self._batches(source)
        ]
        found = np.concatenate(values) if values else np.zeros(0, np.float32)
        own = source.name if isinstance(source, FeatureSet) else ""
        return Scores(found, "id", key, name or own)

    def is_ood(self, source: Any, threshold: Any) -> Any:
        """``threshold.is_ood`` of the scores; it refuses those of another method or model."""
        return threshold.is_ood(self.scores(source))

    # -- small parts ---------------------------------------------------------------------------

    def _batches(self, source: Any, *, id_only: bool = False) -> Iterator[Batch]:
        images = None if self.encoder is None else self.encode
        return feature_batches(source, images, local=self.needs_local, id_only=id_only)

    def _check_ready(self) -> None:
        if self.requires_fit and self._fitted is None:
            raise NotFittedError(
                f"{type(self).__name__}: call fit(data_loader) or fit_features(features, labels) "
                f"before scoring; {self.score} compares with training features"
            )
        if not self.requires_fit and self.head is None:
            raise ValueError(
                f"{self.score}: needs the class side; give text embeddings (K, D), a ClassBank or "
                "any head (LogitsHead() if the encoder already returns logits)"
            )

    def _checked(self, features: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor | None]:
        device = self.device
        if device is not None and isinstance(features, Tensor):
            features = features.to(device)
            local = local.to(device) if isinstance(local, Tensor) else local
        features = require_features("features", features, 2, "(B, D)")
        if local is not None and self.needs_local:
            local = require_features("local", local, 3, "(B, P, D)")
        return features, local


def _agree(key: ScoreKey, fingerprint: str, model: str) -> ScoreKey:
    if key.model is None:
        return replace(key, model=fingerprint)
    if fingerprint not in key.model.split("+"):
        raise ValueError(
            f"features: expected those of the detector's own model ({key.model[:12]}), "
            f"got features of {model} ({fingerprint[:12]})"
        )
    return key
