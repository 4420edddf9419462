"""GL-MCM: one image and its patches against the classes.

    pytest bench/bench_local.py --benchmark-only

``published`` keeps the softmax of every patch and class, B x P x K numbers, and takes its maximum
in numpy, as the authors' code does. The bare product is that of patches and classes.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench import peers
from bench.shapes import PATCHES, Shape, features
from bench.suite import Goal, Work
from fastood import reference

IMPLEMENTATIONS = [
    "torch.mm", "oneDNN", "published", "eager", "compile", "reference",
    "fastood", "fastood unprepared",
]  # fmt: skip


def gl_mcm_patches(shape: Shape = PATCHES) -> Work:
    f = features(shape)
    b, k, d, p, *_ = shape
    bank = fastood.ClassBank(f.text)
    compiled = peers.compiled(peers.gl_mcm)

    def truth() -> Tensor:
        z, zl, t = (F.normalize(x.double(), dim=-1) for x in (f.image, f.local, f.text))
        return reference.max_softmax(z @ t.T, 1.0) + reference.l_mcm(zl @ t.T, 1.0)

    return Work(
        name=f"gl_mcm {shape}",
        calls={
            "published": lambda: peers.gl_mcm_published(f.image, f.local, f.text, 1.0),
            "eager": lambda: peers.gl_mcm(f.image, f.local, f.text, 1.0),
            "compile": lambda: compiled(f.image, f.local, f.text, 1.0),
            "reference": lambda: fastood.gl_mcm(f.image, f.local, bank, impl="reference"),
            "fastood": lambda: fastood.gl_mcm(f.image, f.local, bank, impl="cpu"),
            "fastood unprepared": lambda: fastood.gl_mcm(f.image, f.local, f.text, impl="cpu"),
        },
        truth=truth,
        flops=2.0 * b * (p + 1) * k * d,
        moved=4.0 * (b * (p + 1) + k) * d + 4.0 * b,
        product=(F.normalize(f.local, dim=-1).flatten(0, 1), f.text),
        goals={"fastood": (Goal("slowdown", 1.5, 1.2), Goal("peak MiB", 32.0))},
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_gl_mcm(run, impl):
    run(gl_mcm_patches, impl, peak=True)
