"""Local scores: patches against classes, the best patch counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastood import reference
from fastood.ops import fused
from fastood.ops.dispatch import choose
from fastood.ops.requests import Kind, Request
from fastood.scores.bank import ClassBank
from fastood.scores.inputs import (
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
from fastood.scores.row import Text, mcm, packed_classes

__all__ = ["gl_mcm", "l_mcm", "local_rows"]


def l_mcm(
    local: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """L-MCM: max over patches p and classes k of softmax_k(s_pk / tau), softmax per patch.

    Source: arXiv 2304.04521 (GL-MCM), equation 4.

    Args:
        local: (B, P, D) patch features in the joint space, any norm.
        text: (K, D), per-image (B, K, D), or a ClassBank.
        similarity: (B, P, K) in cosine units, instead of both.
    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, P = 0, K = 0, NaN, Inf or zero
            rows, tau <= 0 or not finite.
    """
    return local_rows((check_tau(tau),), local, text, similarity, normalize=normalize, impl=impl)[0]


def local_rows(
    taus: tuple[float, ...],
    local: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    *,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """(T, B): L-MCM at several temperatures, by the kernel in one pass over patches and classes."""
    requests = tuple(Request(Kind.MAX_SOFTMAX, tau) for tau in taus)
    if similarity is not None:
        if local is not None or text is not None:
            raise ValueError("similarity: give either similarity, or local and text, not both")
        s = check_tensor("similarity", similarity, (3,), "(B, P, K)")
        _check_sizes(s.shape[1], s.shape[2])
        return _of_similarity(requests, s, impl)
    if local is None or text is None:
        raise ValueError("expected local and text, or similarity=; one of them is missing")
    check_tensor("local", local, (3,), "(B, P, D)")
    bank = text if isinstance(text, ClassBank) else None
    t = text.text if isinstance(text, ClassBank) else text
    check_tensor("text", t, (2, 3), "(K, D) or (B, K, D)")
    check_width(local, t, ("local", "text"))
    _check_sizes(local.shape[1], t.shape[-2])
    normalize = normalize and (bank is None or bank.normalize)

    implementation = choose(impl, local, t)
    if implementation == "cpu" and t.ndim == 2:
        patches, per_image = local.flatten(0, 1), local.shape[1]
        if fused.differentiable(local, t):
            z, t = _features(local, t, normalize, ready=bank is not None)
            packed = None if bank is None else bank.packed
            found, _ = fused.feature_graph(requests, z.flatten(0, 1), t, packed)
        else:
            if bank is None:
                panels = packed_classes(t, normalize, ("local", local))
            else:
                panels = bank.score_panels
            found, _ = fused.feature_scores(
                requests,
                patches,
                panels,
                k=len(t),
                normalize=normalize,
                name="local",
                per_row=per_image,
            )
        return found.unflatten(1, local.shape[:2]).amax(dim=-1)

    z, t = _features(local, t, False, ready=bank is not None)
    if normalize and bank is None:
        t = unit_rows(t)
    parts = []
    for rows in row_blocks(len(z), z.shape[1] * t.shape[-2]):
        part = unit_rows(z[rows]) if normalize else z[rows]
        s = matmul_classes(part, t[rows] if t.ndim == 3 else t)
        parts.append(_of_similarity(requests, s, implementation))
    return torch.cat(parts, dim=1)


def _of_similarity(requests: tuple[Request, ...], s: Tensor, impl: str | None) -> Tensor:
    if choose(impl, s) == "cpu":
        rows = s.flatten(0, 1)
        if not fused.differentiable(s):
            found, _ = fused.similarity_scores(requests, rows, per_row=s.shape[1])
            return found.unflatten(1, s.shape[:2]).amax(dim=-1)
        check_finite("similarity", s, what="values")
        found, _ = fused.similarity_graph(requests, rows)
        return found.unflatten(1, s.shape[:2]).amax(dim=-1)
    check_finite("similarity", s, what="values")
    return torch.stack([reference.l_mcm(working(s), r.tau) for r in requests])


def _features(
    local: Tensor, text: Tensor, normalize: bool, *, ready: bool
) -> tuple[Tensor, Tensor]:
    """Checked features of one working dtype, normalised if asked (``ready``: text is already)."""
    z = working(check_features("local", local, (3,), "(B, P, D)"))
    t = working(text if ready else check_features("text", text, (2, 3), "(K, D) or (B, K, D)"))
    dtype = torch.promote_types(z.dtype, t.dtype)
    z, t = z.to(dtype), t.to(dtype)
    if not normalize:
        return z, t
    return unit_rows(z), t if ready else unit_rows(t)


def gl_mcm(
    image: Tensor | None = None,
    local: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    local_similarity: Tensor | None = None,
    tau: float = 1.0,
    weight: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """GL-MCM: S_MCM of the image plus ``weight`` times L-MCM of its patches.

    Source: arXiv 2304.04521, equation 5. Published tables use weight 1.0 (the argument's default,
    LoCoOp, SeTAR); the authors' ImageNet script of the journal version sets 0.5.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D), (B, K, D) or a ClassBank.
        similarity: (B, K) with ``local_similarity`` (B, P, K), instead of the three.
    Returns:
        (B,); higher means in-distribution.
    Raises:
        ValueError: as ``mcm`` and ``l_mcm``; a weight that is not finite; unequal B.
    """
    weight = check_scalar("weight", weight)
    b_image = image if image is not None else similarity
    b_local = local if local is not None else local_similarity
    if b_image is not None and b_local is not None and len(b_image) != len(b_local):
        raise ValueError(
            f"local: expected patches of the same {len(b_image)} images, got {len(b_local)}"
        )
    return mcm(
        image,
        text if similarity is None else None,
        similarity=similarity,
        tau=tau,
        normalize=normalize,
        impl=impl,
    ) + weight * l_mcm(
        local,
        text if local_similarity is None else None,
        similarity=local_similarity,
        tau=tau,
        normalize=normalize,
        impl=impl,
    )


def _check_sizes(patches: int, classes: int) -> None:
    if patches == 0:
        raise ValueError("local: expected at least one patch, got P = 0")
    if classes == 0:
        raise ValueError("text: expected at least one class, got K = 0")
