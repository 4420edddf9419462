"""How much of an image set would still have to be encoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fastood.data.imageset import ImageSet
from fastood.features.batch import LOCAL_DTYPES
from fastood.features.cache import FeatureCache
from fastood.features.conditions import chunk_key
from fastood.features.encode import PixelTransform, _Run
from fastood.models.base import Encoder

__all__ = ["count_missing"]


def count_missing(
    encoder: Encoder,
    images: ImageSet,
    *,
    cache: FeatureCache,
    local: bool = False,
    batch_size: int = 64,
    local_dtype: str = "float16",
    transform: PixelTransform | None = None,
    workers: int = 4,
) -> int:
    """Images whose features ``encode_images`` with the same arguments would not find in ``cache``.

    Reads and hashes files whose digest is not known yet, and nothing else.
    """
    dtype = LOCAL_DTYPES[local_dtype]
    run = _Run(encoder, images, local, batch_size, cache, False, False, dtype, transform)
    run.writer.shutdown()
    with ThreadPoolExecutor(workers, thread_name_prefix="fastood-digest") as pool:
        digests = [digest for digest, _ in pool.map(run._digest, images.items)]
    cache.digests.flush()
    count = 0
    for start in range(0, len(digests), run.chunk_size):
        part = digests[start : start + run.chunk_size]
        if cache.get_chunk(chunk_key(run.key_parts, part)) is None:
            count += len(part)
    return count
