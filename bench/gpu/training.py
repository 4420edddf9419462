"""Who computes a training step: the loss and the gradient of the classes, images frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastood
from bench import peers
from bench.gpu.accuracy import Bound
from bench.gpu.cases import Case
from bench.gpu.inputs import DTYPES, Inputs, Target
from bench.gpu.scores import products
from bench.gpu.work import Call, Variant, Work, bare_of, compiled, in_tf32, precisions
from bench.shapes import TAU

__all__ = ["WEIGHT", "build", "top_k_of"]

WEIGHT = 0.1
_GRADIENT_ERROR = {
    # relative to the largest element; masks, best classes and ranks of patches that change with
    # the last bit of a cosine move an image's share of a gradient
    "fp16": 0.15,
    "bf16": 0.3,
    "tf32": 0.15,
    "fp16x3": 5e-3,
    "fp32": 5e-3,
}

Loss = Callable[[int, Tensor], Tensor]
"""The loss of copy i for these class features."""


def top_k_of(classes: int) -> int:
    return max(1, classes // 5)


def step(loss: Loss, text: list[Tensor]) -> Call:
    """The loss and the gradient of ``text``, both launched from Python, nothing else."""
    leaves = [t.detach().clone().requires_grad_() for t in text]
    one: list[Tensor] = []

    def call(i: int) -> tuple[Tensor, Tensor]:
        value = loss(i, leaves[i])
        if not one:  # handed in, or torch fills one at every step
            one.append(torch.ones_like(value))
        (gradient,) = torch.autograd.grad(value, leaves[i], grad_outputs=one[0])
        return value.detach(), gradient

    return call


def ours(case: Case, inputs: Inputs, impl: str, **options: Any) -> Loss:
    image, labels = inputs.of("image"), inputs.of("labels")
    if case.work == "ebm_loss":
        return lambda i, t: fastood.ebm_loss(
            image[i], t, labels[i], tau=TAU, weight=WEIGHT, impl=impl, **options
        )
    local, top_k = inputs.of("local"), top_k_of(case.shape.k)
    return lambda i, t: fastood.locoop_loss(
        image[i], local[i], t, labels[i], tau=TAU, top_k=top_k, impl=impl, **options
    )


def theirs(
    case: Case, inputs: Inputs, dtype: torch.dtype, wrap: Callable[..., Any] = lambda f: f
) -> Loss:
    image, labels = inputs.of("image", dtype), inputs.of("labels")
    if case.work == "ebm_loss":
        function = wrap(peers.ebm_loss)
        return lambda i, t: function(image[i], t, labels[i], TAU, WEIGHT)
    function = wrap(peers.locoop_loss)
    local, top_k = inputs.of("local", dtype), top_k_of(case.shape.k)
    return lambda i, t: function(image[i], local[i], t, labels[i], TAU, 0.25, top_k)


def truth_of(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    image, labels = inputs.of("image")[0].double(), inputs.of("labels")[0]
    t = inputs.of("text")[0].double().requires_grad_()
    if case.work == "ebm_loss":
        value = fastood.ebm_loss(image, t, labels, tau=TAU, weight=WEIGHT, impl="reference")
    else:
        local = inputs.of("local")[0].double()
        value = fastood.locoop_loss(
            image, local, t, labels, tau=TAU, top_k=top_k_of(case.shape.k), impl="reference"
        )
    (gradient,) = torch.autograd.grad(value, t)
    return value.detach(), gradient


def build(case: Case, target: Target) -> Work:
    """Loss and gradient by everybody; the product is one of the three that a step needs."""
    inputs = Inputs(case.shape, case.features, target)
    text = inputs.of("text")
    b, k, d, p, *_ = case.shape
    variants = products(inputs, (case.features,))
    for name, precision, meant in precisions(case.features):
        options = {} if precision is None else {"precision": precision}
        bound = Bound(_GRADIENT_ERROR[meant], by_largest=True)
        call = step(ours(case, inputs, "triton", **options), text)
        bare = bare_of(meant) if meant == case.features or meant == "fp16x3" else None
        variants.append(Variant(name, call, "ours", meant, bound, bare))
    # the published LoCoOp picks patches by their value: that waits for the GPU, in every dtype
    capturable = case.work != "locoop_loss"
    kinds = ("fp16", "fp32", "tf32") if case.features == "fp16" else ("fp32", "tf32")
    for kind in kinds:
        dtype = torch.float32 if kind == "tf32" else DTYPES[kind]
        call = step(theirs(case, inputs, dtype), inputs.of("text", dtype))
        call = in_tf32(call) if kind == "tf32" else call
        variants.append(Variant(f"eager {kind}", call, precision=kind, capturable=capturable))
    if case.compiled and capturable:
        loss = theirs(case, inputs, inputs.dtype, lambda f: compiled(f, gpu=target.gpu))
        variants.append(Variant("compile", step(loss, text), precision=case.features))
    return Work(
        case,
        variants,
        truth=lambda: truth_of(case, inputs),
        copies=inputs.copies,
        flops=6.0 * b * max(1, p) * k * d,
        moved=inputs.set_bytes + k * d * text[0].element_size(),
        parts=lambda found: found,
    )
