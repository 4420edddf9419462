"""How a search computes: without gradients, and float32 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

__all__ = ["exact"]


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, no autocast, float32 products in float32; settings are restored."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.no_grad(), _without_autocast("cuda"), _without_autocast("cpu"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False)
