"""Learned prompts through the text tower of ViT-B/16, random weights: steps and inference.

    pytest bench/bench_prompts.py --benchmark-only

Names are every 15th of open_clip's 1000 for ImageNet (64, or the first 32 of these), so that the
plain pass over all 77 positions takes seconds rather than minutes. With all 1000 a prefix is shared
by more: 18.4 times fewer tokens than the plain pass has, where 64 give 16.9 and 32 give 15.6.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers_tuning
from bench.shapes import SMOKE, TAU
from bench.suite import Goal, Work
from fastood.data.openai_templates import IMAGENET_80
from fastood.data.prompts import fill
from fastood.features.text import clear_text_memory, encode_classes
from fastood.models import OpenClipEncoder
from fastood.prompts import PromptEncoder

IMPLEMENTATIONS = ["plain", "fastood"]
_STEPS = 1000 // (4 if SMOKE else 64)
NAMES = [n.replace("_", " ") for n in open_clip.IMAGENET_CLASSNAMES[::_STEPS]][: 4 if SMOKE else 64]
CHUNK = 2 if SMOKE else 16
FEWER = NAMES[: 3 if SMOKE else 32]
IMAGES = 2
ENSEMBLE, ENSEMBLE_NAMES = (
    (IMAGENET_80[:2], NAMES[:3]) if SMOKE else (IMAGENET_80[::10], NAMES[:25])
)

_TOWER = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 64 if SMOKE else 512,
    "heads": 1 if SMOKE else 8,
    "layers": 2 if SMOKE else 12,
}
_NO_IMAGES = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}


@cache
def encoder() -> OpenClipEncoder:
    """ViT-B/16's text tower beside an image tower of no size; frozen, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(_TOWER["width"], _NO_IMAGES, _TOWER)
    model.eval().requires_grad_(False)
    return OpenClipEncoder(model, lambda image: image, open_clip.SimpleTokenizer())


@cache
def exact() -> Any:
    return copy.deepcopy(encoder().model).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def features_by(model: Any, prompts: PromptEncoder, context: Tensor) -> Tensor:
    """The plain pass over every position of every prompt."""
    layout = prompts.layout
    vectors = peers_tuning.plain_prompts(model, layout.tokens, layout.context, context)
    return peers_tuning.plain_text_features(model, vectors, layout.ends)


def flops(tokens: int) -> float:
    """Of the linear layers, forward and, for frozen weights, once more backward."""
    return 24.0 * _TOWER["width"] ** 2 * _TOWER["layers"] * tokens


def packed_tokens(prompts: PromptEncoder) -> int:
    packing = prompts._packing(0, len(prompts.layout))
    return packing.prefix + len(packing.ids)


def prompts_of(names: list[str], **options: Any) -> PromptEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in front are slower, that is what is measured
        return PromptEncoder.learned(encoder(), names, **options)


# ------------------------------------------------------------------------------ CoOp


def coop_loss(text: Tensor) -> Tensor:
    """Of 32 images, the same for everyone."""
    image = F.normalize(normal(32, text.shape[1]), dim=-1).to(text)
    labels = torch.arange(32) % len(text)
    return F.cross_entropy(image @ F.normalize(text, dim=-1).T / TAU, labels)


