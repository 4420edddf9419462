"""NegLabel: classes against groups of negative labels.

    pytest bench/bench_neg_label.py --benchmark-only

``published`` loops over the groups as the authors' code does (a softmax over all classes and one
group each, negatives permuted inside every batch), the product included on both sides; ``eager``
is the closed form, which alone saves most of the exponentials.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench import peers
from bench.shapes import NEGATIVES, TAU, Shape, features
from bench.suite import Goal, Work
from fastood import reference

IMPLEMENTATIONS = [
    "torch.mm", "oneDNN", "published", "eager", "compile", "reference",
    "fastood", "fastood unprepared",
]  # fmt: skip


def neg_label_groups(shape: Shape = NEGATIVES) -> Work:
    f = features(shape)
    b, k, d, _, m, g = shape
    bank = fastood.ClassBank(f.text, negatives=f.negatives, groups=g)
    assert bank.negatives is not None
    in_order = bank.negatives.flatten(0, 1)
    compiled = peers.compiled(peers.neg_label)

    def truth() -> Tensor:
        z, t, n = (F.normalize(x.double(), dim=-1) for x in (f.image, f.text, in_order))
        return reference.neg_label(z @ t.T, (z @ n.T).unflatten(1, (g, -1)), TAU)

    return Work(
        name=f"neg_label {shape}",
        calls={
            "published": lambda: peers.neg_label_published(f.image, f.text, f.negatives, g, TAU),
            "eager": lambda: peers.neg_label(f.image, f.text, in_order, g, TAU),
            "compile": lambda: compiled(f.image, f.text, in_order, g, TAU),
            "reference": lambda: fastood.neg_label(f.image, bank, tau=TAU, impl="reference"),
            "fastood": lambda: fastood.neg_label(f.image, bank, tau=TAU, impl="cpu"),
            "fastood unprepared": lambda: fastood.neg_label(
                f.image, f.text, f.negatives, groups=g, tau=TAU, impl="cpu"
            ),
        },
        truth=truth,
        flops=2.0 * b * (k + m) * d,
        moved=4.0 * (b + k + m) * d + 4.0 * b,
        product=(F.normalize(f.image, dim=-1), torch.cat([f.text, in_order])),
        goals={
            "fastood": (Goal("slowdown", 1.5, 1.2), Goal("speedup", 3.0, 8.0, "published")),
        },
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_neg_label(run, impl):
    run(neg_label_groups, impl, peak=True)
