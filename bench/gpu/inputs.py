"""Features on the device, several copies of each: a call never finds its inputs in the L2.

A graph runs a call on copy 0, 1, 2, ... in turn. Together the copies are some times larger than
the L2, so each is read from memory, as it is behind an encoder. (Text features too, which a real
evaluation finds in the L2 at times: cold is the harder case, and the same for everybody.)
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import fastood
from bench.shapes import Features, Shape, features

__all__ = ["DTYPES", "Inputs", "Target", "copies_for"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_MOST_COPIES = 96
_TIMES_L2 = 2.5


@dataclass(frozen=True)
class Target:
    """Where to measure; without a GPU sizes are tiny and times mean nothing."""

    device: torch.device

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def l2_bytes(self) -> int:
        if not self.gpu:
            return 0
        found = torch.cuda.get_device_properties(self.device)
        return int(getattr(found, "L2_cache_size", 0)) or 50 * 2**20

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Memory of what is no longer referred to, for the next case."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


def copies_for(set_bytes: float, l2_bytes: int) -> int:
    """How many copies of inputs of ``set_bytes`` are ``_TIMES_L2`` times the L2, at least two."""
    wanted = math.ceil(_TIMES_L2 * l2_bytes / max(set_bytes, 1.0))
    return max(2, min(_MOST_COPIES, wanted))


@lru_cache(maxsize=1)
def _base(shape: Shape) -> Features:
    return features(shape)


class Inputs:
    """Features of ``shape`` rounded to ``kind``, in ``copies`` different orders of images."""

    def __init__(self, shape: Shape, kind: str, target: Target) -> None:
        b, k, d, p, m, _ = shape
        self.shape, self.kind, self.target = shape, kind, target
        self.dtype = DTYPES[kind]
        self.set_bytes = (b * (1 + p) + k + m) * d * torch.finfo(self.dtype).bits // 8
        self.copies = copies_for(self.set_bytes, target.l2_bytes)
        base = _base(shape)
        order = torch.Generator().manual_seed(1)
        orders = [torch.arange(b)] + [
            torch.randperm(b, generator=order) for _ in range(self.copies - 1)
        ]
        self._orders = [o.to(target.device) for o in orders]
        # rounded once: every precision of the arithmetic sees the same numbers
        self._rounded = {
            name: getattr(base, name).to(target.device).to(self.dtype)
            for name in ("image", "text", "local", "negatives")
        }
        self._labels = base.labels.to(target.device)
        self._kept: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        self._banks: list[fastood.ClassBank] | None = None

    def of(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """``image``, ``text``, ``local`` or ``negatives`` (or ``labels``), one for each copy."""
        dtype = dtype or self.dtype
        key = (name, dtype)
        if key not in self._kept:
            if name == "labels":
                self._kept[key] = [self._labels[o] for o in self._orders]
            else:
                x = self._rounded[name].to(dtype)
                per_image = name in ("image", "local")
                self._kept[key] = [x[o] if per_image else x.clone() for o in self._orders]
        return self._kept[key]

    @property
    def banks(self) -> list[fastood.ClassBank]:
        """A prepared bank for each copy, negatives in the order given."""
        if self._banks is None:
            more = {}
            if self.shape.m:
                more = {"groups": self.shape.g, "seed": None}
            self._banks = [
                fastood.ClassBank(
                    t, negatives=n if self.shape.m else None, impl="reference", **more
                )
                for t, n in zip(self.of("text"), self.of("negatives"), strict=True)
            ]
        return self._banks
