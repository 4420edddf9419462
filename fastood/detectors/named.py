"""The detectors by the names people search for; each is ``Detector`` with its own arguments.

``encoder`` and ``text_embeddings`` come first and mean what they mean in pytorch-ood: images →
features (or None), and (K, D) class features of any norm (or a ClassBank, or any head).
``temperature`` is tau; None takes 1/γ of the model where the field does so. ``identity`` stands
for ``logit_scale``, ``prompts`` and ``fingerprint`` of ``Detector``.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fastood.detectors.detector import Detector

__all__ = [
    "GLMCM",
    "KNN",
    "LMCM",
    "MCM",
    "MSP",
    "DeltaEnergy",
    "Energy",
    "EnergyBased",
    "Mahalanobis",
    "MaxLogit",
    "MaxSimilarity",
    "NegEntropy",
    "NegLabel",
]


class _OnFeatures(Detector):
    """Needs (B, D) features only, so that pytorch-ood may encode once for several detectors."""

    _peer_base = "FeaturesDetector"


def _tau(temperature: float | None) -> dict[str, Any]:
    return {} if temperature is None else {"tau": temperature}


class MaxSimilarity(_OnFeatures):
    """Largest cosine to a class (arXiv 2306.06048)."""

    def __init__(self, encoder: Any = None, text_embeddings: Any = None, **identity: Any) -> None:
        super().__init__("max_similarity", encoder, text_embeddings, **identity)


class MCM(_OnFeatures):
    """Largest softmax probability of the cosines at tau = 1 (arXiv 2211.13445).

    Example:
        >>> import torch
        >>> MCM(None, torch.eye(2)).predict_features(torch.tensor([[3.0, 0.0]]))
        tensor([-0.7311])
    """

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float = 1.0,
        **identity: Any,
    ) -> None:
        super().__init__("mcm", encoder, text_embeddings, tau=temperature, **identity)


class MSP(_OnFeatures):
    """Largest softmax probability at the model's own temperature (arXiv 1610.02136)."""

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float | None = None,
        **identity: Any,
    ) -> None:
        super().__init__("msp", encoder, text_embeddings, **_tau(temperature), **identity)


class MaxLogit(_OnFeatures):
    """Largest logit, cosine / tau (arXiv 1911.11132); ranks as ``MaxSimilarity``."""

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float | None = None,
        **identity: Any,
    ) -> None:
        super().__init__("max_logit", encoder, text_embeddings, **_tau(temperature), **identity)


class Energy(_OnFeatures):
    """tau · log-sum-exp of the logits (arXiv 2010.03759).

    For a classifier that returns logits: ``Energy(model, LogitsHead())``.
    """

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float | None = None,
        *,
        scale: Literal["tau", "unit"] = "tau",
        **identity: Any,
    ) -> None:
        super().__init__(
            "energy", encoder, text_embeddings, scale=scale, **_tau(temperature), **identity
        )


EnergyBased = Energy
"""pytorch-ood's name."""


class DeltaEnergy(_OnFeatures):
    """Energy change when the c best similarities are reset (arXiv 2510.11296).

    With c = 1 it ranks as ``MSP`` at the same temperature: compare at equal tau.
    """

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float | None = None,
        *,
        c: int = 1,
        reset: float = 0.0,
        joint: bool = False,
        **identity: Any,
    ) -> None:
        super().__init__(
            "delta_energy",
            encoder,
            text_embeddings,
            c=c,
            reset=reset,
            joint=joint,
            **_tau(temperature),
            **identity,
        )


class NegEntropy(_OnFeatures):
    """log K minus the entropy of the softmax (a baseline of arXiv 2211.13445)."""

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float = 1.0,
        **identity: Any,
    ) -> None:
        super().__init__("neg_entropy", encoder, text_embeddings, tau=temperature, **identity)


class LMCM(Detector):
    """Largest softmax probability over patches and classes (arXiv 2304.04521)."""

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float = 1.0,
        **identity: Any,
    ) -> None:
        super().__init__("l_mcm", encoder, text_embeddings, tau=temperature, **identity)


class GLMCM(Detector):
    """MCM plus ``weight`` times its local counterpart (arXiv 2304.04521).

    ``encoder`` returns patches as well: an ``Encoder``, or a function giving ``(image, local)``.
    """

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        temperature: float = 1.0,
        *,
        weight: float = 1.0,
        **identity: Any,
    ) -> None:
        super().__init__(
            "gl_mcm", encoder, text_embeddings, tau=temperature, weight=weight, **identity
        )


class NegLabel(_OnFeatures):
    """Share of the softmax on the classes, against negative labels (arXiv 2403.20078).

    ``negatives`` (M, D), ``groups`` and ``seed`` as in ``ClassBank``; leave them out if
    ``text_embeddings`` is a bank that holds negatives already.
    """

    def __init__(
        self,
        encoder: Any = None,
        text_embeddings: Any = None,
        negatives: Tensor | None = None,
        temperature: float | None = None,
        *,
        groups: int = 100,
        seed: int | None = 0,
        **identity: Any,
    ) -> None:
        bank: dict[str, Any] = (
            {} if negatives is None else {"negatives": negatives, "groups": groups, "seed": seed}
        )
        super().__init__(
            "neg_label", encoder, text_embeddings, **bank, **_tau(temperature), **identity
        )


class KNN(_OnFeatures):
    """Distance to the k-th nearest unit training feature (arXiv 2204.06507).

    k = 50 is the paper's for CIFAR-10; it chooses 1000 for all of ImageNet.

    Example:
        >>> import torch
        >>> detector = KNN(k=1).fit_features(torch.eye(3))
        >>> detector.predict_features(torch.tensor([[0.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]))
        tensor([0.0000, 1.4142])
    """

    def __init__(self, encoder: Any = None, k: int = 50, **identity: Any) -> None:
        super().__init__("knn", encoder, k=k, **identity)


class Mahalanobis(_OnFeatures):
    """Half the squared Mahalanobis distance to the nearest class mean (arXiv 1807.03888).

    ``normalize``, ``eps`` and ``shrinkage`` as in ``fit_mahalanobis``.
    """

    def __init__(self, encoder: Any = None, **options: Any) -> None:
        super().__init__("mahalanobis", encoder, **options)
