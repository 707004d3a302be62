"""Tar files: members are written the same way every time, listed, and read by their offset.

Any tar reader reads them, WebDataset among others. No torch here.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple


class TarEntry(NamedTuple):
    """Where a tile's bytes are in its shard, and their CRC-32."""

    offset: int
    size: int
    crc32: int


class ShardWriter:
    """Appends members to a tar stream; the same members give the same bytes.

    Headers are USTAR; a name that does not fit one is put before it, as POSIX has it.

    Attributes:
        num_bytes: Written so far.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def add(self, name: str, content: bytes) -> TarEntry:
        """Append a member.

        Raises:
            OSError: The disk is full and the like.
        """
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.PAX_FORMAT))
        entry = TarEntry(self.num_bytes, len(content), zlib.crc32(content))
        self._write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return entry

    def finish(self) -> str:
        """Write the end of the archive and return the SHA-256 of all of it."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._sha256.hexdigest()

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._sha256.update(content)
        self.num_bytes += len(content)


class TarMember(NamedTuple):
    """A file in a tar file: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def list_members(file: Path) -> Iterator[TarMember]:
    """Yield the files of an uncompressed tar file, reading only its headers.

    A hard link is the file it is to, which tar stores once. Symbolic links are left out.

    Raises:
        ValueError: Not a tar file, compressed, or truncated; after the members before the damage.
    """
    try:
        size = file.stat().st_size
        locations: dict[str, tuple[int, int]] = {}
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                if info.islnk() and info.linkname in locations:
                    yield TarMember(info.name, *locations[info.linkname])
                if not info.isreg():
                    continue
                if info.offset_data + info.size > size:
                    raise ValueError(f"{file} ends inside {info.name!r}; copy it again")
                locations[info.name] = (info.offset_data, info.size)
                yield TarMember(info.name, info.offset_data, info.size)
            if size < tar.offset + 2 * tarfile.BLOCKSIZE and size % tarfile.BLOCKSIZE:
                raise ValueError(f"{file} ends inside a member; copy it again")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{file} is not an uncompressed tar file, or is damaged: {error}; unpack or copy it"
        ) from error
