"""Maintenance of a cache on disk: checking every byte of it, and merging its files.

Both may run while other processes read and write. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cytosyn_aug.cache.index import (
    INDEX_NAME,
    ShardPool,
    Table,
    list_shards,
    load_index,
    merge_tables,
    save_index,
)
from cytosyn_aug.cache.records import RecordBuffer, Shard, record_words, write_shard
from cytosyn_aug.cache.spec import SHARD_FOLDER, CacheSpec

LOCK_NAME = "compacting.lock"
_RETIRED = ".retired-"
# A file this old belongs to no process alive: writers finish theirs, and compaction touches its
# lock, within minutes.
_ABANDONED_S = 3600.0


class Compaction(NamedTuple):
    """What `compact` did.

    Attributes:
        num_records: Records there are now.
        num_duplicates: Dropped, because the same record was there already.
        num_damaged: Dropped, because their checksum was wrong; the next filling makes them anew.
        num_shards_before: Files there were.
        num_shards: Files there are.
        faults: Files that could not be read and were left where they are.
    """

    num_records: int
    num_duplicates: int
    num_damaged: int
    num_shards_before: int
    num_shards: int
    faults: tuple[str, ...]


def verify(folder: Path, spec: CacheSpec) -> Iterator[str]:
    """Read every shard and the index of a cache; yield one sentence per fault."""
    names = list_shards(folder)
    for name in names:
        try:
            shard = Shard(folder / SHARD_FOLDER / name, spec)
        except FileNotFoundError:  # compacted away by another process
            continue
        except ValueError as error:
            yield str(error)
            continue
        for row in np.flatnonzero(~_healthy(shard, spec)):
            yield describe_damage(shard, int(row))
    try:
        _, listed = load_index(folder, spec, is_checked=True)
    except FileNotFoundError:
        listed = []
    except ValueError as error:
        yield str(error)
        listed = []
    for name in sorted(set(listed) - set(names)):
        yield f"{folder / INDEX_NAME} names {name}, which is gone; compact the cache"
    for file in _leftovers(folder):
        yield f"{file} was left by a writer that was killed; compacting removes it"


def compact(
    folder: Path, spec: CacheSpec, *, max_shard_bytes: int = 1 << 30, keeps_old: bool = False
) -> Compaction:
    """Merge small shards, drop damaged and duplicate records, write one index of all.

    1. Check every record, and find the first healthy one of each key and variant.
    2. Copy what is to be kept of small or faulty shards into new ones, each under a new name.
    3. Write the index, then remove the shards that were copied.

    Killed at any moment it leaves every record in place, at worst twice. Readers keep what they
    have mapped, and look again when a shard they have not mapped yet is gone. In memory it takes
    one new shard and about 60 bytes per record.

    Args:
        folder: Of the cache.
        spec: What it holds.
        max_shard_bytes: Size of new shards; larger than half of it, a faultless one stays.
        keeps_old: Rename replaced shards instead of removing them, until compacted again. Network
            file systems need this while readers on other machines have them mapped, because there
            a removed file is gone at once.

    Raises:
        BlockingIOError: Another process is compacting.
        OSError: The folder cannot be written, or the disk is full; nothing is lost.
    """
    # Two at once, each keeping what the other removes, could lose records.
    with _lock(folder) as lock:
        return _compact(folder, spec, max_shard_bytes, keeps_old, lock)


def describe_damage(shard: Shard, row: int) -> str:
    """Return a sentence about a record whose checksum is wrong."""
    key, variant = shard.record_key(row)
    return (
        f"{shard.file} record {row} (tile {key.hex()[:16]}, variant {variant}) differs from what "
        "was written; it reads as missing until it is filled again"
    )


def _compact(
    folder: Path, spec: CacheSpec, max_shard_bytes: int, keeps_old: bool, lock: Path
) -> Compaction:
    for file in (folder / SHARD_FOLDER).glob(f"{_RETIRED}*"):
        file.unlink(missing_ok=True)
    names, kept, faults = [], [], []
    for name in list_shards(folder):
        try:
            shard = Shard(folder / SHARD_FOLDER / name, spec)
        except FileNotFoundError:
            continue
        except ValueError as error:
            faults.append(str(error))
            continue
        lock.touch()
        names.append(name)
        kept.append(_healthy(shard, spec))
    num_damaged = int(sum((~k).sum() for k in kept))
    num_duplicates = _drop_duplicates(ShardPool(folder, spec), names, kept)
    moved = [
        n
        for n, k in enumerate(kept)
        if not k.all() or len(k) * spec.record_bytes * 2 < max_shard_bytes
    ]
    if len(moved) == 1 and kept[moved[0]].all():
        moved = []  # nothing to merge it with
    written = _copy(folder, spec, [(names[n], kept[n]) for n in moved], max_shard_bytes, lock)
    stayed = [name for n, name in enumerate(names) if n not in set(moved)]
    current = stayed + written
    _write_index(folder, spec, current)
    for n in moved:
        _retire(folder / SHARD_FOLDER / names[n], keeps_old)
    for file in _leftovers(folder):
        file.unlink(missing_ok=True)
    num_records = int(sum(k.sum() for k in kept))
    return Compaction(
        num_records, num_duplicates, num_damaged, len(names), len(current), tuple(faults)
    )


def _healthy(shard: Shard, spec: CacheSpec) -> np.ndarray:
    """Return bool [n]: records whose checksum is right and whose word is that of their key."""
    scratch = {f.name: np.empty(f.num_bytes, np.uint8) for f in spec.fields}
    right = shard.words == record_words(shard.keys, shard.variants)
    checked = (shard.read(row, shard.record_key(row), scratch) for row in range(len(shard)))
    is_healthy: np.ndarray = right & np.fromiter(checked, bool, len(shard))
    return is_healthy


def _drop_duplicates(pool: ShardPool, names: list[str], kept: list[np.ndarray]) -> int:
    """Clear the flags of records that an earlier shard has too; return how many."""
    if not names:
        return 0
    tables = [
        Table(
            pool.get(name).words[kept[n]],
            np.full(int(kept[n].sum()), n, "<u4"),
            np.flatnonzero(kept[n]).astype("<u4"),
        )
        for n, name in enumerate(names)
    ]
    table = merge_tables(tables)
    num_dropped = 0
    seen: set[tuple[bytes, int]] = set()
    for at in np.flatnonzero(table.words[1:] == table.words[:-1]) + 1:
        record_keys = []
        for entry in (at - 1, at):
            shard = pool.get(names[table.shards[entry]])
            record_keys.append(shard.record_key(int(table.rows[entry])))
        # Keys with one and the same word: usually one key, very rarely several.
        if at < 2 or table.words[at - 2] != table.words[at]:
            seen = {record_keys[0]}
        if record_keys[1] in seen:
            kept[table.shards[at]][table.rows[at]] = False
            num_dropped += 1
        seen.add(record_keys[1])
    return num_dropped


def _copy(
    folder: Path, spec: CacheSpec, sources: list[tuple[str, np.ndarray]], max_bytes: int, lock: Path
) -> list[str]:
    """Copy the records that are to be kept into new shards; return their names."""
    if not sources:
        return []
    buffer = RecordBuffer(spec, max_bytes)
    scratch = {f.name: np.empty(f.num_bytes, np.uint8) for f in spec.fields}
    record = {f.name: scratch[f.name].view(f.dtype).reshape(f.shape) for f in spec.fields}
    written = []
    for name, kept in sources:
        lock.touch()
        shard = Shard(folder / SHARD_FOLDER / name, spec)
        for row in np.flatnonzero(kept):
            record_key = shard.record_key(int(row))
            if not shard.read(int(row), record_key, scratch):
                raise OSError(
                    f"{shard.file} read differently a second time; check the disk, nothing was "
                    "removed"
                )
            buffer.add(record_key, record)
            if buffer.is_full:
                written.append(write_shard(folder / SHARD_FOLDER, spec, buffer.block())[0])
                buffer.clear()
    if len(buffer):
        written.append(write_shard(folder / SHARD_FOLDER, spec, buffer.block())[0])
    return written


def _write_index(folder: Path, spec: CacheSpec, names: list[str]) -> None:
    tables = []
    for n, name in enumerate(names):
        words = Shard(folder / SHARD_FOLDER / name, spec).words.copy()
        number = np.full(len(words), n, "<u4")
        tables.append(Table(words, number, np.arange(len(words), dtype="<u4")))
    if tables:
        save_index(folder, spec, merge_tables(tables), names)
    else:
        (folder / INDEX_NAME).unlink(missing_ok=True)


@contextmanager
def _lock(folder: Path) -> Iterator[Path]:
    """Hold the right to compact, as a file, since locks proper fail on some network systems."""
    lock = folder / LOCK_NAME
    try:
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > _ABANDONED_S:
                lock.unlink()
        lock.open("x").close()
    except FileExistsError as error:
        since = time.strftime("%H:%M:%S", time.localtime(lock.stat().st_mtime))
        raise BlockingIOError(
            f"{folder} is being compacted since {since} or before; if that process was killed, "
            f"remove {lock}"
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: nothing can be compacted here; do it where the folder can be "
            "written, reading needs no compaction",
            str(folder),
        ) from error
    try:
        yield lock
    finally:
        lock.unlink(missing_ok=True)


def _retire(file: Path, keeps_old: bool) -> None:
    if keeps_old:
        file.replace(file.with_name(_RETIRED + file.name))
    else:
        file.unlink(missing_ok=True)


def _leftovers(folder: Path) -> list[Path]:
    """Return temporary files that no writer can still be at."""
    leftovers = []
    for file in (*folder.glob(".*.tmp"), *(folder / SHARD_FOLDER).glob(".*.tmp")):
        try:
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                leftovers.append(file)
        except FileNotFoundError:  # a writer has just renamed it
            continue
    return leftovers
