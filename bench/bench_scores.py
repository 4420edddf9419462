"""Global scores: one at a time, all at once, with classes prepared or not, of one image.

    pytest bench/bench_scores.py --benchmark-only

The product of features and classes is what anyone pays; what fastood adds to it is the figure.
Every implementation takes image features of any norm and normalises them; classes are normalised
beforehand, packed beforehand too for ``fastood``, and neither for ``fastood unprepared``.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench import peers
from bench.shapes import ONE_IMAGE, ROWS, TAU, Features, Shape, features
from bench.suite import Goal, Work
from fastood import reference

TAUS = (1.0, TAU)
C = 2

IMPLEMENTATIONS = [
    "torch.mm", "oneDNN", "eager", "compile", "reference", "pytorch-ood",
    "fastood", "fastood unprepared",
]  # fmt: skip
ONE_SCORE = (Goal("slowdown", 1.5, 1.15),)
SMALL_CALL = (Goal("extra us", 30.0, against="torch.mm"),)


def cosines64(f: Features) -> Tensor:
    return F.normalize(f.image.double(), dim=-1) @ F.normalize(f.text.double(), dim=-1).T


def cost(shape: Shape, scores: int = 1, element: int = 4) -> dict[str, float]:
    """Of the product alone: the arithmetic of a score is a few per cent of it."""
    b, k, d, *_ = shape
    return {"flops": 2.0 * b * k * d, "moved": element * (b + k) * d + 4.0 * scores * b}


def product(f: Features) -> tuple[Tensor, Tensor]:
    return F.normalize(f.image, dim=-1), f.text


# ------------------------------------------------------------------------------ one score


def mcm_rows(shape: Shape = ROWS) -> Work:
    f = features(shape)
    bank = fastood.ClassBank(f.text)
    calls = {
        "eager": lambda: peers.mcm(f.image, f.text, 1.0),
        "reference": lambda: fastood.mcm(f.image, bank, impl="reference"),
        "fastood": lambda: fastood.mcm(f.image, bank, impl="cpu"),
        "fastood unprepared": lambda: fastood.mcm(f.image, f.text, impl="cpu"),
    }
    compiled = peers.compiled(peers.mcm)
    calls["compile"] = lambda: compiled(f.image, f.text, 1.0)
    if peers.HAVE_PYTORCH_OOD:
        theirs = peers.pytorch_ood_mcm(f.text, 1.0)
        calls["pytorch-ood"] = lambda: theirs(f.image)
    return Work(
        name=f"mcm {shape}",
        calls=calls,
        truth=lambda: reference.max_softmax(cosines64(f), 1.0),
        product=product(f),
        goals={"fastood": ONE_SCORE if shape.b > 1 else SMALL_CALL},
        **cost(shape),
    )


def energy_rows(shape: Shape = ROWS) -> Work:
    f = features(shape)
    bank = fastood.ClassBank(f.text)
    calls = {
        "eager": lambda: peers.energy(f.image, f.text, TAU),
        "reference": lambda: fastood.energy(f.image, bank, tau=TAU, impl="reference"),
        "fastood": lambda: fastood.energy(f.image, bank, tau=TAU, impl="cpu"),
        "fastood unprepared": lambda: fastood.energy(f.image, f.text, tau=TAU, impl="cpu"),
    }
    compiled = peers.compiled(peers.energy)
    calls["compile"] = lambda: compiled(f.image, f.text, TAU)
    if peers.HAVE_PYTORCH_OOD:
        theirs = peers.pytorch_ood_energy(f.text, TAU)
        calls["pytorch-ood"] = lambda: theirs(f.image)
    return Work(
        name=f"energy {shape}",
        calls=calls,
        truth=lambda: reference.energy(cosines64(f), TAU, unit=False),
        product=product(f),
        goals={"fastood": ONE_SCORE if shape.b > 1 else SMALL_CALL},
        **cost(shape),
    )


def delta_energy_rows(shape: Shape = ROWS) -> Work:
    f = features(shape)
    bank = fastood.ClassBank(f.text)
    compiled = peers.compiled(peers.delta_energy)
    calls = {
        "eager": lambda: peers.delta_energy(f.image, f.text, TAU, C),
        "compile": lambda: compiled(f.image, f.text, TAU, C),
        "reference": lambda: fastood.delta_energy(f.image, bank, tau=TAU, c=C, impl="reference"),
        "fastood": lambda: fastood.delta_energy(f.image, bank, tau=TAU, c=C, impl="cpu"),
        "fastood unprepared": lambda: fastood.delta_energy(
            f.image, f.text, tau=TAU, c=C, impl="cpu"
        ),
    }
    return Work(
        name=f"delta_energy c={C} {shape}",
        calls=calls,
        truth=lambda: reference.delta_energy(cosines64(f), TAU, C, 0.0, joint=False),
        product=product(f),
        goals={"fastood": ONE_SCORE if shape.b > 1 else SMALL_CALL},
        **cost(shape),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_mcm(run, impl):
    run(mcm_rows, impl, peak=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_energy(run, impl):
    run(energy_rows, impl)


@pytest.mark.parametrize("impl", [i for i in IMPLEMENTATIONS if i != "pytorch-ood"])
def bench_delta_energy(run, impl):
    run(delta_energy_rows, impl, peak=True)


# ------------------------------------------------------------------------------ one image

SMALL = [i for i in IMPLEMENTATIONS if i not in ("pytorch-ood", "reference")]


def mcm_one() -> Work:
    return _of_one(mcm_rows(ONE_IMAGE))


def delta_energy_one() -> Work:
    return _of_one(delta_energy_rows(ONE_IMAGE))


def _of_one(work: Work) -> Work:
    for name in ("pytorch-ood", "reference"):
        work.calls.pop(name, None)
    return work


@pytest.mark.parametrize("impl", SMALL)
def bench_mcm_of_one_image(run, impl):
    run(mcm_one, impl)


@pytest.mark.parametrize("impl", SMALL)
def bench_delta_energy_of_one_image(run, impl):
    run(delta_energy_one, impl)


# ------------------------------------------------------------------------------ all at once

ALL_AT_ONCE = [
    "torch.mm", "oneDNN", "eager", "compile", "reference", "fastood", "fastood one score",
]  # fmt: skip


def _methods() -> dict[str, tuple[str, dict[str, float]]]:
    """All global scores, those with a temperature at both; in the order of ``peers.all_global``."""
    methods: dict[str, tuple[str, dict[str, float]]] = {
        "max_similarity": ("max_similarity", {}),
        "margin": ("margin", {}),
    }
    for tau in TAUS:
        for name in ("max_logit", "mcm", "energy", "delta_energy", "neg_entropy", "variance"):
            options = {"tau": tau} | ({"c": C} if name == "delta_energy" else {})
            methods[f"{name} {tau:g}"] = (name, options)
    return methods


def all_rows(shape: Shape = ROWS) -> Work:
    f = features(shape)
    bank = fastood.ClassBank(f.text)
    methods = _methods()
    compiled = peers.compiled(peers.all_global)

    def ours(impl: str) -> dict[str, Tensor]:
        return fastood.score(f.image, bank, methods=methods, impl=impl)

    def one() -> Tensor:
        return fastood.score(f.image, bank, methods=["mcm"], impl="cpu")["mcm"]

    def truth() -> tuple[Tensor, ...]:
        s = cosines64(f)
        rows = [reference.max_similarity(s), reference.margin(s, None)]
        for tau in TAUS:
            rows += [
                reference.max_similarity(s) / tau,
                reference.max_softmax(s, tau),
                reference.energy(s, tau, unit=False),
                reference.delta_energy(s, tau, C, 0.0, joint=False),
                reference.neg_entropy(s, tau),
                reference.variance(s, tau),
            ]
        return tuple(rows)

    return Work(
        name=f"{len(methods)} scores, two taus {shape}",
        calls={
            "eager": lambda: peers.all_global(f.image, f.text, TAUS, C),
            "compile": lambda: compiled(f.image, f.text, TAUS, C),
            "reference": lambda: ours("reference"),
            "fastood": lambda: ours("cpu"),
            "fastood one score": one,
        },
        truth=truth,
        result=lambda found: tuple(found.values() if isinstance(found, dict) else found),
        part={"fastood one score": list(methods).index("mcm 1")},
        product=product(f),
        by_largest=True,  # the margin, a difference of cosines, may be next to nothing
        tolerance={"fastood": (1e-4, 0.0), "": (2e-2, 0.0)},
        goals={"fastood": (Goal("slowdown", 1.08, 1.03, "fastood one score"),)},
        **cost(shape, scores=len(methods)),
    )


@pytest.mark.parametrize("impl", ALL_AT_ONCE)
def bench_all_at_once(run, impl):
    run(all_rows, impl, peak=True)


# ------------------------------------------------------------------------------ bfloat16 features

HALF = ["torch.mm", "oneDNN", "eager", "eager in float32", "compile", "fastood"]


def mcm_bfloat16(shape: Shape = ROWS) -> Work:
    """Features as a bfloat16 tower gives them; fastood multiplies them in float32."""
    f = features(shape)
    f = f._replace(image=f.image.bfloat16(), text=f.text.bfloat16())
    bank = fastood.ClassBank(f.text)
    compiled = peers.compiled(peers.mcm)
    return Work(
        name=f"mcm {shape}, bfloat16 features",
        calls={
            "eager": lambda: peers.mcm(f.image, f.text, 1.0).float(),
            "compile": lambda: compiled(f.image, f.text, 1.0).float(),
            "eager in float32": lambda: peers.mcm(f.image.float(), bank.text, 1.0),
            "fastood": lambda: fastood.mcm(f.image, bank, impl="cpu"),
        },
        truth=lambda: reference.max_softmax(cosines64(f), 1.0),
        product=(F.normalize(f.image.float(), dim=-1), bank.text),
        tolerance={"fastood": (1e-4, 1e-7), "": (5e-2, 1e-4)},
        precision="bfloat16 in",
        **cost(shape, element=2),
    )


@pytest.mark.parametrize("impl", HALF)
def bench_mcm_bfloat16(run, impl):
    run(mcm_bfloat16, impl)
