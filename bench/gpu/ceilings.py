"""What this chip does at best, measured in the run that is judged by it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.gpu.clock import Clock
from bench.gpu.inputs import DTYPES, Target
from bench.gpu.work import in_tf32

__all__ = ["Ceilings", "measured"]

_SIZES = {"fp16": 8192, "bf16": 8192, "tf32": 8192, "fp32": 4096}


class Ceilings(NamedTuple):
    """Operations a second of a large product in each precision, bytes a second of a large copy."""

    flops: dict[str, float]
    bytes: float

    def limit_s(self, precision: str, flops: float, moved: float) -> float | None:
        """Seconds that arithmetic or memory take at least; None for a precision not measured."""
        times = 3 if precision == "fp16x3" else 1
        rate = self.flops.get("fp16" if precision == "fp16x3" else precision)
        return max(times * flops / rate, moved / self.bytes) if rate else None

    def record(self) -> dict[str, float]:
        tflops = {f"{p}_tflops": rate / 1e12 for p, rate in self.flops.items()}
        return {**tflops, "copy_gbytes_per_s": self.bytes / 1e9}


def measured(clock: Clock, seconds: float = 4.0) -> Ceilings:
    """Random data: products of zeros run faster than any real one."""
    target: Target = clock.target
    flops = {}
    for kind, size in _SIZES.items():
        n = size if target.gpu else 64
        g = torch.Generator(device=target.device).manual_seed(0)
        dtype = torch.float32 if kind == "tf32" else DTYPES[kind]
        a, b = (torch.randn(n, n, generator=g, device=target.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(_: int, a=a, b=b, out=out) -> torch.Tensor:
            return torch.mm(a, b.T, out=out)

        call = in_tf32(product) if kind == "tf32" else product
        runner = clock.runner(call, 2)
        times = clock.gpu({kind: runner}, seconds / 8)
        flops[kind] = 2.0 * n**3 / times[kind].best
    source = torch.ones(2**30 if target.gpu else 2**12, dtype=torch.float32, device=target.device)
    to = torch.empty_like(source)
    runner = clock.runner(lambda _: to.copy_(source), 2)
    times = clock.gpu({"copy": runner}, seconds / 8)
    del clock
    return Ceilings(flops, 2.0 * source.nbytes / times["copy"].best)
