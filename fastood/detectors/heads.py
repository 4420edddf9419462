"""What a detector takes as class side: embeddings, a bank, encoded class names, or any head."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fastood.models.base import Encoder
from fastood.scores.bank import ClassBank, Head, Similarities

__all__ = ["LogitsHead", "as_head"]


class LogitsHead:
    """The head of an "encoder" that already returns logits: they stand where cosines stand.

    γ is 1, so ``Detector("msp", model, LogitsHead())`` is the maximum softmax probability of a
    classifier, and ``"energy"`` its log-sum-exp.

    Example:
        >>> import torch
        >>> from fastood.detectors import Detector
        >>> logits = torch.tensor([[2.0, 0.0], [0.1, 0.0]])
        >>> Detector("energy", head=LogitsHead()).predict_features(logits)
        tensor([-2.1269, -0.7444])
    """

    logit_scale = 1.0

    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """``features (B, K)`` as they are; there are no patches."""
        if local is not None:
            raise ValueError("local: logits have no patch features, got a tensor")
        return Similarities(features)


def as_head(text: Any, encoder: Any, **bank_options: Any) -> tuple[Head | None, str | None]:
    """The head behind ``text``, and the digest of its prompts where that is known.

    Bare class features stand for their prompts: their own digest tells two sets apart, so that a
    threshold of one refuses the other. ``None`` means the encoder's own head, if it is a classifier
    and has one.
    """
    digest = None
    features = getattr(text, "features", None)
    if isinstance(features, Tensor) and hasattr(text, "digest"):
        text, digest = features, text.digest
    if isinstance(text, Tensor):
        bank, negatives = ClassBank(text, **bank_options), bank_options.get("negatives")
        # of the features as given: their norms may round differently on another machine
        if digest is None:
            digest = _digest(bank, text, negatives)
        elif negatives is not None:
            digest = f"{digest}+{_digest(bank, negatives)}"
        return bank, digest
    if bank_options:
        raise ValueError(
            f"{', '.join(bank_options)}: only text embeddings can be combined with negatives here; "
            "give them to ClassBank(...) instead"
        )
    if text is None:
        return (encoder.head() if isinstance(encoder, Encoder) else None), None
    if not isinstance(text, Head):
        raise TypeError(
            "head: expected text embeddings (K, D), a ClassBank, encoded classes, or an object "
            f"with similarities(features, local=None), got {type(text).__name__}"
        )
    if isinstance(text, ClassBank):
        return text, _digest(text, text.text, text.negatives)
    return text, None


def _digest(bank: ClassBank, *features: Tensor | None) -> str:
    found = hashlib.blake2b(digest_size=16)
    groups = 0 if bank.negatives is None else len(bank.negatives)
    for rows in (*features, bank.permutation, torch.tensor([groups])):
        if rows is not None:
            rows = rows.detach().cpu().contiguous()
            found.update(f"{rows.dtype} {tuple(rows.shape)} ".encode())
            found.update(rows.view(torch.uint8).numpy().tobytes())
    return f"features:{found.hexdigest()}"
