"""Content digests of images, remembered by path, size and times so that a rerun need not read."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
import warnings
from pathlib import Path

from fastood.data.imageset import ImageItem
from fastood.data.paths import path_text

__all__ = ["DigestTable", "digest_bytes"]

_SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within one tick of the file system's clock, so
its digest is not remembered yet (git's "racy" index entries)."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (
    path BLOB NOT NULL, part BLOB NOT NULL,
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,
    digest BLOB NOT NULL, PRIMARY KEY (path, part)
) WITHOUT ROWID
"""

Stamp = tuple[bytes, bytes, int, int, int, int]


def digest_bytes(data: bytes) -> bytes:
    """BLAKE2b-128 of a file's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


class DigestTable:
    """A small SQLite file: (path, part, size, mtime, ctime, inode) → digest.

    Only a shortcut: losing it costs a rehash, so a damaged or locked table is rebuilt or passed
    over with a warning, never an error. Safe to use from several threads and processes; without
    WAL, because that does not work on network file systems.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._pending: list[tuple[Stamp, bytes]] = []
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._open()
        except sqlite3.Error as error:
            self._recover(error)

    @staticmethod
    def stamp(item: ImageItem) -> Stamp | None:
        """What identifies the current state of the file behind ``item``; None without a file."""
        if item.file is None:
            return None
        status = os.stat(item.file)  # noqa: PTH116 - half the cost of Path.stat, once per image
        return (
            os.fsencode(item.file.absolute()),
            os.fsencode(item.part or ""),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        )

    def get(self, stamp: Stamp) -> bytes | None:
        """The digest known for exactly this state, or None."""
        with self._lock:
            if self._database is None:
                return None
            try:
                row = self._database.execute(
                    "SELECT digest FROM digests WHERE path = ? AND part = ? AND size = ? AND "
                    "mtime_ns = ? AND ctime_ns = ? AND inode = ?",
                    (*stamp[:5], _signed(stamp[5])),
                ).fetchone()
            except sqlite3.Error as error:
                self._recover(error)
                return None
        return bytes(row[0]) if row else None

    def put(self, stamp: Stamp, digest: bytes) -> None:
        """Remember a digest; written by the next ``flush``."""
        if time.time_ns() - max(stamp[3], stamp[4]) < _SETTLED_NS:
            return
        with self._lock:
            self._pending.append((stamp, digest))

    def flush(self) -> None:
        """Write what was put, in one transaction."""
        with self._lock:
            rows, self._pending = self._pending, []
            if not rows or self._database is None:
                return
            try:
                with self._database:
                    self._database.executemany(
                        "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?, ?)",
                        [(*s[:5], _signed(s[5]), digest) for s, digest in rows],
                    )
            except sqlite3.Error as error:
                self._recover(error)

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.flush()
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._file, timeout=10.0, check_same_thread=False)
        try:
            database.execute(_SCHEMA)
            database.execute("SELECT size, ctime_ns, digest FROM digests LIMIT 1").fetchone()
            database.execute("PRAGMA synchronous = OFF")  # a crash may cost the table, no more
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _recover(self, error: sqlite3.Error) -> None:
        """Called with the lock held. A locked table is passed over, a damaged one rebuilt."""
        if isinstance(error, sqlite3.OperationalError) and "lock" in str(error).lower():
            return
        if self._database is not None:
            self._database.close()
            self._database = None
        try:
            self._file.unlink(missing_ok=True)
            self._database = self._open()
            outcome = "built again"
        except (OSError, sqlite3.Error) as again:
            outcome = f"not used ({again})"
        warnings.warn(
            f"table of known file digests {path_text(self._file)}: could not be read ({error}), "
            f"{outcome}; images are read once more",
            RuntimeWarning,
            stacklevel=2,
        )


def _signed(value: int) -> int:
    """SQLite integers are signed 64 bit; some file systems use the top bit of inode numbers."""
    return value - (1 << 64) if value >= 1 << 63 else value
