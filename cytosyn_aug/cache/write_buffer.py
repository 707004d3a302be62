"""Write buffer of a cache: records that a process has put and not written yet.

They are written when a handle or its process ends, at the latest. DataLoader workers end without
Python's own hooks (atexit), but with those of multiprocessing; those that persist are ended by a
signal, without any, so `is_overdue` tells when records have waited long enough. No torch here.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Mapping
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np

from cytosyn_aug.cache.records import RecordBuffer, RecordKey, write_shard
from cytosyn_aug.cache.spec import SHARD_FOLDER, CacheSpec

MAX_SECONDS = 60.0
_ADVICE = "make room or give a folder that can be written, and run again for what is missing"


class WriteBuffer:
    """Records of one handle in one process; a forked process begins with none of its own.

    Args:
        folder: Of the cache.
        spec: What a record holds.
        max_bytes: Memory that they may take.
    """

    def __init__(self, folder: Path, spec: CacheSpec, max_bytes: int) -> None:
        self._folder, self._spec, self._max_bytes = folder, spec, max_bytes
        self._buffer: RecordBuffer | None = None
        self._owner = os.getpid()
        self._since = 0.0

    def __len__(self) -> int:
        is_mine = self._buffer is not None and self._owner == os.getpid()
        return len(self._buffer) if is_mine and self._buffer is not None else 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another record."""
        return len(self) > 0 and self._buffer_of_this_process().is_full

    @property
    def is_overdue(self) -> bool:
        """Whether some have waited for too long."""
        return len(self) > 0 and time.monotonic() - self._since > MAX_SECONDS

    def add(self, record_key: RecordKey, record: Mapping[str, np.ndarray]) -> None:
        """Take a record in; one that is there already stays as it is.

        Raises:
            OSError: It is the first, and the folder cannot be written.
        """
        buffer = self._buffer_of_this_process()
        if not len(buffer):
            self._since = time.monotonic()
        buffer.add(record_key, record)

    def read(self, record_key: RecordKey) -> dict[str, np.ndarray] | None:
        """Return a waiting record, or None; in a forked process, its parent's at that time too."""
        return None if self._buffer is None else self._buffer.read(record_key)

    def write(self) -> tuple[str, np.ndarray] | None:
        """Write all to a shard of their own; return its name and sorted words, None for no records.

        Raises:
            OSError: The disk is full or cannot be written; all of them go on waiting.
        """
        if not len(self):
            return None
        buffer = self._buffer_of_this_process()
        try:
            shard = write_shard(self._folder / SHARD_FOLDER, self._spec, buffer.block())
        except OSError as error:
            message = f"{error.strerror}: {len(buffer):,} records were not cached; {_ADVICE}"
            raise OSError(error.errno, message, str(self._folder)) from error
        buffer.clear()
        return shard

    def _buffer_of_this_process(self) -> RecordBuffer:
        if self._buffer is None or self._owner != os.getpid():
            _check_writable(self._folder)
            self._buffer = RecordBuffer(self._spec, self._max_bytes)
            self._owner = os.getpid()
            # Holds the buffer and not this object, or it would never be collected.
            Finalize(self, _write_rest, (self._folder, self._spec, self._buffer), exitpriority=10)
        return self._buffer


def _check_writable(folder: Path) -> None:
    """Raise before anything is computed for a folder that cannot be written."""
    probe = folder / SHARD_FOLDER / f".{uuid.uuid4().hex}.tmp"
    try:
        with probe.open("wb"):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: nothing can be cached here; give a folder that can be written, or "
            "pass writes=False to read only",
            str(folder),
        ) from error
    probe.unlink(missing_ok=True)  # a compaction may have cleared it away


def _write_rest(folder: Path, spec: CacheSpec, buffer: RecordBuffer) -> None:
    """Write what waited at the end, when there is nobody left to raise to."""
    if not len(buffer):
        return
    try:
        write_shard(folder / SHARD_FOLDER, spec, buffer.block())
    except OSError as error:
        message = f"{error.strerror}: {len(buffer):,} records were not cached"
        warnings.warn(f"{folder}: {message}; {_ADVICE}", stacklevel=2)
    buffer.clear()
