"""Who computes a score: fastood in every precision, eager torch, torch.compile, cuBLAS' product.

All take image features of any norm. Classes are normalised beforehand for everybody; the bank is
prepared for ``fastood``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench import peers
from bench.gpu.accuracy import COSINE_ERROR, Bound
from bench.gpu.cases import Case
from bench.gpu.inputs import DTYPES, Inputs, Target
from bench.gpu.work import Call, Variant, Work, bare_of, compiled, in_tf32, precisions
from bench.shapes import TAU
from fastood import reference

__all__ = ["build", "ours", "products"]

C = 2
_CHUNK = 1024


def tau_of(work: str) -> float:
    """Of MCM and GL-MCM the published 1, of the others the one of CLIP's logits."""
    return 1.0 if work in ("mcm", "gl_mcm") else TAU


def ours(work: str, inputs: Inputs, impl: str, **options: Any) -> Call:
    """fastood's call on copy i; ``options`` are ``precision=`` where one is asked for."""
    image, banks, tau = inputs.of("image"), inputs.banks, tau_of(work)
    more: dict[str, Any] = {"tau": tau, "impl": impl, **options}
    if work == "gl_mcm":
        local = inputs.of("local")
        return lambda i: fastood.gl_mcm(image[i], local[i], banks[i], **more)
    if work == "delta_energy":
        more["c"] = C
    score = getattr(fastood, work)
    return lambda i: score(image[i], banks[i], **more)


def eager(work: str, inputs: Inputs, dtype: torch.dtype) -> tuple[Callable[..., Any], Callable]:
    """The formula as people write it, and its arguments for copy i."""
    image, text, tau = inputs.of("image", dtype), inputs.of("text", dtype), tau_of(work)
    if work == "gl_mcm":
        local = inputs.of("local", dtype)
        return peers.gl_mcm, lambda i: (image[i], local[i], text[i], tau)
    if work == "neg_label":
        negatives, g = inputs.of("negatives", dtype), inputs.shape.g
        return peers.neg_label, lambda i: (image[i], text[i], negatives[i], g, tau)
    if work == "delta_energy":
        return peers.delta_energy, lambda i: (image[i], text[i], tau, C)
    return getattr(peers, work), lambda i: (image[i], text[i], tau)


def published(work: str, inputs: Inputs) -> Variant | None:
    """The structure of the authors' code, in the dtype of the features."""
    if work == "neg_label":
        g, dtype = inputs.shape.g, inputs.dtype
        image, text = inputs.of("image", dtype), inputs.of("text", dtype)
        negatives = inputs.of("negatives", dtype)
        m = inputs.shape.m
        order = torch.randperm(m, generator=torch.Generator().manual_seed(0)).to(image[0].device)
        return Variant(
            "published",
            lambda i: neg_label_published(image[i], text[i], negatives[i], order, g, TAU),
            precision=inputs.kind,
            copies=2,
        )
    if work == "gl_mcm":
        function, arguments = eager(work, inputs, inputs.dtype)
        del function
        return Variant(
            "published",
            lambda i: peers.gl_mcm_published(*arguments(i)),
            precision=inputs.kind,
            capturable=False,  # it copies both softmaxes to the host
            copies=2,
        )
    return None


def neg_label_published(
    image: Tensor, text: Tensor, negatives: Tensor, order: Tensor, groups: int, tau: float
) -> Tensor:
    """``peers.neg_label_published`` with its permutation drawn beforehand, on the device."""
    z = F.normalize(image, dim=-1)
    positive, negative = z @ text.T, z @ negatives.T
    grouped = negative.T[order].T.reshape(len(z), groups, -1).contiguous()
    shares = []
    for g in range(groups):
        p = F.softmax(torch.cat([positive, grouped[:, g]], dim=-1) / tau, dim=-1)
        shares.append(p[:, : text.shape[0]].sum(dim=-1, keepdim=True))
    return torch.cat(shares, dim=-1).mean(dim=-1)


def products(inputs: Inputs, kinds: tuple[str, ...]) -> list[Variant]:
    """The bare product: what nobody can do without, written to memory, in each precision."""
    return [
        Variant(bare_of(kind), _product(inputs, kind), "product", precision=kind) for kind in kinds
    ]


