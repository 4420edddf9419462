"""One cached chunk on disk: a safetensors file that is either complete or recognised as damaged."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["DamagedChunk", "StoredChunk", "read_chunk", "read_metadata", "write_atomically",
           "write_chunk"]  # fmt: skip

_FORMAT = "fastood-chunk-2"


class DamagedChunk(Exception):
    """The file is not what was written; the message says why."""


@dataclass(frozen=True)
class StoredChunk:
    """Features of a fixed run of files, in file order.

    Attributes:
        image: (n, D); rows of unreadable images are zero.
        valid: (n,) bool.
        local: (n, P, D) or None.
        reasons: row → why its image could not be used.
    """

    image: Tensor
    valid: Tensor
    local: Tensor | None = None
    reasons: Mapping[int, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        found = {"image": self.image, "valid": self.valid}
        return found if self.local is None else {**found, "local": self.local}


def write_chunk(file: Path, chunk: StoredChunk, *, scratch: Path, info: Mapping[str, str]) -> None:
    """Write a chunk so that ``file`` only ever holds all of it.

    Raises:
        OSError: if it cannot be written (no space, no permission).
    """
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in chunk.tensors().items()}
    metadata = {
        **info,
        "format": _FORMAT,
        "reasons": json.dumps({str(row): reason for row, reason in chunk.reasons.items()}),
        **{f"sum_{name}": _sum(t) for name, t in tensors.items()},
        **{f"quick_{name}": _quick_sum(t) for name, t in tensors.items()},
    }
    metadata["header"] = _header_sum(metadata, tensors)
    write_atomically(file, save(tensors, metadata), scratch=scratch)


def write_atomically(file: Path, data: bytes, *, scratch: Path) -> None:
    """Write, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    scratch.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = scratch / f"{file.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with part.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_chunk(file: Path, *, verify: bool = False) -> StoredChunk | None:
    """Map a chunk into memory; None if there is no such file.

    The header and the global features are always checked against a digest (2 KB per image); local
    features, a hundred times larger, against the sum of their words, which any flipped bit or
    overwritten block changes at the speed of reading, and against a digest with ``verify``.

    Raises:
        DamagedChunk: if the file is truncated, changed, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in list(archive.keys())}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedChunk(str(error) or type(error).__name__) from error
    if metadata.get("format") != _FORMAT or not {"image", "valid"} <= tensors.keys():
        raise DamagedChunk("not a chunk of features")
    if metadata.get("header") != _header_sum(metadata, tensors):
        raise DamagedChunk("its header does not match its checksum")
    for name, tensor in tensors.items():
        kind, check = ("sum", _sum) if verify or name != "local" else ("quick", _quick_sum)
        if metadata.get(f"{kind}_{name}") != check(tensor):
            raise DamagedChunk(f"its {name} features do not match their checksum")
    reasons = {int(row): reason for row, reason in json.loads(metadata["reasons"]).items()}
    return StoredChunk(tensors["image"], tensors["valid"], tensors.get("local"), reasons)


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file without touching its data; {} if it has none."""
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > 1 << 24:
                return {}
            found = json.loads(handle.read(size)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _sum(tensor: Tensor) -> str:
    return hashlib.blake2b(_bytes(tensor).data, digest_size=16).hexdigest()


def _quick_sum(tensor: Tensor) -> str:
    """Sum of the 64-bit words (the last ones byte by byte), modulo 2^64."""
    raw = _bytes(tensor)
    whole = len(raw) // 8 * 8
    words, rest = raw[:whole].view(np.uint64), raw[whole:]
    total = int(words.sum(dtype=np.uint64)) + int(rest.sum(dtype=np.uint64))
    return f"{total % (1 << 64):016x}"


def _header_sum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    parts = [
        {key: metadata[key] for key in sorted(metadata) if key != "header"},
        {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)},
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