def coop_step(position: str = "end", class_specific: bool = False) -> Work:
    first = position == "end" and not class_specific
    names = NAMES if first else FEWER
    prompts = prompts_of(names, n_ctx=16, position=position, class_specific=class_specific)
    shape = (len(names), 16) if class_specific else (16,)
    context = 0.02 * normal(*shape, prompts.width)
    least, aim = (12.0, 18.0) if first else ((4.0, None) if position == "middle" else (2.5, None))

    def step(text_of: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        leaf = context.to(dtype).requires_grad_()
        return torch.autograd.grad(coop_loss(text_of(leaf)), leaf)[0]

    where = "contexts of each class" if class_specific else f"name at the {position}"
    calls = {
        "plain": lambda: step(lambda c: features_by(encoder().model, prompts, c)),
        "fastood": lambda: step(prompts),
    }
    if first:
        bounded = prompts_of(names, n_ctx=16, chunk=CHUNK)
        calls["fastood in parts"] = lambda: step(bounded)
    return Work(
        name=f"CoOp step, {len(names)} names, 16 context tokens, {where}",
        calls=calls,
        truth=lambda: step(lambda c: features_by(exact(), prompts, c), torch.float64),
        flops=2 * flops(packed_tokens(prompts)),
        moved=4.0 * sum(p.numel() for p in encoder().model.transformer.parameters()),
        by_largest=True,
        tolerance={"fastood": (1e-4, 0.0), "": (1e-4, 0.0)},
        goals={"fastood": (Goal("speedup", least, aim, "plain"),)},
    )


def saved_mib(impl: str, work: Work) -> float:
    """Of distinct tensors kept for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in encoder().model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work.calls[impl]()
    return sum(s.nbytes() for s in kept.values()) / 2**20


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "fastood in parts"])
def bench_coop_name_last(run, benchmark, impl):
    run(coop_step, impl)
    if impl != "fastood in parts":  # it keeps parts, one after the other
        benchmark.extra_info["saved_mib"] = saved_mib(impl, coop_step())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_coop_name_in_the_middle(run, impl):
    run(coop_step, impl, "middle")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_coop_name_in_front(run, impl):
    run(coop_step, impl, "front")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_coop_class_specific(run, impl):
    run(coop_step, impl, "end", True)


# ---------------------------------------------------------------------------- CoCoOp


def cocoop(training: bool = True) -> Work:
    """4 context tokens for each image; the plain step goes back after every image."""
    prompts = prompts_of(FEWER, n_ctx=4)
    own, shift = 0.02 * normal(4, prompts.width), 0.02 * normal(IMAGES, 1, prompts.width)

    def loss(text: Tensor) -> Tensor:
        """Of images (B, K, D)."""
        return (F.normalize(text, dim=-1) @ normal(text.shape[-1]).to(text)).sum()

    def ours() -> Tensor:
        with torch.set_grad_enabled(training):
            leaf = own.clone().requires_grad_(training)
            text = prompts(leaf + shift)
            return torch.autograd.grad(loss(text), leaf)[0] if training else text

    def plain(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.set_grad_enabled(training):
            leaf = own.to(dtype).clone().requires_grad_(training)
            rows, total = [], torch.zeros_like(leaf)
            for s in shift.to(dtype):
                text = features_by(model, prompts, leaf + s)
                if training:
                    total = total + torch.autograd.grad(loss(text[None]), leaf)[0]
                rows.append(text.detach())
            return total if training else torch.stack(rows)

    what = "step" if training else "inference"
    return Work(
        name=f"CoCoOp {what}, B={IMAGES}, {len(FEWER)} names, 4 context tokens",
        calls={"plain": lambda: plain(encoder().model), "fastood": ours},
        truth=lambda: plain(exact(), torch.float64),
        flops=(1 + training) * flops(IMAGES * packed_tokens(prompts)),
        moved=4.0 * sum(p.numel() for p in encoder().model.transformer.parameters()),
        by_largest=True,
        tolerance={"fastood": (1e-4, 0.0), "": (1e-4, 0.0)},
        goals={"fastood": (Goal("speedup", 10.0, 16.0, "plain"),)},
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_cocoop_step(run, impl):
    run(cocoop, impl, True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_cocoop_inference(run, impl):
    run(cocoop, impl, False)


# -------------------------------------------------------------------------- ensembles


def ensemble() -> Work:
    """Every tenth of OpenAI's 80 templates."""

    def plain(model: Any) -> Tensor:
        rows = []
        with torch.no_grad():
            for template in ENSEMBLE:
                tokens = encoder().tokenize([fill(template, n) for n in ENSEMBLE_NAMES])
                rows.append(F.normalize(model.encode_text(tokens), dim=-1))
        return F.normalize(torch.stack(rows).mean(0), dim=-1)

    def ours() -> Tensor:
        clear_text_memory()
        return encode_classes(encoder(), ENSEMBLE_NAMES, templates=ENSEMBLE).features

    lengths = encoder().tokenize([fill(t, n) for t in ENSEMBLE for n in ENSEMBLE_NAMES])
    return Work(
        name=f"ensemble of {len(ENSEMBLE)} templates, {len(ENSEMBLE_NAMES)} names",
        calls={"plain": lambda: plain(encoder().model), "fastood": ours},
        truth=lambda: plain(exact()),
        flops=flops(int((lengths.argmax(-1) + 1).sum())),
        moved=4.0 * sum(p.numel() for p in encoder().model.transformer.parameters()),
        by_largest=True,
        tolerance={"fastood": (1e-4, 0.0), "": (1e-4, 0.0)},
        goals={"fastood": (Goal("speedup", 12.0, 16.0, "plain"),)},
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_ensemble(run, impl):
    run(ensemble, impl)
