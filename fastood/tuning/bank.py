"""Class features that training made, as a head."""

from __future__ import annotations

from torch import Tensor

from fastood.scores.bank import ClassBank

__all__ = ["AdaptedBank"]


class AdaptedBank(ClassBank):
    """A ``ClassBank`` that knows which adaptation it came from: fused scores apply to it.

    Args:
        text: (K, D) class features of any norm.
        fingerprint: digest of the adaptation, part of every cache and threshold key.
        logit_scale: γ of the encoder.
    """

    def __init__(self, text: Tensor, *, fingerprint: str, logit_scale: float) -> None:
        super().__init__(text)
        self.fingerprint = fingerprint
        self.logit_scale = logit_scale
