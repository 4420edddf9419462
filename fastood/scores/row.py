"""Global scores: one row of similarities in, one number out.

Every function takes ``image (B, D)`` with ``text`` ``(K, D)``, per-image ``(B, K, D)`` or a
prepared ``ClassBank``; or instead of both a ready ``similarity (B, K)`` in cosine units, which is
all that Tip-Adapter, CoCoOp and unimodal classifiers have. Any float dtype and device; the
arithmetic and the result are float32 (float64 if the inputs are). Higher = more in-distribution.

``impl=None`` picks the fused CPU kernel where it applies (float32, bfloat16 and float16 on the
CPU), else the reference; ``"cpu"`` or ``"reference"`` forces one, as ``FASTOOD_IMPL`` does for all.
The kernel never keeps the (B, K) similarities; a row's score does not depend on the batch around
it or on the number of threads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastood.ops import fused
from fastood.ops.dispatch import choose
from fastood.ops.requests import Kind, Request, reference_score
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
    row_blocks,
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
        return working(s)
    if image is None or text is None:
        raise ValueError("expected image and text, or similarity=; one of them is missing")
    if isinstance(text, ClassBank):
        return (text if normalize else text.as_is()).to_classes(image)
    return matmul_classes(*unit_features(image, text, normalize=normalize))


def unit_features(image: Tensor, text: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Checked features of one working dtype, normalised if asked."""
    z = check_features("image", image, (2,), "(B, D)")
    t = check_features("text", text, (2, 3), "(K, D) or (B, K, D)")
    check_width(z, t)
    z, t = working(z), working(t)
    if z.dtype != t.dtype:
        z, t = z.double(), t.double()
    return (unit_rows(z), unit_rows(t)) if normalize else (z, t)


class RowScores(NamedTuple):
    values: Tensor
    """(R, B), one row for each score asked."""
    classes: Tensor | None
    """(B,) int64, the nearest class, if asked."""


def score_rows(
    requests: tuple[Request, ...],
    image: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    *,
    normalize: bool = True,
    impl: str | None = None,
    classes: bool = False,
) -> RowScores:
    """Several global scores: by the kernel in one pass over the classes, or by the reference."""
    if similarity is not None:
        if image is not None or text is not None:
            raise ValueError("similarity: give either similarity, or image and text, not both")
        check_tensor("similarity", similarity, (2,), "(B, K)")
        return _of_similarity(requests, similarity, impl, classes)
    if image is None or text is None:
        raise ValueError("expected image and text, or similarity=; one of them is missing")
    rows = text.text if isinstance(text, ClassBank) else text
    check_tensor("image", image, (2,), "(B, D)")
    check_tensor("text", rows, (2, 3), "(K, D) or (B, K, D)")
    check_width(image, rows)
    k = rows.shape[-2]
    _check_requests(requests, k, "text")
    implementation = choose(impl, image, rows)
    if rows.ndim == 3:
        # classes of their own for every image: K D numbers are read for each row of K cosines
        s = cosines(image, text, None, normalize=normalize)
        return _of_similarity(requests, s, implementation, classes)
    if implementation == "reference":
        return _by_reference(requests, image, text, normalize, classes)

    bank = text if isinstance(text, ClassBank) else None
    normalize = normalize and (bank is None or bank.normalize)
    if fused.differentiable(image, rows):
        if bank is None:
            z, t = unit_features(image, rows, normalize=normalize)
            return RowScores(*fused.feature_graph(requests, z, t))
        z = working(check_features("image", image, (2,), "(B, D)"))
        z = unit_rows(z) if normalize else z
        return RowScores(*fused.feature_graph(requests, z, bank.text, bank.packed))
    if bank is None:
        panels = packed_classes(rows, normalize, ("image", image))
    else:
        panels = bank.score_panels
    found = fused.feature_scores(requests, image, panels, k=k, normalize=normalize, classes=classes)
    return RowScores(*found)


def packed_classes(text: Tensor, normalize: bool, features: tuple[str, Tensor]) -> Tensor:
    """Class features checked, normalised and packed for one call.

    ``features`` and their name: where both are bad, they are the ones to complain of.
    """
    try:
        return fused.score_panels(text, normalize=normalize)
    except ValueError:
        name, x = features
        check_features(name, x, (x.ndim,), "")
        raise


