"""LatentCache: results of a model for tiles, looked up by the tiles' own pixels.

    FOLDER/cache.json                   specification and its digest; written first, never changed
    FOLDER/shards/<time>-<random>.safetensors   write-once records, see `cytosyn_aug.cache.records`
    FOLDER/index.safetensors            where records are; written by `compact`, may be missing

Any number of processes, on any number of machines, read and write at once: each writer makes files
of its own, which appear whole or not at all. What waits in memory is written when a process, such
as a DataLoader worker, or its handle ends. A killed writer loses what waited, and so does a worker
that persists, which its parent ends by a signal; records are therefore written at the first use
of the handle after a minute.

Size: a record takes 46 bytes and its fields. For CytoSyn that is 46 + 12,544 (moments [2, 4, 28,
28] in float16) + 3,072 (features [768] in float32) + 48 (thumbnail) = 15,710 bytes, so 40 M tiles
take 628 GB in 586 shards of 1 GiB. The index takes 16 bytes per record, 640 MB, mapped rather than
loaded; before compaction every process holds that in memory instead. A handle further holds at
most `max_pending_bytes` of records to be written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.cache import maintenance
from cytosyn_aug.cache.index import Index, RecordLocation, ShardPool
from cytosyn_aug.cache.records import RecordKey
from cytosyn_aug.cache.spec import (
    CACHE_NAME,
    KEY_BYTES,
    CacheSpec,
    check_equal,
    create_cache,
    read_spec,
)
from cytosyn_aug.cache.write_buffer import WriteBuffer


class Records(NamedTuple):
    """What `LatentCache.get` found.

    Attributes:
        is_found: bool [B].
        fields: Each field of the specification [B, ...], in its dtype, on the CPU; zeros where
            nothing was found.
    """

    is_found: Tensor
    fields: dict[str, Tensor]


class LatentCache:
    """Records by tile key and variant, shared by many processes.

    A handle may be copied into other processes, forked or spawned; records it has not flushed
    stay with the process that put them. It does not support several threads at once, nor changing
    or removing single records.

    Attributes:
        folder: Where it lies.
        spec: What it holds, and for which model and recipe.

    Example:
        >>> import tempfile
        >>> from cytosyn_aug.cache.spec import CacheSpec, Field
        >>> from cytosyn_aug.config import TileSpec
        >>> fields = (Field("cls", (3,), "float32"),)
        >>> spec = CacheSpec(tile=TileSpec(), fields=fields, model_digest="0123456789abcdef")
        >>> folder = tempfile.mkdtemp()
        >>> with LatentCache.open(folder, spec) as cache:
        ...     cache.put(["ab" * 32], {"cls": torch.ones(1, 3)})
        >>> LatentCache.open(folder).get(["ab" * 32, "cd" * 32]).is_found
        tensor([ True, False])
    """

    def __init__(self, folder: Path, spec: CacheSpec, max_pending_bytes: int) -> None:
        self.folder, self.spec = folder, spec
        self._max_pending_bytes = max_pending_bytes
        self._layout = [(f.name, f.num_bytes, np.dtype(f.dtype), f.shape) for f in spec.fields]
        self._write_buffer = WriteBuffer(folder, spec, max_pending_bytes)
        self._damaged: dict[tuple[str, int], str] = {}
        self._index = Index(folder, spec)
        self._pool = ShardPool(folder, spec)
        for fault in self._index.faults:
            warnings.warn(fault, stacklevel=3)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        spec: CacheSpec | None = None,
        *,
        max_pending_bytes: int = 1 << 26,
    ) -> LatentCache:
        """Open a cache, or create it if a specification is given and there is none yet.

        Args:
            folder: Its folder; reading needs no right to write.
            spec: What the cache must hold; None takes what is there.
            max_pending_bytes: Records are written once they fill so much memory.

        Raises:
            FileNotFoundError: There is no cache, and no specification to create one from.
            ValueError: The cache was made with another model or recipe, both sides named, or is
                damaged or of another version.
            OSError: The folder cannot be created.
        """
        folder = Path(folder).absolute()  # this process may change its directory
        if spec is not None and not (folder / CACHE_NAME).is_file():
            create_cache(folder, spec)
        stored = read_spec(folder)
        if spec is not None:
            check_equal(folder, stored, spec)
        return cls(folder, stored, max_pending_bytes)

    def __len__(self) -> int:
        """Return the number of records that readers find, duplicates included until compacted."""
        return len(self._index)

    @property
    def faults(self) -> list[str]:
        """Sentences about files and records that this handle could not use so far."""
        return [*self._index.faults, *self._damaged.values()]

    @property
    def num_damaged(self) -> int:
        """Records that this handle read as missing because their checksum was wrong."""
        return len(self._damaged)

    def get(self, keys: Sequence[str], variants: Sequence[int] | None = None) -> Records:
        """Look records up, and first write those that have waited in memory for over a minute.

        A damaged record reads as missing, is warned of once and named in `faults`.

        Args:
            keys: `tile_key` of each tile.
            variants: Number of each variant; None for 0.

        Raises:
            ValueError: A key is no SHA-256, or a variant is out of range.
            OSError: Records have waited for over a minute and cannot be written, since the disk is
                full or the folder is read-only.
        """
        record_keys = self._record_keys(keys, variants)
        if self._write_buffer.is_overdue:
            self.flush()
        out = {name: np.zeros((len(record_keys), n), np.uint8) for name, n, _, _ in self._layout}
        is_found = [False] * len(record_keys)
        self._read_write_buffer(record_keys, out, is_found)
        is_whole = all(is_found) or self._read_shards(record_keys, out, is_found)
        if not is_whole and not all(is_found):
            # A shard was compacted away; its records are in another.
            self.refresh()
            self._read_shards(record_keys, out, is_found)
        fields = {
            name: torch.from_numpy(out[name].view(dtype).reshape(len(record_keys), *shape))
            for name, _, dtype, shape in self._layout
        }
        return Records(torch.from_numpy(np.array(is_found, bool)), fields)

    def put(
        self,
        keys: Sequence[str],
        fields: Mapping[str, Tensor],
        variants: Sequence[int] | None = None,
    ) -> None:
        """Add records; they are on disk after `flush`, which happens by itself when many wait.

        A record that exists is not looked for: a second one is ignored by readers and dropped by
        `compact`, but replaces a damaged one.

        Args:
            keys: `tile_key` of each tile.
            fields: Every field of the specification [B, ...], any device; floats are rounded to
                the stored dtype.
            variants: Number of each variant; None for 0.

        Raises:
            ValueError: Other names or shapes, or values that are not finite in the stored dtype.
            OSError: The disk is full or cannot be written, which is tried at the first record; see
                `flush`.
        """
        record_keys = self._record_keys(keys, variants)
        arrays = self._checked(fields, len(record_keys))
        if self._write_buffer.is_overdue:
            self.flush()
        for n, record_key in enumerate(record_keys):
            if self._write_buffer.is_full:
                self.flush()
            self._write_buffer.add(record_key, {name: array[n] for name, array in arrays.items()})

    def flush(self) -> None:
        """Write what waits to a file of its own, which other handles see after `refresh`.

        Raises:
            OSError: The disk is full or cannot be written. What was flushed before is whole, and
                what waits goes on waiting, so that flushing can be tried again.
        """
        shard = self._write_buffer.write()
        if shard is not None:
            self._index.add([shard])

    def refresh(self) -> None:
        """See what other processes have written or compacted since."""
        if not self._index.is_current():
            self._index = Index(self.folder, self.spec)
            self._pool.clear()

    def verify(self) -> Iterator[str]:
        """Read all shards and the index; yield one sentence per fault. Changes nothing."""
        return maintenance.verify(self.folder, self.spec)

    def compact(
        self, *, max_shard_bytes: int = 1 << 30, keeps_old: bool = False
    ) -> maintenance.Compaction:
        """Merge small shards and drop damaged and duplicate records."""
        self.flush()
        done = maintenance.compact(
            self.folder, self.spec, max_shard_bytes=max_shard_bytes, keeps_old=keeps_old
        )
        self._damaged.clear()
        self.refresh()
        return done

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush; after an error as well, but without hiding it behind a second one."""
        with suppress(*(() if kind is None else (OSError,))):
            self.flush()

    def __getstate__(self) -> dict[str, Any]:
        names = {"folder": self.folder, "spec": self.spec}
        return names | {"max_pending_bytes": self._max_pending_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder, spec = state["folder"], state["spec"]
        try:
            stored = read_spec(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is not here, or no longer a cache, as it was where this handle of it "
                "was pickled; make it reachable under the same path, or open it by yours"
            ) from error
        check_equal(folder, stored, spec)
        self.__init__(folder, spec, state["max_pending_bytes"])  # type: ignore[misc]

    def _record_keys(self, keys: Sequence[str], variants: Sequence[int] | None) -> list[RecordKey]:
        numbers = [0] * len(keys) if variants is None else [int(v) for v in variants]
        if len(numbers) != len(keys):
            raise ValueError(f"{len(numbers)} variants for {len(keys)} keys, expected as many")
        if any(not 0 <= v < self.spec.num_variants for v in numbers):
            raise ValueError(f"variants are {numbers}, expected 0 to {self.spec.num_variants - 1}")
        try:
            raw = [bytes.fromhex(key) for key in keys]
        except (ValueError, TypeError) as error:
            raise ValueError(f"keys are no SHA-256 ({error}); use tile_key(image)") from error
        if any(len(key) != KEY_BYTES for key in raw):
            raise ValueError(f"keys are not all of {KEY_BYTES} bytes; use tile_key(image)")
        return list(zip(raw, numbers, strict=True))

    def _checked(self, fields: Mapping[str, Tensor], num: int) -> dict[str, np.ndarray]:
        if set(fields) != set(self.spec.names):
            raise ValueError(f"got fields {sorted(fields)}, expected {sorted(self.spec.names)}")
        arrays = {}
        for field in self.spec.fields:
            given = fields[field.name]
            dtype = getattr(torch, field.dtype)
            if given.shape != (num, *field.shape):
                raise ValueError(
                    f"{field.name} is {list(given.shape)}, expected {[num, *field.shape]}"
                )
            if given.is_floating_point() != dtype.is_floating_point:
                raise ValueError(f"{field.name} is {given.dtype}, expected {dtype}")
            stored = given.detach().to("cpu", dtype)
            if dtype.is_floating_point and not stored.isfinite().all():
                raise ValueError(
                    f"{field.name} holds values that are not finite in {dtype}; compute in "
                    "float32 or bfloat16, or make the cache with float32"
                )
            arrays[field.name] = stored.numpy()
        return arrays

    def _read_write_buffer(
        self, record_keys: list[RecordKey], out: dict[str, np.ndarray], is_found: list[bool]
    ) -> None:
        for n, record_key in enumerate(record_keys):
            record = self._write_buffer.read(record_key)
            if record is not None:
                is_found[n] = True
                for name, array in record.items():
                    out[name][n] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def _read_shards(
        self, record_keys: list[RecordKey], out: dict[str, np.ndarray], is_found: list[bool]
    ) -> bool:
        """Fill in what is found; return False if a shard was gone."""
        is_whole = True
        for location in self._index.find(record_keys):
            n = location.position
            if is_found[n]:
                continue
            try:
                is_found[n] = self._read_location(
                    location, record_keys[n], {k: m[n] for k, m in out.items()}
                )
            except FileNotFoundError:
                is_whole = False
        return is_whole

    def _read_location(
        self, location: RecordLocation, record_key: RecordKey, out: dict[str, np.ndarray]
    ) -> bool:
        try:
            shard = self._pool.get(location.shard)
        except FileNotFoundError:
            raise
        except ValueError as error:
            self._note(location.shard, 0, str(error))
            return False
        if location.row >= len(shard) or shard.record_key(location.row) != record_key:
            return False
        if shard.read(location.row, record_key, out):
            return True
        for array in out.values():
            array[:] = 0
        self._note(location.shard, location.row, maintenance.describe_damage(shard, location.row))
        return False

    def _note(self, shard: str, row: int, sentence: str) -> None:
        if not self._damaged:  # one warning per handle; `faults` has the rest
            warnings.warn(sentence, stacklevel=2)
        self._damaged.setdefault((shard, row), sentence)
