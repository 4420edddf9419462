"""Global scores: one row of similarities in, one number out.

Every function takes ``image (B, D)`` with ``text`` ``(K, D)``, per-image ``(B, K, D)`` or a
prepared ``ClassBank``; or instead of both a ready ``similarity (B, K)`` in cosine units, which is
all that Tip-Adapter, CoCoOp and unimodal classifiers have. Any float dtype and device; the
arithmetic and the result are float32 (float64 if the inputs are). Higher = more in-distribution.

``impl=None`` picks the fused kernel where one applies (float32, bfloat16 and float16: C++ on the
CPU, Triton on a GPU), else the reference; ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``
forces one, as ``FASTOOD_IMPL`` does for all. ``"cuda"`` is the library's product in row blocks and
a CUDA C++ kernel over its rows. Kernels never keep the (B, K) similarities; on the CPU a row's
score does not depend on the batch around it or on the number of threads.

``precision`` says in what a GPU takes the products; sums and results are float32 always. None
takes float16 and bfloat16 features as they are and the others at float32 grade (``"fp16x3"``:
high and low halves); ``"fp16"``, ``"bf16"``, ``"tf32"``, ``"fp16x3"`` or ``"fp32"`` asks for one.
Under torch.compile and for gradients rows are normalised in float32 first, so None means
``"fp16x3"`` there. With ``normalize=False`` numbers beyond 65,504, which float16 cannot hold, give
NaN in ``"fp16"`` and ``"fp16x3"``; ``"fp32"`` takes any. The CPU and the reference compute in
float32: only None or ``"fp32"``.

A GPU is not waited for: NaN, Inf and zero rows give NaN there unless ``FASTOOD_CHECK=1``, which
names them in a ValueError. More than eight top classes (``c``) take the reference on a GPU.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastood.ops.requests import Kind, Request
from fastood.scores.compute import Text, score_rows
from fastood.scores.inputs import check_scalar, check_tau

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


def max_similarity(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """S_MS: the largest cosine similarity, max_k s_k.

    Source: the maximum-similarity baseline of arXiv 2306.06048 (called max-logit in MCM's code).

    Returns:
        (B,) in [-1, 1]; higher means in-distribution.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, K = 0, NaN, Inf or zero rows (on
            a GPU under FASTOOD_CHECK=1, else NaN), an unknown precision or one that the CPU has
            not.

    Example:
        >>> import torch
        >>> max_similarity(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([0.8000])
    """
    return _score(Request(Kind.MAX_SIMILARITY), image, text, similarity, normalize, impl, precision)


def max_logit(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """max_k s_k / tau: ranks exactly as ``max_similarity``, in units of logits.

    Source: arXiv 1911.11132 (max-logit), with CLIP's logits s / tau.

    Returns:
        (B,); higher means in-distribution.
    Raises:
        ValueError: as ``max_similarity``; tau <= 0 or not finite.
    """
    tau = check_tau(tau)
    return _score(Request(Kind.MAX_LOGIT, tau), image, text, similarity, normalize, impl, precision)


def mcm(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
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
    return _score(
        Request(Kind.MAX_SOFTMAX, tau), image, text, similarity, normalize, impl, precision
    )


def msp(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """S_MSP: the largest softmax probability at the model's own temperature, tau = 1/γ.

    Differs from ``mcm`` in tau only. Source: arXiv 1610.02136; CLIP's γ = exp(logit_scale) is
    about 100, read it from the model rather than trusting the default.

    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: as ``mcm``.
    """
    return mcm(
        image,
        text,
        similarity=similarity,
        tau=tau,
        normalize=normalize,
        impl=impl,
        precision=precision,
    )


def energy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 0.01,
    scale: Literal["tau", "unit"] = "tau",
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
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
    return _score(request, image, text, similarity, normalize, impl, precision)


def neg_entropy(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
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
    return _score(
        Request(Kind.NEG_ENTROPY, tau), image, text, similarity, normalize, impl, precision
    )


def variance(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
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
    return _score(Request(Kind.VARIANCE, tau), image, text, similarity, normalize, impl, precision)


def margin(
    image: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float | None = None,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
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
    return _score(request, image, text, similarity, normalize, impl, precision)


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
    precision: str | None = None,
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
        impl, precision: see this module; c > 8 takes the reference on a GPU.
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
    return _score(request, image, text, similarity, normalize, impl, precision)


def _score(
    request: Request,
    image: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    normalize: bool,
    impl: str | None,
    precision: str | None,
) -> Tensor:
    found = score_rows(
        (request,), image, text, similarity, normalize=normalize, impl=impl, precision=precision
    )
    return found.values[0]
