"""Files that are complete or absent: written under a temporary name, flushed, then renamed.

No torch here: processes that only cut tiles import this too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder under temporary names."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a rename to disk, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
