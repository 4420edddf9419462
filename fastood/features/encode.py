"""Images to features: decode in threads, encode in fixed batches, keep whole chunks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastood.data.decode import decode
from fastood.data.digests import DigestTable, digest_bytes
from fastood.data.imageset import ImageItem, ImageSet
from fastood.errors import DataError, ModelError
from fastood.features.batch import LOCAL_DTYPES, UNREADABLE, Row, encode_batch, join_batches, runs
from fastood.features.cache import FeatureCache
from fastood.features.chunkfile import StoredChunk
from fastood.features.conditions import chunk_key, key_parts, provenance
from fastood.features.featureset import FeatureChunk, FeatureSet, Skipped
from fastood.models.base import Encoder

__all__ = ["PixelTransform", "Progress", "encode_images"]

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, set_name)`` with counts of images."""


class PixelTransform(Protocol):
    """Preprocessing that may depend on a file's content, and on nothing else but its ``id``."""

    @property
    def id(self) -> str:
        """Text that changes whenever it computes something else; part of the cache key."""

    def __call__(self, image: Any, content: bytes) -> Tensor:
        """(3, H, W) pixels of a ``PIL.Image`` (RGB) whose file has the digest ``content``."""


_CHUNK_BATCHES = 2
"""Batches per chunk: at batch 64 a kill costs 128 images and those being written, a chunk with
ViT-B/16 local features in float16 is 26 MB, and a million images are 10,000 mapped files (Linux
allows 65,530)."""
_CHUNK_IMAGES = 256
"""From this batch size on a chunk is one batch."""
_AHEAD = 3
"""Batches decoded ahead of the one being encoded."""
_KEEP_BYTES = 1 << 28
"""Bytes of a chunk's files kept between hashing and decoding; larger files are read again."""
_WRITES = 2
"""Chunks that may wait to be written while the next is encoded (fsync took 8 ms on the SSD of the
development machine, as long as a GPU needs for 20 images)."""


def encode_images(
    encoder: Encoder,
    images: ImageSet,
    *,
    local: bool = False,
    batch_size: int = 64,
    cache: FeatureCache | None = None,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    local_dtype: str = "float16",
    transform: PixelTransform | None = None,
) -> FeatureSet:
    """Features of every readable image of a set.

    The sorted list of files is cut into chunks of two batches. A chunk's features depend on its
    files' contents, the encoder and the batch size alone: an unreadable image keeps its row (zero
    pixels, masked afterwards), so nothing else shifts. With a cache, chunks already there are
    mapped instead of computed, and a run that was killed resumes behind its last whole chunk with
    bit-identical features (on the same device with the same number of threads).

    Args:
        encoder: the network.
        images: what to encode.
        local: also patch features (B, P, D).
        batch_size: images per forward pass; part of the cache key.
        cache: where chunks are kept; None keeps everything in memory.
        strict: fail on the first chunk with an unreadable image instead of skipping it.
        workers: threads that read, decode and preprocess; default: one per CPU, at most 8.
        progress: called with (images done, images in total, set name).
        verify: read and hash every file again instead of trusting path, size and times, and
            check stored local features by digest instead of by sum.
        local_dtype: precision in which local features are returned, with or without a cache:
            ``"float16"`` (10 GB for 50,000 images of ViT-B/16), ``"bfloat16"``, ``"float32"``.
        transform: makes pixels in the place of ``encoder.preprocess`` (training augmentation).

    Returns:
        Features as the tower computed them (not normalised), in the order of ``images``, without
        the unreadable images, which are listed in ``skipped``.

    Raises:
        DataError: if no image is readable, or one is not and ``strict``.
        ModelError: if the encoder has no local features, or returns features that are not finite
            or zero (names the images).
        CacheError: if the cache cannot be written.
    """
    _check(encoder, images, local=local, batch_size=batch_size, workers=workers, dtype=local_dtype)
    dtype = LOCAL_DTYPES[local_dtype]
    run = _Run(encoder, images, local, batch_size, cache, strict, verify, dtype, transform)
    threads = workers or min(8, _cpus())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastood-decode")
    try:
        for done in run.chunks(pool):
            if progress is not None:
                progress(done, len(images), images.name)
        run.settle()
    finally:
        # Also after Ctrl-C: whole chunks are written, images under way are not waited for.
        pool.shutdown(wait=False, cancel_futures=True)
        run.writer.shutdown(wait=True)
        if cache is not None:
            cache.digests.flush()
    return run.result()


@dataclass
class _Work:
    """One chunk that has to be encoded."""

    start: int
    items: Sequence[ImageItem]
    rows: list[Row] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)


