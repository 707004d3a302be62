"""Index of a cache: the sorted words of its records, merged in memory or mapped from a file.

`index.safetensors`, written by compaction, lists all shards of that time and is only mapped, so
that opening costs the same for any size. Shards written since are read for their words alone and
merged in memory, 16 bytes per record: 40 M records that were never compacted take 640 MB in every
process, compacted ones none. No torch here.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cytosyn_aug.cache.records import SHARD_SUFFIX, RecordKey, Shard, record_word
from cytosyn_aug.cache.spec import SHARD_FOLDER, CacheSpec
from cytosyn_aug.cache.tensor_files import map_tensors, write_tensors

INDEX_NAME = "index.safetensors"
ENTRY_BYTES = 8 + 4 + 4


class Table(NamedTuple):
    """Entries sorted by word; of equal words, the earlier shard's first.

    Attributes:
        words: uint64 [n], the 64-bit hashes that `record_words` returns.
        shards: uint32 [n], positions in the index's names.
        rows: uint32 [n], positions in the shard.
    """

    words: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


class ShardPool:
    """Shards kept mapped, the least used given back, because each holds a file descriptor."""

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        self._folder, self._spec = folder / SHARD_FOLDER, spec
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._most = _most_open()

    def get(self, name: str) -> Shard:
        """Return a shard.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or belongs to another cache, model or recipe.
        """
        shard = self._shards.get(name)
        if shard is None:
            shard = Shard(self._folder / name, self._spec)
            if len(self._shards) >= self._most:
                self._shards.popitem(last=False)
            self._shards[name] = shard
        else:
            self._shards.move_to_end(name)
        return shard

    def clear(self) -> None:
        """Give all shards back."""
        self._shards.clear()


class RecordLocation(NamedTuple):
    """Where a record may be: its position among the keys asked for, a shard's name, a row in it."""

    position: int
    shard: str
    row: int


class Index:
    """All that one process knows about where records are.

    Attributes:
        names: Shards, in the order they were found.
        faults: Sentences about files that were left out.
    """

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        self.names: list[str] = []
        self.faults: list[str] = []
        self._folder, self._spec = folder, spec
        self._saved = Table(*(np.empty(0, d) for d in ("<u8", "<u4", "<u4")))
        self._fresh: list[Table] = []
        self._stamp = _stamp(folder / INDEX_NAME)
        self._refused: set[str] = set()
        self._gone: set[str] = set()
        if self._stamp is not None:
            try:
                self._saved, self.names = load_index(folder, spec)
            except FileNotFoundError:  # removed since; the shards say the same
                self._stamp = None
            except ValueError as error:
                self.faults.append(str(error))
        listed = list_shards(folder)
        # Removed by hand, or compacted away since the index was read; not worth reading all anew.
        self._gone = set(self.names) - set(listed)
        self._take_in(listed)

    def __len__(self) -> int:
        return len(self._saved.words) + sum(len(t.words) for t in self._fresh)

    def is_current(self) -> bool:
        """Take in new shards; return False if others are gone, so that all must be read anew."""
        listed = list_shards(self._folder)
        gone = set(self.names) - set(listed)
        if self._stamp != _stamp(self._folder / INDEX_NAME) or gone != self._gone:
            return False
        self._take_in(listed)
        return True

    def add(self, shards: Iterable[tuple[str, np.ndarray]]) -> None:
        """Take in shards by name and sorted words, in the order in which they shall be found."""
        tables = []
        for name, words in shards:
            number = np.full(len(words), len(self.names), "<u4")
            tables.append(Table(words, number, np.arange(len(words), dtype="<u4")))
            self.names.append(name)
        if tables:
            self._fresh.append(merge_tables(tables))
        # As long as the last is not much the smaller, so that a record is merged log n times.
        while len(self._fresh) > 1 and len(self._fresh[-2].words) <= 2 * len(self._fresh[-1].words):
            self._fresh[-2:] = [merge_tables(self._fresh[-2:])]

    def find(self, record_keys: Sequence[RecordKey]) -> Iterator[RecordLocation]:
        """Yield every location that each record may be at, those to be preferred first."""
        words = [record_word(record_key) for record_key in record_keys]
        sought = np.array(words, "<u8")
        for table in (self._saved, *self._fresh):
            size = len(table.words)
            for position, at in enumerate(table.words.searchsorted(sought).tolist()):
                # More than one entry of a word is a duplicate, or (never, in practice) another key.
                while at < size and table.words[at] == words[position]:
                    shard = int(table.shards[at])
                    if shard < len(self.names):  # else the index is damaged, which `verify` says
                        name = self.names[shard]
                        if name not in self._gone:
                            yield RecordLocation(position, name, int(table.rows[at]))
                    at += 1

    def _take_in(self, listed: list[str]) -> None:
        """Read the words of listed shards that are not known yet."""
        known = self._refused.union(self.names)
        new_shards = []
        for name in listed:
            if name in known:
                continue
            try:
                # A copy, since a map would hold the file open.
                words = Shard(self._folder / SHARD_FOLDER / name, self._spec).words.copy()
            except FileNotFoundError:  # compacted away between listing and reading
                continue
            except ValueError as error:
                self._refused.add(name)
                self.faults.append(str(error))
                continue
            new_shards.append((name, words))
        self.add(new_shards)


