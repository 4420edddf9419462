"""A digest that is equal exactly when two networks compute the same thing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "describe_callable", "weights_digest"]

_DIGEST_BYTES = 16
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe_callable(transform: object) -> str:
    """The representation of a transform without memory addresses, equal in every process."""
    return _ADDRESS.sub("", repr(transform))


def weights_digest(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """Hex digest over names, dtypes, shapes and bytes of ``state`` and over ``architecture``.

    The bytes are those of the weights *as loaded*: the same checkpoint loaded in float16 has
    another digest than in float32, because its features differ. The device does not matter.
    About 1 GB/s on one core (a ViT-B/16 CLIP in float32: 0.6 s).
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"\n{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Fingerprint:
    """A digest computed when first asked for and again after the weights were written to.

    In-place writes are seen through torch's version counters; writes through ``tensor.data`` bypass
    them and go unseen.
    """

    def __init__(self, module: nn.Module, architecture: Mapping[str, Any]) -> None:
        self._module = module
        self._architecture = dict(architecture)
        self._stamp: tuple[tuple[int, int], ...] | None = None
        self._digest = ""

    def __call__(self) -> str:
        state = {k: v for k, v in self._module.state_dict().items() if isinstance(v, Tensor)}
        stamp = tuple((v.data_ptr(), _version(v)) for v in state.values())
        if stamp != self._stamp:
            self._digest = weights_digest(state, self._architecture)
            self._stamp = stamp
        return self._digest


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
