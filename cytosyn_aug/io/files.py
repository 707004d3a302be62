"""Atomic files, complete or absent: written under a temporary name, flushed, then renamed.

No torch here: processes that only cut tiles import this too.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl


@contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once the block has ended without an error.

    The bytes are on disk before the name is, and the name before this returns, so that a receipt
    written afterwards never outlives what it vouches for.

    Args:
        file: Final name; its folder must exist. An existing file is replaced.

    Yields:
        A binary stream on a temporary name beside `file`, which any error removes.

    Raises:
        OSError: Disk full, no permission and the like; names `file` and how far it got.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    written = 0
    try:
        with temporary.open("wb") as stream:
            _lock(stream)  # until it is closed, by this process or by its death
            try:
                yield stream
                stream.flush()
            finally:
                written = stream.tell() if not stream.closed else 0
            os.fsync(stream.fileno())
        temporary.replace(file)
        flush_folder(file.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            reason = f"{error.strerror} after {written:,} bytes"
            raise OSError(error.errno, reason, str(file)) from error
        raise


def write_atomically(file: Path, content: bytes) -> None:
    """Write a whole file through `atomic_file`."""
    with atomic_file(file) as stream:
        stream.write(content)


def refuse_links(folders: Iterable[Path]) -> None:
    """Raise `ValueError` where a folder is a link, so that what is written stays inside."""
    for folder in folders:
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a link, to {folder.resolve()}, expected a folder; remove it, or make "
                "a link of the whole output folder instead"
            )


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> list[Path]:
    """Remove what killed processes left in a folder under temporary names.

    Returns:
        Those that stay: a process that lives is writing them.
    """
    held = []
    for file in folder.glob(pattern):
        try:
            with file.open("rb") as stream:
                is_held = not _lock(stream)
        except FileNotFoundError:
            continue  # renamed meanwhile
        if is_held:
            held.append(file)
        else:
            file.unlink(missing_ok=True)
    return held


def check_inside(folder: Path, root: Path) -> None:
    """Make sure that a folder, which may not exist yet, is below another wherever links point.

    Raises:
        ValueError: It leads out.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{folder} leads out of {root}, to {folder.resolve()}; remove the link")


def _lock(stream: BinaryIO) -> bool:
    """Lock an open file; return False if another process has it, True where nobody can tell."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def flush_folder(folder: Path) -> None:
    """Flush a rename to disk, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
