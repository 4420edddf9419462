"""How a search computes: without gradients, and float32 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

__all__ = ["exact"]


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, no autocast, float32 products in float32; settings are restored.

    ``torch.set_float32_matmul_precision("medium")``, usual in training scripts, also makes products
    on some CPUs bfloat16, whose errors are far above the differences between candidates.
    """
    with _float32(), torch.no_grad(), _without_autocast("cuda"), _without_autocast("cpu"):
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """float32 products and convolutions in float32."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):  # torch below 2.9
        before, cudnn = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(before)
            backends.cudnn.allow_tf32 = cudnn
        return
    # the older settings must not be touched where a program has used these
    places = [
        backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv,
    ]  # fmt: skip
    kept = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, kept, strict=True):
            place.fp32_precision = precision


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False)