def _by_reference(
    requests: tuple[Request, ...], image: Tensor, text: Text, normalize: bool, classes: bool
) -> RowScores:
    if not isinstance(text, ClassBank):  # once, not for every block
        image, text = unit_features(image, text, normalize=normalize)
        normalize = False
    parts = []
    for block in row_blocks(len(image), len(text)):
        s = cosines(image[block], text, None, normalize=normalize)
        parts.append(_of_similarity(requests, s, "reference", classes))
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts], dim=1)
    if not classes:
        return RowScores(values, None)
    return RowScores(
        values, torch.cat([part.classes for part in parts if part.classes is not None])
    )


def _of_similarity(
    requests: tuple[Request, ...], s: Tensor, impl: str | None, classes: bool
) -> RowScores:
    _check_requests(requests, s.shape[1], "similarity")
    kernel = choose(impl, s) == "cpu"
    if kernel and not fused.differentiable(s):
        return RowScores(*fused.similarity_scores(requests, s, classes=classes))
    check_finite("similarity", s, what="values")
    if kernel:
        return RowScores(*fused.similarity_graph(requests, s))
    s = working(s)
    values = torch.stack([reference_score(r, s) for r in requests])
    return RowScores(values, s.argmax(dim=-1) if classes else None)


def _check_requests(requests: tuple[Request, ...], k: int, name: str) -> None:
    if k == 0:
        raise ValueError(f"{name}: expected at least one class, got K = 0")
    for r in requests:
        if r.kind == Kind.MARGIN and k < 2:
            raise ValueError(f"margin: expected at least two classes, got K = {k}")
        if r.kind == Kind.DELTA_ENERGY:
            check_count("c", r.c, 1, k, high_name="K = ")


def max_similarity(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    normalize: bool = True,
    impl: str | None = None,
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
    return _score(Request(Kind.MAX_SIMILARITY), image, text, similarity, normalize, impl)


def max_logit(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """max_k s_k / tau: ranks exactly as ``max_similarity``, in units of logits.

    Source: arXiv 1911.11132 (max-logit), with CLIP's logits s / tau.

    Returns:
        (B,); higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; tau <= 0 or not finite.
    """
    tau = check_tau(tau)
    return _score(Request(Kind.MAX_LOGIT, tau), image, text, similarity, normalize, impl)


def mcm(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
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
    return _score(Request(Kind.MAX_SOFTMAX, tau), image, text, similarity, normalize, impl)


def msp(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """S_MSP: the largest softmax probability at the model's own temperature, tau = 1/γ.

    Differs from ``mcm`` in tau only. Source: arXiv 1610.02136; CLIP's γ = exp(logit_scale) is
    about 100, read it from the model rather than trusting the default.

    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: as ``mcm``.
    """
    return mcm(image, text, similarity=similarity, tau=tau, normalize=normalize, impl=impl)


def energy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    scale: Literal["tau", "unit"] = "tau",
    normalize: bool = True,
    impl: str | None = None,
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
    request = Request(Kind.ENERGY, tau, flag=scale == "unit")
    return _score(request, image, text, similarity, normalize, impl)


def neg_entropy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
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
    return _score(Request(Kind.NEG_ENTROPY, tau), image, text, similarity, normalize, impl)


def variance(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
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
    return _score(Request(Kind.VARIANCE, tau), image, text, similarity, normalize, impl)


def margin(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float | None = None,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Distance between the two best classes: s(1) - s(2), or p(1) - p(2) if tau is given.

    Args:
        tau: None for cosines; a temperature for softmax probabilities.
    Returns:
        (B,) >= 0; higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; K < 2; tau <= 0 or not finite.
    """
    if tau is None:
        request = Request(Kind.MARGIN, c=2)
    else:
        request = Request(Kind.MARGIN, check_tau(tau), c=2, flag=True)
    return _score(request, image, text, similarity, normalize, impl)


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
    impl: str | None = None,
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
    request = Request(Kind.DELTA_ENERGY, tau, c, reset, bool(joint))
    return _score(request, image, text, similarity, normalize, impl)


def _score(
    request: Request,
    image: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    normalize: bool,
    impl: str | None,
) -> Tensor:
    found = score_rows((request,), image, text, similarity, normalize=normalize, impl=impl)
    return found.values[0]
