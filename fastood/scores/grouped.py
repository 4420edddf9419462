"""Scores that weigh the classes against negative labels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastood import reference
from fastood.errors import KernelError
from fastood.kernels.precision import resolve
from fastood.ops.dispatch import choose, fall_back, operator_precision, refuse_cuda
from fastood.ops.fused import differentiable
from fastood.ops.gpu import kernels
from fastood.ops.grouped import grouped_graph, grouped_scores
from fastood.scores.bank import ClassBank
from fastood.scores.compute import Text
from fastood.scores.inputs import (
    check_features,
    check_finite,
    check_tau,
    check_tensor,
    check_width,
    must_check,
    unit_rows,
    working,
)

__all__ = ["neg_label"]


def neg_label(
    image: Tensor,
    text: Text,
    negatives: Tensor | None = None,
    *,
    tau: float = 0.01,
    groups: int = 100,
    seed: int | None = 0,
    remainder: Literal["drop", "spread"] = "drop",
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """NegLabel: how much of the softmax over classes and negative labels falls on the classes.

    mean over groups g of Σ_k e^l_k / (Σ_k e^l_k + Σ_{j in g} e^n_j), computed in the closed form
    mean_g sigmoid(lse(l) - lse(n_g)): K + M exponentials an image instead of G·K + M.

    Source: arXiv 2403.20078, equations 5 and 7. The authors permute on the GPU inside every batch;
    here a private CPU generator draws the permutation once.

    Args:
        image: (B, D); text: (K, D) or a ClassBank that holds the negatives already.
        negatives: (M, D) features of the negative labels (omit with such a bank).
        tau: 1/γ of the model, > 0.
        groups, seed, remainder: see ``ClassBank``.
        impl, precision: as for the global scores; there is no ``impl="cuda"``. On a GPU give a
            ClassBank: one made for the call waits for the permutation to be copied.
    Returns:
        (B,) in (0, 1); higher means in-distribution. Very confident images round to 1 in float32
        (as they do for ``msp``): they tie at the in-distribution end, far from any threshold.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, K = 0, G outside 1..M, missing
            negatives, NaN, Inf or zero rows, tau <= 0 or not finite.
    """
    tau = check_tau(tau)
    if isinstance(text, ClassBank):
        if negatives is not None:
            raise ValueError(
                "negatives: the ClassBank decides; give them to ClassBank(...) instead"
            )
        bank = text
    elif negatives is None:
        raise ValueError("negatives: expected (M, D) features of negative labels, got None")
    else:
        bank = ClassBank(
            text,
            negatives=negatives,
            groups=groups,
            seed=seed,
            remainder=remainder,
            normalize=normalize,
            impl=impl,
        )
    if bank.negatives is None:
        raise ValueError("negatives: this ClassBank holds none; build it with negatives=...")
    check_tensor("image", image, (2,), "(B, D)")
    check_width(image, bank.text)
    implementation = choose(impl, image, bank.text, bank.negatives, precision=precision)
    if implementation == "cuda":
        refuse_cuda(impl, "neg_label")
    if implementation != "reference" and differentiable(image, bank.text, bank.negatives):
        on_gpu = implementation == "triton"
        meant = operator_precision(impl, precision, image.float()[:0]) if on_gpu else ""
        return _graph(image, bank, bank.negatives, tau, normalize and bank.normalize, meant)
    if implementation == "triton":
        if must_check(image):
            check_features("image", image, (2,), "(B, D)")
        try:
            scores: Tensor = kernels.grouped.scores(
                image.detach(),
                bank.columns(resolve(precision, image)),
                tau=tau,
                normalize=normalize and bank.normalize,
            )
            return scores
        except KernelError as error:
            fall_back(error, impl, precision)
    if implementation == "cpu":
        return grouped_scores(
            image,
            bank.score_panels,
            bank.negative_score_panels,
            k=len(bank),
            shape=(bank.negatives.shape[0], bank.negatives.shape[1]),
            full=bank.full_groups,
            tau=tau,
            normalize=normalize and bank.normalize,
        )
    s = (bank if normalize else bank.as_is()).similarities(image)
    assert s.negatives is not None  # the bank holds some
    for values in (s.image, s.negatives.amax(dim=-1)):  # padding is -inf
        check_finite("similarity", values, what="values")
    return reference.neg_label(s.image, s.negatives, tau)


def _graph(
    image: Tensor, bank: ClassBank, negatives: Tensor, tau: float, normalize: bool, precision: str
) -> Tensor:
    z = working(check_features("image", image, (2,), "(B, D)"))
    return grouped_graph(
        unit_rows(z) if normalize else z,
        bank.text,
        negatives,
        full=bank.full_groups,
        tau=tau,
        panels=bank.packed,
        negative_panels=bank.packed_negatives,
        precision=precision,
    )
