"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastood.errors import DataError

__all__ = ["claim", "replacing", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place once the block succeeds.

    A reader sees the old file or the new one, never half of one, and a failed write leaves the old
    file as it was.

    Raises:
        DataError: if no file can be written there.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise DataError(
            f"{target}: expected a file that can be written, got: {error.strerror or error}"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files only their owner can read
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8, atomically, making the folder if needed.

    File names that were not valid UTF-8 arrive as lone surrogates; they are written as visible
    escapes (``\\udcff``) rather than failing at the end of a long run.

    Raises:
        DataError: if the file cannot be written, the disk being full, say.
        OSError: if the folder cannot be made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        try:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as error:  # of a full disk it does not say which file
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def claim(folder: str | os.PathLike[str]) -> int | None:
    """Take a folder for this process: a handle to close (``os.close``) when done with it.

    None where there are no locks (Windows, some network file systems). A process that ends or is
    killed gives its folders back.

    Raises:
        BlockingIOError: another process, or this one, has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle
