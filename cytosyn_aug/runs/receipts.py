"""Receipts and manifest of a run: the rows of finished units on disk.

A file of rows that is cut off or damaged says so, with what to do; so does a result that somebody
removed. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cytosyn_aug.io.files import atomic_file

MANIFEST_NAME = "manifest.parquet"
_CODED = pa.dictionary(pa.int32(), pa.string())
ROW_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("variant", pa.int32()),
        ("status", _CODED),  # edited, blank, rejected or failed
        ("reason", pa.string()),
        ("label", _CODED),
        ("slide", _CODED),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("mpp", pa.float64()),  # as a table states it, and --mpp of slides
        ("output", pa.string()),
        ("mask", pa.string()),
        ("key", pa.string()),  # SHA-256 of a tile's pixels, OpenSlide's hash of a slide
        ("seed", pa.int64()),
        ("reference", _CODED),
        ("strength", pa.float32()),
        ("similarity", pa.float32()),  # cosine of CLS features
        ("colour_distance", pa.float32()),  # mean distance in CIE Lab, over tissue
        ("recipe", _CODED),
        ("model", _CODED),
        ("unit", pa.int32()),
    ]
)
_GROUP_ROWS = 65_536
# What pyarrow raises of bytes that are not what was written; of the disk it raises OSError.
_DAMAGE = (ValueError, LookupError, NotImplementedError)


class DamagedError(ValueError):
    """A file of rows is not what was written."""


@contextmanager
def damage_named(file: Path, advice: str) -> Iterator[None]:
    """Raise `DamagedError` with the file's name and what to do, where reading finds damage."""
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the bytes
        raise DamagedError(f"{file} is damaged; {advice}") from error


def open_rows(file: Path) -> pq.ParquetFile:
    """Open a file of rows; reading it finds bytes that are not what was written."""
    return pq.ParquetFile(file, page_checksum_verification=True)


def manifest_damage(folder: Path) -> str:
    """Return what to do about a damaged manifest in a run's folder."""
    return (
        f"restore it from a copy; or remove it, and the command that wrote {folder} does all "
        "units again, to the same results"
    )


class Results:
    """Which files are below a folder, each folder in it looked at once.

    Takes about 100 bytes per file, of the folders that were asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._root = os.fspath(folder)
        self._names: dict[str, frozenset[str] | None] = {}

    def gone(self, paths: Iterable[str | None]) -> str:
        """Return the first path that is not there, "" if all are; empty ones do not count."""
        return next((path for path in paths if path and not self._has(path)), "")

    def _has(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        names = self._names[folder]
        return names is None or name in names

    def _list(self, folder: str) -> frozenset[str] | None:
        """Return the files of a folder; None of a tar file, which has all members or is absent."""
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except NotADirectoryError:
            return None
        except FileNotFoundError:
            return frozenset()


def write_receipt(file: Path, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a unit.

    Args:
        file: The receipt.
        digest: Of the unit.
        rows: Of `ROW_SCHEMA`, in order.
    """
    schema = ROW_SCHEMA.with_metadata({"digest": digest})
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    with atomic_file(file) as stream:
        pq.write_table(table, stream, write_page_checksum=True)


def read_receipt(file: Path, digest: str) -> pa.Table | None:
    """Return the rows of a unit; None if it had another digest.

    Raises:
        DamagedError: The file is not what was written.
        FileNotFoundError: There is none.
    """
    with damage_named(file, "its unit is done again"):
        with open_rows(file) as stream:
            table = stream.read(ROW_SCHEMA.names)
        is_same = (table.schema.metadata or {}).get(b"digest") == digest.encode()
        return table.replace_schema_metadata(None) if is_same else None


class UnitManifest:
    """The manifest of an earlier round, by unit.

    Args:
        file: The manifest; units are absent if it is.

    Raises:
        DamagedError: It is not what was written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._table: pa.Table | None = None
        self._digests: dict[str, str] = {}
        self._ranges: dict[int, tuple[int, int]] = {}
        self._faults: dict[int, str] = {}
        if file.is_file():
            with damage_named(file, manifest_damage(file.parent)):
                self._look_through()

    def fault(self, unit: int, digest: str) -> str | None:
        """Return None if a unit is whole, or why not, "" if that needs no saying."""
        if self._digests.get(str(unit)) != digest:
            return ""
        return self._faults.get(unit)

    def rows(self, unit: int, digest: str) -> pa.Table | None:
        """Return the rows of a unit; None if it is not there with this digest."""
        if self._digests.get(str(unit)) != digest:
            return None
        if self._table is None:  # large, and most reruns have no use for it
            advice = manifest_damage(self._file.parent)
            with damage_named(self._file, advice), open_rows(self._file) as file:
                self._table = file.read().replace_schema_metadata(None)
        start, stop = self._ranges[unit]
        return self._table.slice(start, stop - start)

    def _look_through(self) -> None:
        results = Results(self._file.parent)
        with open_rows(self._file) as file:
            metadata = file.schema_arrow.metadata or {}
            self._digests = json.loads(metadata.get(b"units", b"{}"))
            columns = ["unit", "status", "output", "mask"]
            row = 0
            for batch in file.iter_batches(_GROUP_ROWS, columns=columns):
                cells = (batch[name].to_pylist() for name in columns)
                for number, status, *paths in zip(*cells, strict=True):
                    start, _ = self._ranges.get(number, (row, row))
                    row += 1
                    self._ranges[number] = (start, row)
                    if status == "failed":
                        self._faults[number] = ""
                    elif gone := results.gone(paths):
                        self._faults.setdefault(number, f"{gone} is gone")


def write_manifest(file: Path, parts: Iterable[pa.Table], digests: Mapping[int, str]) -> None:
    """Write the rows of all units, in groups of some ten thousand.

    Args:
        file: The manifest.
        parts: Rows of one unit each, in order.
        digests: Of the units, by number.
    """
    units = json.dumps({str(number): digest for number, digest in digests.items()})
    schema = ROW_SCHEMA.with_metadata({"units": units})
    with (
        atomic_file(file) as stream,
        pq.ParquetWriter(stream, schema, write_page_checksum=True) as writer,
    ):
        waiting: list[pa.Table] = []
        for table in parts:
            waiting.append(table)
            if sum(map(len, waiting)) >= _GROUP_ROWS:
                writer.write_table(_joined(waiting, schema))
                waiting = []
        writer.write_table(_joined(waiting, schema))


def _joined(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    joined = pa.concat_tables(tables) if tables else ROW_SCHEMA.empty_table()
    joined = joined.unify_dictionaries().combine_chunks()
    return joined.replace_schema_metadata(schema.metadata)
