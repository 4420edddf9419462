"""What features depend on: recorded with every result, and the name of every cached chunk."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch

from fastood._version import installed
from fastood.data.decode import DECODE_VERSION
from fastood.data.imageset import ImageSet
from fastood.models.base import Encoder

__all__ = ["chunk_key", "key_parts", "product_precision", "provenance"]

_DECISIVE = ("fingerprint", "preprocess", "dtype", "device", "batch_size", "local", "precision",
             "versions")  # fmt: skip


def chunk_key(parts: dict[str, Any], digests: list[bytes]) -> str:
    """Name of a chunk, 40 hex digits: all its features depend on, then its files in order."""
    state = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20)
    for digest in digests:
        state.update(len(digest).to_bytes(1, "little") + digest)
    return state.hexdigest()


def key_parts(found: dict[str, Any], chunk_size: int) -> dict[str, Any]:
    """What of the provenance decides about a chunk's bits (names and folders do not)."""
    return {**{k: found[k] for k in _DECISIVE}, "decode": DECODE_VERSION, "chunk": chunk_size}


def product_precision() -> str:
    """How float32 products are taken: ``highest``, ``high`` or ``medium``.

    A program that uses torch's newer settings cannot be asked for these; their own values then.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backends: Any = torch.backends
        places = {"cuda": backends.cuda.matmul, "mkldnn": backends.mkldnn.matmul}
        return ", ".join(f"{name} {place.fp32_precision}" for name, place in places.items())


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """Versions of what the features pass through on their way (no import needed)."""
    packages = ("torch", "torchvision", "pillow", "open_clip_torch", "timm", "transformers")
    return {package: installed(package) or "absent" for package in packages}


def provenance(
    encoder: Encoder, images: ImageSet, local: bool, batch_size: int, local_dtype: torch.dtype
) -> dict[str, Any]:
    """Where features come from, as far as it can be written into a result."""
    device = encoder.device.type
    if device == "cuda":
        device = f"cuda {torch.cuda.get_device_name(encoder.device)}"
    return {
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "preprocess": encoder.preprocess_id,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": device,
        "batch_size": batch_size,
        "local": str(local_dtype).removeprefix("torch.") if local else None,
        "precision": product_precision(),
        "versions": _versions(),
        "root": images.root,
        "layout": images.layout,
        "images": len(images),
    }
