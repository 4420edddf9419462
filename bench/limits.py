"""What this machine can do at best, measured in the same process as what is judged by it.

G*, the time of the bare product, is the faster of two: ``torch.mm``, and oneDNN's linear with the
classes reordered beforehand, as a prepared bank has them. A score that takes 1.15 G* costs 15 %
more than a matrix product nobody can do without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import SMOKE
from bench.timing import interleave

__all__ = ["BARE", "bare_products", "onednn_weight", "peak_flops", "stream_bytes"]

BARE = ("torch.mm", "oneDNN")
"""The two whose faster one is G*."""


def bare_products(image: Tensor, text: Tensor) -> dict[str, Callable[[], Tensor]]:
    """``image (B, D) @ text (K, D).T`` by either library, both given what they like best."""
    transposed = text.T
    linear = onednn_weight(text, len(image))
    return {
        "torch.mm": lambda: torch.mm(image, transposed),
        "oneDNN": lambda: linear(image),
    }


def onednn_weight(text: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """oneDNN's linear layer with the weight in the layout it prefers for ``rows`` rows."""
    if not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, text)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(text, rows)
        pointwise = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):  # private names: not in every build of torch
        return lambda x: F.linear(x, text)
    return lambda x: pointwise(x, weight, None, "none", [], "")


def peak_flops() -> float:
    """Floating-point operations a second of the fastest large float32 product seen here."""
    return _peak_flops(torch.get_num_threads())


def stream_bytes() -> float:
    """Bytes a second of the fastest large copy seen here, read and written."""
    return _stream_bytes(torch.get_num_threads())


@cache
def _peak_flops(threads: int) -> float:
    del threads
    n = 128 if SMOKE else 2048
    g = torch.Generator().manual_seed(0)
    times = interleave(
        bare_products(torch.randn(n, n, generator=g), torch.randn(n, n, generator=g))
    )
    return 2 * n**3 / min(t.best for t in times.values())


@cache
def _stream_bytes(threads: int) -> float:
    del threads
    source = torch.zeros(2**20 if SMOKE else 2**26)
    to = torch.empty_like(source)
    times = interleave({"copy": lambda: to.copy_(source)})
    return 2 * source.nbytes / times["copy"].best
