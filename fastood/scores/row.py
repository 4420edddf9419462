"""Global scores: one row of similarities in, one number out.

Every function takes ``image (B, D)`` with ``text`` ``(K, D)``, per-image ``(B, K, D)`` or a
prepared ``ClassBank``; or instead of both a ready ``similarity (B, K)`` in cosine units, which is
all that Tip-Adapter, CoCoOp and unimodal classifiers have. Any float dtype and device; the
arithmetic and the result are float32 (float64 if the inputs are). Higher = more in-distribution.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastood import reference
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_finite,
    check_scalar,
    check_tau,
    check_tensor,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)

__all__ = [
    "delta_energy",
    "energy",
    "margin",
    "max_logit",
    "max_similarity",
    "mcm",
    "msp",
    "neg_entropy",
    "variance",
]

Text = Tensor | ClassBank


def cosines(
    image: Tensor | None, text: Text | None, similarity: Tensor | None, *, normalize: bool = True
) -> Tensor:
    """(B, K) similarities from whichever of the two forms was given."""
    if similarity is not None:
        if image is not None or text is not None:
            raise ValueError("similarity: give either similarity, or image and text, not both")
        s = check_tensor("similarity", similarity, (2,), "(B, K)")
        check_finite("similarity", s, what="values")
        s = working(s)
    elif image is None or text is None:
        raise ValueError("expected image and text, or similarity=; one of them is missing")
    elif isinstance(text, ClassBank):
        s = (text if normalize else text.as_is()).to_classes(image)
    else:
        z = check_features("image", image, (2,), "(B, D)")
        t = check_features("text", text, (2, 3), "(K, D) or (B, K, D)")
        check_width(z, t)
        z, t = working(z), working(t)
        if z.dtype != t.dtype:
            z, t = z.double(), t.double()
        s = matmul_classes(unit_rows(z), unit_rows(t)) if normalize else matmul_classes(z, t)
    if s.shape[-1] == 0:
        name = "text" if similarity is None else "similarity"
        raise ValueError(f"{name}: expected at least one class, got K = 0 (shape {tuple(s.shape)})")
    return s


def max_similarity(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """S_MS: the largest cosine similarity, max_k s_k.

    Source: the maximum-similarity baseline of arXiv 2306.06048 (called max-logit in MCM's code).

    Returns:
        (B,) in [-1, 1]; higher means in-distribution.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, K = 0, NaN, Inf or zero rows.

    Example:
        >>> import torch
        >>> max_similarity(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([0.8000])
    """
    return reference.max_similarity(cosines(image, text, similarity, normalize=normalize))


def max_logit(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
) -> Tensor:
    """max_k s_k / tau: ranks exactly as ``max_similarity``, in units of logits.

    Source: arXiv 1911.11132 (max-logit), with CLIP's logits s / tau.

    Returns:
        (B,); higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; tau <= 0 or not finite.
    """
    tau = check_tau(tau)
    return reference.max_similarity(cosines(image, text, similarity, normalize=normalize)) / tau


def mcm(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """S_MCM: maximum concept matching, max_k softmax_k(s / tau) with tau = 1 on raw cosines.

    Computed as 1 / Σ_k exp((s_k - s(1)) / tau). Source: arXiv 2211.13445, equation 2. LoCoOp and
    SeTAR obtain the same value with T = 100 on logits of 100 s.

    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; tau <= 0 or not finite.

    Example:
        >>> import torch
        >>> mcm(similarity=torch.tensor([[0.3, 0.3]]))
        tensor([0.5000])
    """
    tau = check_tau(tau)
    return reference.max_softmax(cosines(image, text, similarity, normalize=normalize), tau)


def msp(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
) -> Tensor:
    """S_MSP: the largest softmax probability at the model's own temperature, tau = 1/γ.

    Differs from ``mcm`` in tau only. Source: arXiv 1610.02136; CLIP's γ = exp(logit_scale) is
    about 100, read it from the model rather than trusting the default.

    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: as ``mcm``.
    """
    return mcm(image, text, similarity=similarity, tau=tau, normalize=normalize)


def energy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    scale: Literal["tau", "unit"] = "tau",
    normalize: bool = True,
) -> Tensor:
    """Negative free energy: tau · lse(s / tau) (``scale="tau"``) or lse(s / tau) (``"unit"``).

    The two rank alike at equal tau. Source: arXiv 2010.03759, equation 4; ``"unit"`` is the form
    in CRoFT's code (arXiv 2405.16417).

    Returns:
        (B,); higher means in-distribution (this is -E of the paper).
    Raises:
        ValueError: as ``mcm``; an unknown scale.
    """
    tau = check_tau(tau)
    if scale not in ("tau", "unit"):
        raise ValueError(f'scale: expected "tau" or "unit", got {scale!r}')
    s = cosines(image, text, similarity, normalize=normalize)
    return reference.energy(s, tau, unit=scale == "unit")


def neg_entropy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """log K - H(softmax(s / tau)): ranks as the negative entropy, and keeps its digits.

    At tau = 1 entropies of CLIP rows differ in the fourth digit after log K; in float32 -H itself
    leaves a few hundred distinct values of 50,000 images. With u the centred logits and m the mean
    of expm1(u): (mean(u) + mean(u expm1(u))) / (1 + m) - log1p(m).

    Source: the entropy baseline of MCM's code (arXiv 2211.13445), which stores +H.

    Returns:
        (B,) in [0, log K]; higher means in-distribution.
    Raises:
        ValueError: as ``mcm``.
    """
    tau = check_tau(tau)
    return reference.neg_entropy(cosines(image, text, similarity, normalize=normalize), tau)


def variance(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Population variance over classes of softmax(s / tau).

    var p = (Σ_k p_k²) / K - 1/K², computed from centred logits without that cancellation.
    Source: the variance baseline of MCM's code, which takes probabilities (its README says
    cosines).

    Returns:
        (B,) in [0, (K - 1) / K²]; higher means in-distribution.
    Raises:
        ValueError: as ``mcm``.
    """
    tau = check_tau(tau)
    return reference.variance(cosines(image, text, similarity, normalize=normalize), tau)


def margin(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """Distance between the two best classes: s(1) - s(2), or p(1) - p(2) if tau is given.

    Args:
        tau: None for cosines; a temperature for softmax probabilities.
    Returns:
        (B,) >= 0; higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; K < 2; tau <= 0 or not finite.
    """
    tau = None if tau is None else check_tau(tau)
    s = cosines(image, text, similarity, normalize=normalize)
    if s.shape[-1] < 2:
        raise ValueError(f"margin: expected at least two classes, got K = {s.shape[-1]}")
    return reference.margin(s, tau)


def delta_energy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    c: int = 1,
    reset: float = 0.0,
    joint: bool = False,
    normalize: bool = True,
) -> Tensor:
    """ΔEnergy: the energy change when each of the c largest similarities is reset.

    With l = s / tau, E0 = -lse(l) and E1(j) = -lse(l with l_j := reset / tau)::

        joint=False   Σ_{j=1..c} [ E1(j) - E0 ]      one reset at a time, summed
        joint=True    E1(1..c) - E0                   all c reset at once

    Args:
        image: (B, D) float, any norm.
        text: (K, D), per-image (B, K, D), or a ClassBank.
        similarity: (B, K) in cosine units, instead of image and text.
        tau: softmax temperature, unitless, > 0; 1/γ of the model is usual.
        c: classes reset, 1 <= c <= K. The mean over c instead of the sum ranks alike.
        reset: the similarity they are reset to; 0 crops them away.
        joint: reset them together rather than one by one.
    Returns:
        (B,) float32 (float64 for float64 input); higher means in-distribution. Negative where the
        top similarities lie below ``reset``. For K = 1 it is (s - reset) / tau.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, K = 0, c outside 1..K, tau <= 0,
            non-finite tau or reset, NaN, Inf or zero rows (on CPU; on a GPU under FASTOOD_CHECK=1).
    Notes:
        Deterministic; ties take the lowest class index. Stable form: softplus(l_j - a_j) -
        softplus(reset/tau - a_j), a_j being the log-sum-exp of the other classes.

        *From the paper* (arXiv 2510.11296; abstract and overview figure): the largest similarities
        are cropped to zero, the top c at inference, each on its own, and the changes are summed; a
        larger change means closed-set data. *Inferred here*: the exact equations, no factor tau
        before the energies, sum rather than mean, and the defaults of tau and c (unverified).
        fastood does not claim to reproduce the paper's numbers.

        With c = 1 this is -log(1 - p(1) + exp(reset/tau)/Z): it ranks like the largest softmax
        probability *at the same tau*. A gain of c = 1 over MCM (tau = 1) is a gain of temperature;
        compare with ``msp`` at equal tau. New rankings need c >= 2.

    Example:
        >>> import torch
        >>> delta_energy(torch.eye(2), torch.eye(2), tau=1.0)
        tensor([0.6201, 0.6201])
    """
    tau, reset = check_tau(tau), check_scalar("reset", reset)
    s = cosines(image, text, similarity, normalize=normalize)
    c = check_count("c", c, 1, s.shape[-1], high_name="K = ")
    return reference.delta_energy(s, tau, c, reset, joint=joint)
