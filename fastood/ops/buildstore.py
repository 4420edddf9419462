"""Finished builds on disk: whole or absent, found without a lock, written under one.

Layout of the folder::

    cpu-<key>/_cpu.so         the library
    cpu-<key>/build.json      what it was built from and its digest; its time is the last use
    cpu-<key>/build.log       what the compiler said
    cpu-<key>.failed.log      what it said when there is no library
    cpu.lock                  held while compiling; released when its holder dies
    .building-cpu-…/          the private folder of a build that runs or was killed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastood.errors import BuildError

try:
    import fcntl
except ImportError:  # Windows, where nothing is compiled
    fcntl = None  # type: ignore[assignment]

__all__ = ["BuildStore", "Built"]

UNUSED_SECONDS = 30 * 86400
"""Builds of other keys (old sources, old torch) are deleted when nobody loaded them for so long."""

WAIT_SECONDS = 900.0
"""How long to wait for another process that compiles: a build takes half a minute."""

# A forked child would keep the lock alive after its parent died: it closes these first.
_LOCKS: set[int] = set()


def _close_inherited() -> None:
    for handle in list(_LOCKS):
        with contextlib.suppress(OSError):
            os.close(handle)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@dataclass(frozen=True)
class Built:
    """A finished build: the library, its key, and what ``build.json`` says (``info``)."""

    path: Path
    key: str
    info: dict[str, Any]

    @property
    def log(self) -> Path:
        return self.path.parent / "build.log"


class BuildStore:
    """The finished builds of one extension in one folder.

    Args:
        folder: made when something is written; reading needs no writable folder.
        label: of the extension; the file names start with it.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.folder = folder
        self.label = label

    def place(self, key: str) -> Path:
        """The folder of the finished build with this key."""
        return self.folder / f"{self.label}-{key}"

    def failed_log(self, key: str) -> Path:
        return self.folder / f"{self.label}-{key}.failed.log"

    def find(self, key: str) -> Built | None:
        """The finished build with this key, its library read and compared with its digest."""
        place = self.place(key)
        try:
            info = json.loads((place / "build.json").read_bytes())
            library = place / str(info["library"])
            if info["key"] == key and info["sha256"] == digest(library):
                return Built(library, key, info)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return None

    def used(self, built: Built) -> None:
        """Note that a build was loaded; a read-only folder keeps its time."""
        with contextlib.suppress(OSError):
            os.utime(built.path.parent / "build.json")

    def scratch(self, key: str) -> Path:
        """A new private folder, which the umask lets others read as it does other files."""
        place = self.folder / f".building-{self.label}-{key}-{os.getpid()}-{os.urandom(3).hex()}"
        place.mkdir()
        return place

    def publish(self, scratch: Path, library: str, info: dict[str, Any]) -> Built:
        """Turn a private folder into the finished build, in place of one that is there."""
        key = str(info["key"])
        whole = {**info, "library": library, "sha256": digest(scratch / library)}
        whole["bytes"] = (scratch / library).stat().st_size
        (scratch / "build.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        place = self.place(key)
        if place.exists():  # whoever has it loaded keeps its pages
            place.rename(self.scratch(key) / "replaced")
        scratch.rename(place)
        self.failed_log(key).unlink(missing_ok=True)
        return Built(place / library, key, whole)

    def prune(self, keep: str) -> None:
        """Delete what killed builds left and what nobody used for long; only under the lock."""
        for left in self.folder.glob(f".building-{self.label}-*"):
            shutil.rmtree(left, ignore_errors=True)
        now = time.time()
        for place in self.folder.glob(f"{self.label}-*"):
            stamp = place / "build.json" if place.is_dir() else place
            with contextlib.suppress(OSError):
                unused = now - (stamp if stamp.exists() else place).stat().st_mtime
                if unused > UNUSED_SECONDS and place != self.place(keep):
                    shutil.rmtree(place) if place.is_dir() else place.unlink()

    @contextlib.contextmanager
    def lock(self, *, waiting: Callable[[], None], timeout: float = WAIT_SECONDS) -> Iterator[None]:
        """Hold the lock of this extension; ``waiting`` is called once if another process has it.

        An operating system lock: it goes with the process that holds it, however that ends.

        Raises:
            BuildError: if the folder cannot be written, or nobody let go in ``timeout`` seconds.
        """
        if fcntl is None:
            raise BuildError("CPU kernels: expected a POSIX system (Linux, macOS) to compile on")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / f"{self.label}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        _LOCKS.add(handle)
        try:
            _acquire(handle, self.folder, waiting, timeout)
            yield
        finally:
            _LOCKS.discard(handle)
            os.close(handle)


def _acquire(handle: int, folder: Path, waiting: Callable[[], None], timeout: float) -> None:
    start, pause, told = time.monotonic(), 0.02, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:  # a file system without locks
            raise unwritable(folder, error) from error
        if not told and time.monotonic() - start > 0.5:
            told = True
            waiting()
        if time.monotonic() - start > timeout:
            raise BuildError(
                f"kernels folder {folder}: another process has been compiling there for "
                f"{timeout:.0f} s; end it, or choose another folder with FASTOOD_CACHE"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


def unwritable(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        f"kernels folder {folder}: expected a folder that can be written and locked, got: "
        f"{error.strerror or error}; choose another with FASTOOD_CACHE"
    )


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
