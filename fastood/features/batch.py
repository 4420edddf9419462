"""One fixed batch through the image tower, with the rows of unreadable images masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastood.errors import ModelError
from fastood.models.base import Encoder

__all__ = ["LOCAL_DTYPES", "UNREADABLE", "Row", "encode_batch", "join_batches", "runs"]

LOCAL_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

UNREADABLE = b"unreadable"
"""Stands in for the digest of a file that cannot be read."""

Features = tuple[Tensor, Tensor | None]


@dataclass
class Row:
    """One image on its way: its pixels, or why there are none."""

    pixels: Tensor | None = None
    reason: str | None = None
    digest: bytes = UNREADABLE
    lasting: bool = True
    """False if the reason does not lie in the file (memory): not to be stored."""


def encode_batch(
    encoder: Encoder, rows: Sequence[Row], paths: Sequence[str], local_dtype: torch.dtype | None
) -> Features | None:
    """Features of one batch on the CPU; None if it has no readable image.

    Unreadable images go through the tower as zero pixels, so that the shape of the computation
    (and with it the last bit of every other row) does not depend on them; their features are
    replaced by zeros. The rows' pixels are released.

    Args:
        encoder: the network.
        rows: B images.
        paths: B names, for messages.
        local_dtype: precision for local features; None: none are asked for.

    Raises:
        ModelError: if shapes are wrong, or features of a readable image zero or not finite.
    """
    pixels = {i: row.pixels for i, row in enumerate(rows) if row.pixels is not None}
    if not pixels:
        return None
    shapes = {tuple(p.shape) for p in pixels.values()}
    if len(shapes) > 1:
        raise ModelError(
            f"{encoder.name}: preprocess must give every image the same shape, got {sorted(shapes)}"
        )
    blank = torch.zeros_like(next(iter(pixels.values())))
    batch = torch.stack([pixels.get(i, blank) for i in range(len(rows))])
    for row in rows:
        row.pixels = None
    with torch.no_grad():
        features = encoder.encode_image(batch, local=local_dtype is not None)
    image = features.image.detach().to("cpu")
    if image.ndim != 2 or len(image) != len(rows) or not image.is_floating_point():
        raise ModelError(
            f"{encoder.name}: expected image features ({len(rows)}, D), got {tuple(image.shape)} "
            f"{image.dtype}"
        )
    keep = torch.tensor([i in pixels for i in range(len(rows))])
    size = torch.linalg.vector_norm(image.float(), dim=1)
    _refuse(encoder.name, "image", paths, keep & (~torch.isfinite(size) | (size == 0)))
    image = torch.where(keep[:, None], image, 0)
    if local_dtype is None:
        return image, None
    if features.local is None or features.local.ndim != 3 or len(features.local) != len(rows):
        got = None if features.local is None else tuple(features.local.shape)
        raise ModelError(f"{encoder.name}: expected local features ({len(rows)}, P, D), got {got}")
    local = features.local.detach().to("cpu").to(local_dtype)
    finite = torch.isfinite(local).flatten(1).all(dim=1)
    what = f"local ({str(local_dtype).removeprefix('torch.')})"
    _refuse(encoder.name, what, paths, keep & ~finite)
    return image, torch.where(keep[:, None, None], local, 0)


def _refuse(name: str, what: str, paths: Sequence[str], bad: Tensor) -> None:
    if not bool(bad.any()):
        return
    named = [paths[i] for i in torch.nonzero(bad).flatten().tolist()]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    raise ModelError(
        f"{name}: {what} features are zero or not finite for {', '.join(named[:5])}{more}; usual "
        "causes: float16 overflow (compute in float32, or local_dtype='float32'), a damaged "
        "checkpoint"
    )


def join_batches(
    batches: Sequence[Features | None],
    sizes: Sequence[int],
    encoder: Encoder,
    local_dtype: torch.dtype | None,
) -> Features:
    """Concatenate the batches of a chunk; one without any readable image is rows of zeros."""
    known = next((b for b in batches if b is not None), None)
    width = encoder.embed_dim if known is None else known[0].shape[1]
    dtype = encoder.dtype if known is None else known[0].dtype
    image = torch.cat(
        [torch.zeros(n, width, dtype=dtype) if b is None else b[0]
         for b, n in zip(batches, sizes, strict=True)]
    )  # fmt: skip
    if local_dtype is None:
        return image, None
    patches = encoder.num_patches or 0
    if known is not None and known[1] is not None:
        patches = known[1].shape[1]
    local = [
        torch.zeros(n, patches, width, dtype=local_dtype) if b is None or b[1] is None else b[1]
        for b, n in zip(batches, sizes, strict=True)
    ]
    return image, torch.cat(local)


def runs(valid: Tensor) -> list[tuple[int, int]]:
    """Start and end of every run of True in (n,) bool."""
    padded = np.concatenate(([0], valid.numpy().astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(padded)).reshape(-1, 2)
    return [(int(first), int(last)) for first, last in edges]
