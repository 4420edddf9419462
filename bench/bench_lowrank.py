"""All ratios of a SeTAR search for the MLP weights of one tower, from one decomposition of each.

    pytest bench/bench_lowrank.py --benchmark-only
    python -m bench.bench_lowrank       # which solver is the faster one, by shape and threads

The published code takes a full SVD for every ratio of every layer, 96 of them; one is timed (torch
takes them one by one, and all 12 matrices have one shape), and counted 96 times. It is the SVD
alone, in float32, without the products that put the matrices together again.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bench.shapes import SMOKE
from bench.suite import Goal, Work
from bench.timing import interleave
from fastood.ops.lowrank import tail_basis
from fastood.setar import LowRankBasis, count_of

RATIOS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
SIZES = (2, 48, 24) if SMOKE else (12, 3072, 768)
ALL = SIZES[0] * len(RATIOS)
SVD = f"torch.linalg.svd, 1 of {ALL}"
EIGH = "eigh once, plain"
IMPLEMENTATIONS = [SVD, EIGH, "fastood"]

SOLVED = [(96, 96), (64, 256)] if SMOKE else [(768, 768), (512, 2048), (768, 3072), (1024, 4096)]
"""Sides of a tower's matrices: those of attention and of the MLP, ViT-B/16 and L/14."""


def weights_of(count: int, m: int, n: int) -> Tensor:
    """(N, m, n) float32, a spectrum as flat as a transformer's: noise, some large directions."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(count, m, 8, generator=g), torch.randn(count, 8, n, generator=g)
    return (torch.randn(count, m, n, generator=g) + 0.5 * left @ right) / n**0.5


def plain_eigh(weights: Tensor, counts: list[int]) -> list[Tensor]:
    """Each matrix decomposed once, one product after the other for each ratio (n <= m)."""
    results = [torch.empty_like(weights) for _ in counts]
    for i, w in enumerate(weights.double()):
        _, vectors = torch.linalg.eigh(w.mT @ w)
        for count, result in zip(counts, results, strict=True):
            tail = vectors[:, :count]
            result[i] = w - (w @ tail) @ tail.mT
    return results


def low_rank() -> Work:
    weights = weights_of(*SIZES)
    n_matrices, m, n = SIZES
    counts = [count_of(x, n) for x in RATIOS]
    checked = [0, -1]

    def truth() -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(weights[checked].double(), full_matrices=False)
        kept = [(u[..., :k] * s[:, None, :k]) @ vh[:, :k] for k in (n - c for c in counts)]
        return torch.stack(kept), s[0]

    return Work(
        name=f"low-rank weights {n_matrices} x ({m} x {n}), {len(RATIOS)} ratios",
        calls={
            SVD: lambda: torch.linalg.svd(weights[0], full_matrices=False).S,
            EIGH: lambda: torch.stack([w[checked] for w in plain_eigh(weights, counts)]),
            "fastood": lambda: LowRankBasis(weights).drop(RATIOS),
        },
        truth=truth,
        result=lambda found: (
            torch.stack([w[checked] for w in found]),
            LowRankBasis(weights[0]).values,
        ),
        part={SVD: 1, EIGH: 0},
        flops=n_matrices * (m * n**2 + 9.0 * n**3 + 4.0 * m * n * max(counts)),
        moved=4.0 * weights.numel() * (1 + len(RATIOS)),
        by_largest=True,
        tolerance={"": (1e-5, 0.0)},
        goals={"fastood": (Goal("speedup", 8, 12, SVD, parts=ALL),)},
        precision="float32, worked on in float64",
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_low_rank(run, impl):
    run(low_rank, impl)


def solvers() -> None:
    """The measurements behind ``fastood.ops.lowrank.solver_of``."""
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for m, n in SOLVED:
            weights = weights_of(1, m, n)
            calls = {s: partial(tail_basis, weights, solver=s) for s in ("torch", "svd")}
            gram, svd = interleave(calls).values()
            print(
                f"{threads} threads, {m} x {n}: Gram matrix and eigh {1e3 * gram.median:.0f} ms "
                f"({1e3 * gram.best:.0f} at best), QR and SVD {1e3 * svd.median:.0f} ms "
                f"({1e3 * svd.best:.0f}): {svd.median / gram.median:.2f} x"
            )
    torch.set_num_threads(before)


if __name__ == "__main__":
    solvers()
