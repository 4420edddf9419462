"""The feature cache: chunks named by what they were computed from, so nothing goes stale."""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from fastood.data.digests import DigestTable
from fastood.data.paths import path_text
from fastood.errors import CacheError
from fastood.features.chunkfile import (
    DamagedChunk,
    StoredChunk,
    read_chunk,
    read_metadata,
    write_atomically,
    write_chunk,
)

__all__ = ["FeatureCache"]

_TAG = "CACHEDIR.TAG"  # tells backup programs to pass over the folder (bford.info/cachedir)
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Feature cache of fastood.\n"
_TABLE = "digests.sqlite3"
_KEY = re.compile(r"[0-9a-f]{40}")
_OURS = re.compile(r"[0-9a-f]{40}\.safetensors")
_SCRATCH = re.compile(r"[0-9a-f]{40}-\d+-[0-9a-f]{8}\.tmp")
_STALE_SECONDS = 24 * 3600


class FeatureCache:
    """Features on disk, shared by every run, process and image set.

    A chunk holds the features of a fixed run of files and is named by the digest of everything
    they depend on (see ``fastood.features.encode``). There is no index to fall out of step: a run
    asks for the chunks it needs and computes those that are missing. Chunks are written to a
    scratch file, flushed and renamed, so a killed run leaves only whole chunks, and two processes
    that compute the same one replace it by an equal one.

    Layout below ``root``::

        chunks/ab/ab….safetensors    features, memory-mapped when read
        tensors/….safetensors        small tensors by name (text features)
        digests.sqlite3              known content digests of files (a shortcut, may be deleted)
        tmp/                         files being written

    Args:
        root: the folder; default ``FASTOOD_CACHE``, else the user's cache folder.

    Raises:
        CacheError: if the folder cannot be created or written.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = _default_root() if root is None else Path(root).expanduser()
        self._digests: DigestTable | None = None
        try:
            for folder in (self.root, self._scratch, self._chunks, self._tensors):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self._scratch / f"{'0' * 40}-{os.getpid()}-{os.urandom(4).hex()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
            if not (self.root / _TAG).exists():
                (self.root / _TAG).write_text(_TAG_TEXT)
        except OSError as error:
            raise CacheError(
                f"cache folder {path_text(self.root)}: expected a folder that can be written, "
                f"got: {error.strerror or error}; choose another with FASTOOD_CACHE"
            ) from error

    @property
    def _chunks(self) -> Path:
        return self.root / "chunks"

    @property
    def _tensors(self) -> Path:
        return self.root / "tensors"

    @property
    def _scratch(self) -> Path:
        return self.root / "tmp"

    @property
    def digests(self) -> DigestTable:
        """The table of known file digests, opened on first use."""
        if self._digests is None:
            self._digests = DigestTable(self.root / _TABLE)
        return self._digests

    def get_chunk(self, key: str, *, verify: bool = False) -> StoredChunk | None:
        """The chunk of that name, memory-mapped; None if it is missing.

        A damaged chunk counts as missing and is reported by a ``RuntimeWarning``.
        """
        file = self._chunk_file(key)
        try:
            chunk = read_chunk(file, verify=verify)
        except DamagedChunk as damage:
            warnings.warn(
                f"cache chunk {path_text(file)} is damaged ({damage}); it is computed again",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        if chunk is not None:
            _touch(file)
        return chunk

    def put_chunk(self, key: str, chunk: StoredChunk, **info: str) -> None:
        """Store a chunk; ``info`` is kept beside it for :meth:`info`.

        Raises:
            CacheError: if it cannot be written, with the remedy.
        """
        self._sweep()
        info["images"] = str(len(chunk.valid))
        try:
            write_chunk(self._chunk_file(key), chunk, scratch=self._scratch, info=info)
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, key: str) -> Tensor | None:
        """A small tensor stored under any text, or None (also if the file is damaged)."""
        from safetensors import SafetensorError, safe_open

        file = self._tensor_file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as archive:
                metadata = archive.metadata() or {}
                tensor: Tensor = archive.get_tensor("tensor")
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            warnings.warn(
                f"cached tensor {path_text(file)} is damaged ({error}); it is computed again",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return tensor.clone() if metadata.get("key") == key else None

    def put(self, key: str, tensor: Tensor) -> None:
        """Store a small tensor under any text.

        Raises:
            CacheError: if it cannot be written.
        """
        from safetensors.torch import save

        data = save({"tensor": tensor.detach().cpu().contiguous()}, {"key": key})
        try:
            write_atomically(self._tensor_file(key), data, scratch=self._scratch)
        except OSError as error:
            raise self._unwritable(error) from error

    def info(self) -> dict[str, Any]:
        """Folder, number of chunks and images, bytes, and the same for each model."""
        models: dict[str, dict[str, int]] = defaultdict(
            lambda: {"chunks": 0, "images": 0, "bytes": 0}
        )
        for file in self._files(self._chunks, "*/*", _OURS):
            metadata = read_metadata(file)
            model = models[metadata.get("model", "unknown")]
            model["chunks"] += 1
            model["images"] += int(metadata.get("images", 0))
            model["bytes"] += _size(file)
        tensors = list(self._files(self._tensors, "*", _OURS))
        rest = [*tensors, *self._files(self._scratch, "*", _SCRATCH), *self._table_files()]
        return {
            "folder": path_text(self.root),
            "chunks": sum(m["chunks"] for m in models.values()),
            "images": sum(m["images"] for m in models.values()),
            "tensors": len(tensors),
            "bytes": sum(m["bytes"] for m in models.values()) + sum(map(_size, rest)),
            "models": {name: models[name] for name in sorted(models)},
        }

    def clear(self, older_than: float | timedelta | None = None) -> dict[str, int]:
        """Delete what the cache wrote, and nothing else.

        Args:
            older_than: seconds (or a timedelta) since last use; None deletes everything.

        Returns:
            ``{"files": deleted, "bytes": freed}``.
        """
        if isinstance(older_than, timedelta):
            older_than = older_than.total_seconds()
        if older_than is not None and not older_than >= 0:
            raise ValueError(f"older_than: expected seconds >= 0, got {older_than}")
        files = [*self._files(self._chunks, "*/*", _OURS), *self._files(self._tensors, "*", _OURS)]
        files += self._files(self._scratch, "*", _SCRATCH)
        if older_than is None:
            if self._digests is not None:
                self._digests.close()
                self._digests = None
            files += self._table_files()
        deleted = freed = 0
        newest = time.time() - (older_than or 0)
        for file in files:
            try:
                status = file.stat()
                if older_than is None or status.st_mtime < newest:
                    file.unlink()
                    deleted, freed = deleted + 1, freed + status.st_size
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                raise CacheError(f"cannot delete {path_text(file)}: {error.strerror}") from error
        return {"files": deleted, "bytes": freed}

    def _chunk_file(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key: expected 40 hex digits, got {key!r}")
        return self._chunks / key[:2] / f"{key}.safetensors"

    def _tensor_file(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=20).hexdigest()
        return self._tensors / f"{name}.safetensors"

    def _table_files(self) -> list[Path]:
        names = (_TABLE, f"{_TABLE}-journal")
        return [self.root / n for n in names if (self.root / n).is_file()]

    @staticmethod
    def _files(folder: Path, pattern: str, ours: re.Pattern[str]) -> Iterator[Path]:
        for file in sorted(folder.glob(pattern)):
            if ours.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                yield file

    def _sweep(self) -> None:
        """Delete scratch files that a killed run left more than a day ago."""
        for file in self._files(self._scratch, "*", _SCRATCH):
            try:
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()
            except OSError:
                continue  # in use or already gone: not ours to worry about

    def _unwritable(self, error: OSError) -> CacheError:
        return CacheError(
            f"cache folder {path_text(self.root)}: cannot be written ({error.strerror or error}); "
            "what was complete is kept; make room (fastood cache clear), choose another folder "
            "with FASTOOD_CACHE, or run without a cache"
        )


def _default_root() -> Path:
    chosen = os.environ.get("FASTOOD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fastood", appauthor=False)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _touch(file: Path) -> None:
    """The modification time of a chunk is the time of its last use; a read-only one keeps it."""
    try:
        os.utime(file)
    except OSError:
        return