class _Run:
    """State of one call: chunk after chunk, in order."""

    def __init__(
        self,
        encoder: Encoder,
        images: ImageSet,
        local: bool,
        batch_size: int,
        cache: FeatureCache | None,
        strict: bool,
        verify: bool,
        local_dtype: torch.dtype,
        transform: PixelTransform | None,
    ) -> None:
        self.encoder, self.images, self.local = encoder, images, local
        self.transform = transform
        self.batch_size, self.cache, self.strict = batch_size, cache, strict
        self.verify, self.local_dtype = verify, local_dtype
        self.table: DigestTable | None = None if cache is None else cache.digests
        batches = _CHUNK_BATCHES if batch_size * _CHUNK_BATCHES <= _CHUNK_IMAGES else 1
        self.chunk_size = batch_size * batches
        self.stored: list[Future[StoredChunk]] = []
        self.settled = 0
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="fastood-write")
        self.encoded = 0
        self.provenance = provenance(encoder, images, local, batch_size, local_dtype)
        if transform is not None:
            self.provenance["preprocess"] = transform.id
        self.key_parts = key_parts(self.provenance, self.chunk_size)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Do the work; yields the number of images done so far."""
        done = 0
        for work, futures in _ahead(self._steps(pool), _AHEAD):
            if isinstance(work, StoredChunk):
                self._refuse_bad(done, work.reasons)
                self._keep(work)
                done += len(work.valid)
                yield done
                continue
            rows = [future.result() for future in futures]
            first = len(work.rows)
            self._refuse_bad(work.start + first, {i: r.reason for i, r in enumerate(rows)})
            paths = [item.path for item in work.items[first : first + len(rows)]]
            work.features.append(
                encode_batch(self.encoder, rows, paths, self.local_dtype if self.local else None)
            )
            work.rows.extend(rows)
            done += len(rows)
            if len(work.rows) == len(work.items):
                self._finish(work)
            yield done

    def _steps(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Any, list[Future[Row]]]]:
        """Stored chunks, and batches (with their rows under way) of chunks to encode."""
        items, size = self.images.items, self.chunk_size
        starts = range(0, len(items), size)

        def known(start: int) -> list[Future[tuple[bytes, bytes | None]]]:
            if self.cache is None:
                return []
            return [pool.submit(self._digest, item) for item in items[start : start + size]]

        coming = known(0)
        for start in starts:
            part = items[start : start + size]
            here = [future.result() for future in coming]
            coming = known(start + size)  # hashed while this chunk is decoded and encoded
            if self.cache is not None and self.table is not None:
                self.table.flush()
                key = chunk_key(self.key_parts, [digest for digest, _ in here])
                chunk = self.cache.get_chunk(key, verify=self.verify)
                if chunk is not None and len(chunk.valid) == len(part):
                    yield chunk, []
                    continue
            work = _Work(start, part)
            data = [content for _, content in here] or [None] * len(part)
            del here
            for b in range(0, len(part), self.batch_size):
                rows = range(b, min(b + self.batch_size, len(part)))
                yield work, [pool.submit(self._prepare, part[i], data[i]) for i in rows]
                data[b : b + self.batch_size] = [None] * len(rows)

    def _digest(self, item: ImageItem) -> tuple[bytes, bytes | None]:
        """Content digest, from the table if its file looks unchanged; and the bytes if small."""
        assert self.table is not None  # only submitted with a cache
        try:
            stamp = self.table.stamp(item)
            if stamp is not None and not self.verify:
                digest = self.table.get(stamp)
                if digest is not None:
                    return digest, None
            data = item.read()
            digest = digest_bytes(data)
            if stamp is not None and self.table.stamp(item) == stamp:
                self.table.put(stamp, digest)
        except Exception:  # _prepare reads it again and reports why it cannot
            return UNREADABLE, None
        return digest, data if len(data) * self.chunk_size <= _KEEP_BYTES else None

    def _prepare(self, item: ImageItem, data: bytes | None) -> Row:
        """Read, decode and preprocess one image; never raises for what is wrong with the image."""
        row = Row()
        try:
            if data is None:
                data = item.read()
        except MemoryError:
            row.reason, row.lasting = "not enough memory to read it", False
            return row
        except Exception as error:  # files, archives and datasets each have their own errors
            row.reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            return row
        try:
            # Hashed again even if known: the chunk is stored under what was really decoded.
            row.digest = digest_bytes(data) if self.cache is not None else UNREADABLE
            if self.transform is None:
                row.pixels = self.encoder.preprocess(decode(data))
            else:
                row.pixels = self.transform(decode(data), digest_bytes(data))
        except MemoryError:
            row.reason, row.lasting = "not enough memory to decode it", False
        except DataError as error:
            row.reason = str(error)
        except Exception as error:  # preprocessing failed on a picture that decodes
            row.reason = f"preprocessing failed: {type(error).__name__}: {str(error)[:200]}"
            row.lasting = False
        return row

    def _finish(self, work: _Work) -> None:
        """Put a chunk together, store it, and keep the mapped copy instead of the one in memory."""
        image, local = join_batches(
            work.features,
            [min(self.batch_size, len(work.items) - b)
             for b in range(0, len(work.items), self.batch_size)],
            self.encoder,
            self.local_dtype if self.local else None,
        )  # fmt: skip
        valid = torch.tensor([row.reason is None for row in work.rows])
        reasons = {i: row.reason for i, row in enumerate(work.rows) if row.reason is not None}
        chunk = StoredChunk(image, valid, local, reasons)
        self.encoded += int(valid.sum())
        if self.cache is not None and all(row.lasting for row in work.rows):
            key = chunk_key(self.key_parts, [row.digest for row in work.rows])
            self.stored.append(self.writer.submit(self._store, self.cache, key, chunk))
            self.settle(_WRITES)
        else:
            self._keep(chunk)

    def _store(self, cache: FeatureCache, key: str, chunk: StoredChunk) -> StoredChunk:
        """Write a chunk; from here on its features are the mapped file's."""
        cache.put_chunk(
            key, chunk, model=self.encoder.name, fingerprint=self.provenance["fingerprint"]
        )
        return cache.get_chunk(key) or chunk

    def settle(self, pending: int = 0) -> None:
        """Wait until at most ``pending`` writes are under way; raises what went wrong in them."""
        while self.settled < len(self.stored) - pending:
            self.stored[self.settled].result()
            self.settled += 1

    def _keep(self, chunk: StoredChunk) -> None:
        done: Future[StoredChunk] = Future()
        done.set_result(chunk)
        self.stored.append(done)

    def _refuse_bad(self, start: int, reasons: Mapping[int, str | None]) -> None:
        """With ``strict``, the first unreadable images end the run."""
        bad = [(self.images.items[start + row].path, why) for row, why in sorted(reasons.items())
               if why is not None]  # fmt: skip
        if self.strict and bad:
            raise DataError(f"{self.images.name}: cannot use {_failures(bad)}")

    def result(self) -> FeatureSet:
        """Everything without the masked rows; rows of a mapped chunk stay views of the file."""
        chunks: list[FeatureChunk] = []
        skipped: list[Skipped] = []
        kept: list[ImageItem] = []
        position = 0
        for stored in (future.result() for future in self.stored):
            items = self.images.items[position : position + len(stored.valid)]
            position += len(stored.valid)
            for first, last in runs(stored.valid):
                local = None if stored.local is None else stored.local[first:last]
                chunks.append(FeatureChunk(len(kept), stored.image[first:last], local))
                kept.extend(items[first:last])
            skipped += [
                Skipped(items[row].path, why) for row, why in sorted(stored.reasons.items())
            ]
        if not kept:
            raise DataError(
                f"{self.images.name}: none of the {len(self.images)} images can be used: "
                f"{_failures([(s.path, s.reason) for s in skipped])}"
            )
        labels = None
        if any(item.label is not None for item in kept):
            labels = np.array([-1 if i.label is None else i.label for i in kept], dtype=np.int64)
        return FeatureSet(
            name=self.images.name,
            paths=tuple(item.path for item in kept),
            labels=labels,
            class_names=self.images.class_names,
            chunks=tuple(chunks),
            skipped=tuple(skipped),
            encoded=self.encoded,
            provenance=self.provenance,
        )


def _failures(bad: Sequence[tuple[str, str]], most: int = 5) -> str:
    shown = "; ".join(f"{path} ({why})" for path, why in bad[:most])
    return shown if len(bad) <= most else f"{shown}; and {len(bad) - most} more"


def _check(
    encoder: Encoder,
    images: ImageSet,
    *,
    local: bool,
    batch_size: int,
    workers: int | None,
    dtype: str,
) -> None:
    if not isinstance(images, ImageSet):
        raise TypeError(
            f"images: expected an ImageSet (see load_images), got {type(images).__name__}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if dtype not in LOCAL_DTYPES:
        raise ValueError(f"local_dtype: expected {', '.join(LOCAL_DTYPES)}, got {dtype!r}")
    if not len(images):
        raise DataError(f"{images.name}: expected at least one image, the set is empty")
    if local and encoder.no_local is not None:
        raise ModelError(f"{encoder.name}: has no local features: {encoder.no_local}")


def _ahead(steps: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same steps, with ``depth`` of them started before the first is waited for."""
    waiting: deque[Any] = deque()
    for step in steps:
        waiting.append(step)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))  # what a container or a job may really use
    except AttributeError:
        return os.cpu_count() or 1