def _product(inputs: Inputs, kind: str) -> Call:
    _, k, _, p, m, _ = inputs.shape
    dtype = torch.float32 if kind == "tf32" else DTYPES[kind]
    left = inputs.of("local" if p else "image", dtype)
    rows = [x.flatten(0, 1) if p else x for x in left]
    text = inputs.of("text", dtype)
    if m:
        text = [torch.cat([t, n]) for t, n in zip(text, inputs.of("negatives", dtype), strict=True)]
    out = torch.empty(len(rows[0]), k + m, dtype=dtype, device=rows[0].device)

    def call(i: int) -> Tensor:
        return torch.mm(rows[i], text[i].T, out=out)

    return in_tf32(call) if kind == "tf32" else call


def bound_of(work: str, precision: str) -> Bound:
    """How far a right score may be off: how steep it is, times the error of a cosine."""
    tau, eps = tau_of(work), COSINE_ERROR[precision]
    logit = eps / tau
    if work == "delta_energy":
        return Bound(1e-4, 2 * C * logit)
    if work == "energy":
        return Bound(1e-5, eps)
    if work == "neg_label":
        return Bound(1e-4, logit / 2)
    return Bound(2 * logit + 1e-5)  # probabilities: MCM, GL-MCM


def truth_of(work: str, inputs: Inputs) -> Tensor:
    """Copy 0 in float64, in blocks of images."""
    image, text, tau = inputs.of("image")[0], inputs.of("text")[0], tau_of(work)
    block = _CHUNK if not inputs.shape.p else max(1, _CHUNK // inputs.shape.p)
    t = _unit(text)
    found = []
    for start in range(0, len(image), block):
        rows = slice(start, start + block)
        s = _unit(image[rows]) @ t.T
        if work == "gl_mcm":
            local = _unit(inputs.of("local")[0][rows]) @ t.T
            found.append(reference.max_softmax(s, tau) + reference.l_mcm(local, tau))
        elif work == "neg_label":
            n = _unit(inputs.of("negatives")[0])
            grouped = (_unit(image[rows]) @ n.T).unflatten(1, (inputs.shape.g, -1))
            found.append(reference.neg_label(s, grouped, tau))
        elif work == "delta_energy":
            found.append(reference.delta_energy(s, tau, C, 0.0, joint=False))
        elif work == "energy":
            found.append(reference.energy(s, tau, unit=False))
        else:
            found.append(reference.max_softmax(s, tau))
    return torch.cat(found)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)


def build(case: Case, target: Target) -> Work:
    """The case with everybody who can compute it."""
    inputs = Inputs(case.shape, case.features, target)
    b, k, d, p, m, _ = case.shape
    bound = partial(bound_of, case.work)
    variants = products(inputs, (case.features, "tf32") if case.features == "fp32" else
                        (case.features,))  # fmt: skip
    for name, precision, meant in precisions(case.features):
        options = {} if precision is None else {"precision": precision}
        variants.append(
            Variant(
                name,
                ours(case.work, inputs, "triton", **options),
                "ours",
                meant,
                bound(meant),
                bare_of(meant) if meant == case.features or case.features == "fp32" else None,
            )
        )
    if case.work in ("delta_energy", "mcm", "energy", "gl_mcm") and target.gpu:
        variants.append(
            Variant(
                "fastood cuda", ours(case.work, inputs, "cuda"), "optional", case.features,
                None, bare_of(case.features),
            )
        )  # fmt: skip
    variants += others(case, inputs, target)
    return Work(
        case,
        variants,
        truth=lambda: [truth_of(case.work, inputs)],
        copies=inputs.copies,
        flops=2.0 * b * (1 + p) * (k + m) * d,
        moved=inputs.set_bytes + 4.0 * b,
        logits_bytes=2.0 * b * max(1, p) * (k + m),
    )


def others(case: Case, inputs: Inputs, target: Target) -> list[Variant]:
    """Eager torch in the precisions people use, torch.compile, the published code."""
    found = []
    kinds = {"fp16": ("fp16", "fp32", "tf32"), "bf16": ("bf16",), "fp32": ("fp32", "tf32")}
    for kind in kinds[case.features]:
        dtype = torch.float32 if kind == "tf32" else DTYPES[kind]
        found.append(Variant(f"eager {kind}", _eager(case, inputs, dtype, kind), precision=kind))
    if case.compiled:
        function, arguments = eager(case.work, inputs, inputs.dtype)
        faster = compiled(function, gpu=target.gpu)
        found.append(Variant("compile", lambda i: faster(*arguments(i)), precision=case.features))
    as_published = published(case.work, inputs)
    return found if as_published is None else [*found, as_published]


def _eager(case: Case, inputs: Inputs, dtype: torch.dtype, kind: str) -> Call:
    function, arguments = eager(case.work, inputs, dtype)
    run: Call = lambda i: function(*arguments(i))  # noqa: E731
    return in_tf32(run) if kind == "tf32" else run
