"""Row scores of the plain-torch reference against the bare matrix product they contain.

    pytest bench/bench_scores.py --benchmark-only

The product of normalised features is what anyone pays; everything above it is what fused kernels
can save. ``eager`` is ΔEnergy as the formula reads, two log-sum-exps over the logits.
"""

from __future__ import annotations

import pytest
import torch

import fastood
from bench.conftest import SMOKE

B, K, D = (64, 50, 32) if SMOKE else (1024, 1000, 512)
TAU = 0.01


def features() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(D, generator=g)
    text = 0.8 * common + torch.randn(K, D, generator=g)
    image = 0.3 * common + 0.3 * text[torch.randint(K, (B,), generator=g)]
    image = image + torch.randn(B, D, generator=g)
    return tuple(torch.nn.functional.normalize(x, dim=-1) for x in (image, text))


def gemm(image, text):
    return image @ text.T


def eager(image, text):
    logits = image @ text.T / TAU
    cropped = logits.scatter(1, logits.argmax(1, keepdim=True), 0.0)
    return torch.logsumexp(logits, 1) - torch.logsumexp(cropped, 1)


IMPLEMENTATIONS = {
    "gemm": gemm,
    "eager": eager,
    "delta_energy": lambda z, t: fastood.delta_energy(z, fastood.ClassBank(t, normalize=False)),
    "mcm": lambda z, t: fastood.mcm(z, fastood.ClassBank(t, normalize=False)),
    "five scores": lambda z, t: fastood.score(
        z,
        t,
        methods=["max_similarity", "mcm", "msp", "energy", "delta_energy"],
        normalize=False,
    ),
}


@pytest.mark.benchmark(group=f"row scores {B}x{D}x{K} float32")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_row_scores(benchmark, impl):
    image, text = features()
    want = eager(image.double(), text.double())
    got = fastood.delta_energy(image, text, normalize=False)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    benchmark.extra_info["gflop"] = 2 * B * K * D / 1e9
    benchmark(IMPLEMENTATIONS[impl], image, text)
