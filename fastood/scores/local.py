"""Local scores: patches against classes, the best patch counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastood import reference
from fastood.errors import KernelError
from fastood.kernels.precision import resolve
from fastood.ops import fused, gpu
from fastood.ops.dispatch import Impl, choose, fall_back, operator_precision, refuse_cuda
from fastood.ops.requests import Kind, Request
from fastood.scores.bank import ClassBank
from fastood.scores.compute import Text, by_gpu, check_no_product, packed_classes
from fastood.scores.inputs import (
    check_features,
    check_finite,
    check_scalar,
    check_tau,
    check_tensor,
    check_width,
    matmul_classes,
    must_check,
    row_blocks,
    unit_rows,
    working,
)
from fastood.scores.row import mcm

__all__ = ["gl_mcm", "l_mcm", "local_rows"]


def l_mcm(
    local: Tensor | None = None,
    text: Text | None = None,
    *,
    similarity: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """L-MCM: max over patches p and classes k of softmax_k(s_pk / tau), softmax per patch.

    Source: arXiv 2304.04521 (GL-MCM), equation 4.

    Args:
        local: (B, P, D) patch features in the joint space, any norm.
        text: (K, D), per-image (B, K, D), or a ClassBank.
        similarity: (B, P, K) in cosine units, instead of both.
        impl, precision: as for the global scores.
    Returns:
        (B,) in [1/K, 1]; higher means in-distribution.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, P = 0, K = 0, NaN, Inf or zero
            rows, tau <= 0 or not finite.
    """
    found = local_rows(
        (check_tau(tau),),
        local,
        text,
        similarity,
        normalize=normalize,
        impl=impl,
        precision=precision,
    )
    return found[0]


def local_rows(
    taus: tuple[float, ...],
    local: Tensor | None,
    text: Text | None,
    similarity: Tensor | None,
    *,
    normalize: bool = True,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """(T, B): L-MCM at several temperatures, by the kernel in one pass over patches and classes."""
    requests = tuple(Request(Kind.MAX_SOFTMAX, tau) for tau in taus)
    if similarity is not None:
        if local is not None or text is not None:
            raise ValueError("similarity: give either similarity, or local and text, not both")
        s = check_tensor("similarity", similarity, (3,), "(B, P, K)")
        _check_sizes(s.shape[1], s.shape[2])
        return _of_similarity(requests, s, impl, precision)
    if local is None or text is None:
        raise ValueError("expected local and text, or similarity=; one of them is missing")
    check_tensor("local", local, (3,), "(B, P, D)")
    bank = text if isinstance(text, ClassBank) else None
    t = text.text if isinstance(text, ClassBank) else text
    check_tensor("text", t, (2, 3), "(K, D) or (B, K, D)")
    check_width(local, t, ("local", "text"))
    _check_sizes(local.shape[1], t.shape[-2])
    normalize = normalize and (bank is None or bank.normalize)

    implementation = choose(impl, local, t, precision=precision)
    if t.ndim == 3:
        check_no_product(precision, "products with classes (B, K, D) are taken in float32")
    if implementation in ("triton", "cuda") and t.ndim == 2 and not fused.differentiable(local, t):
        try:
            return _by_gpu(requests, local, text, normalize, precision, implementation)
        except KernelError as error:
            fall_back(error, impl, precision)
            implementation = "reference"
    if implementation != "reference" and t.ndim == 2:
        patches, per_image = local.flatten(0, 1), local.shape[1]
        if fused.differentiable(local, t):
            if implementation == "cuda":
                refuse_cuda(impl, "gradients or graphs")
            z, t = _features(local, t, normalize, ready=bank is not None)
            packed = None if bank is None else bank.packed
            on_gpu = implementation == "triton"
            meant = operator_precision(impl, precision, z, t) if on_gpu else ""
            found, _ = fused.feature_graph(requests, z.flatten(0, 1), t, packed, meant)
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
    given = impl if implementation in ("triton", "cuda") else implementation
    parts = []
    for rows in row_blocks(len(z), z.shape[1] * t.shape[-2]):
        part = unit_rows(z[rows]) if normalize else z[rows]
        s = matmul_classes(part, t[rows] if t.ndim == 3 else t)
        parts.append(_of_similarity(requests, s, given, None))
    return torch.cat(parts, dim=1)


def _by_gpu(
    requests: tuple[Request, ...],
    local: Tensor,
    text: Text,
    normalize: bool,
    precision: str | None,
    engine: Impl,
) -> Tensor:
    (b, patches, d), k = local.shape, len(text)
    own = (local,) if isinstance(text, ClassBank) else (local, text)
    meant = resolve(precision, *own)
    if engine == "triton" and gpu.fused_pays("patches", meant, b * patches, k, d):
        if must_check(local):
            check_features("local", local, (3,), "")
            if isinstance(text, Tensor):
                check_features("text", text, (2,), "")
        if isinstance(text, ClassBank):
            ready = text.operand(meant)
        else:
            ready = gpu.kernels.operands.prepare(text, meant, normalize=normalize)
        taus = tuple(r.tau for r in requests)
        return gpu.local_scores(taus, local, ready, normalize=normalize)
    rows = local.flatten(0, 1)
    found = by_gpu(requests, rows, text, normalize, precision, False, engine, "local").values
    return found.unflatten(1, (b, patches)).amax(dim=-1)


def _of_similarity(
    requests: tuple[Request, ...], s: Tensor, impl: str | None, precision: str | None
) -> Tensor:
    implementation = choose(impl, s, precision=precision)
    check_no_product(precision, "similarities at hand are in float32")
    rows, differentiable = s.flatten(0, 1), fused.differentiable(s)
    if implementation == "cpu" and not differentiable:
        found, _ = fused.similarity_scores(requests, rows, per_row=s.shape[1])
        return found.unflatten(1, s.shape[:2]).amax(dim=-1)
    check_finite("similarity", s, what="values")
    if implementation == "cuda" and differentiable:
        refuse_cuda(impl, "gradients or graphs")
    if implementation != "reference" and differentiable:
        found, _ = fused.similarity_graph(requests, rows)
        return found.unflatten(1, s.shape[:2]).amax(dim=-1)
    if implementation in ("triton", "cuda"):
        try:
            if implementation == "triton":
                taus = tuple(r.tau for r in requests)
                return gpu.local_similarity_scores(taus, s)
            found, _ = gpu.similarity_scores(requests, rows, engine=implementation)
            return found.unflatten(1, s.shape[:2]).amax(dim=-1)
        except KernelError as error:
            fall_back(error, impl, precision)
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
    precision: str | None = None,
) -> Tensor:
    """GL-MCM: S_MCM of the image plus ``weight`` times L-MCM of its patches.

    Source: arXiv 2304.04521, equation 5. Published tables use weight 1.0 (the argument's default,
    LoCoOp, SeTAR); the authors' ImageNet script of the journal version sets 0.5.

    Args:
        image: (B, D); local: (B, P, D); text: (K, D), (B, K, D) or a ClassBank.
        similarity: (B, K) with ``local_similarity`` (B, P, K), instead of the three.
        impl, precision: as for the global scores.
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
        precision=precision,
    ) + weight * l_mcm(
        local,
        text if local_similarity is None else None,
        similarity=local_similarity,
        tau=tau,
        normalize=normalize,
        impl=impl,
        precision=precision,
    )


def _check_sizes(patches: int, classes: int) -> None:
    if patches == 0:
        raise ValueError("local: expected at least one patch, got P = 0")
    if classes == 0:
        raise ValueError("text: expected at least one class, got K = 0")