def merge_tables(tables: list[Table]) -> Table:
    """Merge tables into one; of equal words, the earlier table's entries stay first."""
    words, shards, rows = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    order = np.argsort(words, kind="stable")
    return Table(words[order], shards[order], rows[order])


def list_shards(folder: Path) -> list[str]:
    """Return the names of a cache's shards, oldest first."""
    files = (folder / SHARD_FOLDER).glob(f"[!.]*{SHARD_SUFFIX}")
    return sorted(f.name for f in files)


def save_index(folder: Path, spec: CacheSpec, table: Table, names: list[str]) -> None:
    """Write the index of a cache, replacing the one there."""
    metadata = {"spec_digest": spec.digest, "shards": json.dumps(names), "crc32": _checksum(table)}
    write_tensors(folder / INDEX_NAME, table._asdict(), metadata)


def load_index(
    folder: Path, spec: CacheSpec, *, is_checked: bool = False
) -> tuple[Table, list[str]]:
    """Map the index of a cache; return it and the names its shard numbers stand for.

    Args:
        folder: Of the cache.
        spec: What it holds.
        is_checked: Read all of it and compare its checksum. Without, a damaged index can lose
            records, but never give wrong ones, because shards name and check their own.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another cache; the shards can do without it.
    """
    file = folder / INDEX_NAME
    tensors, metadata, _ = map_tensors(file)
    if metadata.get("spec_digest") != spec.digest:
        raise ValueError(
            f"index {file} belongs to another cache: its digest is {metadata.get('spec_digest')}, "
            f"this cache has {spec.digest}; compact this cache again"
        )
    try:
        table = Table(**tensors)
        names = [str(name) for name in json.loads(metadata["shards"])]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is not an index of a cache ({error}); compact the cache again"
        ) from error
    shapes = {t.shape for t in table}
    if [t.dtype.str for t in table] != ["<u8", "<u4", "<u4"] or len(shapes) != 1:
        raise ValueError(f"{file} holds {tensors}, expected three columns; compact the cache again")
    if is_checked and metadata.get("crc32") != _checksum(table):
        raise ValueError(f"{file} differs from what was written; compact the cache again")
    return table, names


def _most_open() -> int:
    """Return how many shards one process keeps mapped: a quarter of the files it may open."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 128
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1024 if limit == resource.RLIM_INFINITY else max(16, min(1024, limit // 4))


def _checksum(table: Table) -> str:
    crc = 0
    for column in table:
        crc = zlib.crc32(column.data, crc)
    return f"{crc:08x}"


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Tell one version of a file from the next."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
