"""Records of a cache: what one holds, and the write-once files that stack them.

A shard is a plain safetensors file of n records, sorted by word:

    words     uint64 [n]        64-bit hash of key and variant, which the index is sorted by
    checksums uint32 [n]        CRC-32 over digest, key, variant and fields
    variants  uint16 [n]
    keys      uint8  [n, 32]    `tile_key` of the tile the record belongs to
    <field>   dtype  [n, ...]   one for each field of the specification

Its metadata carry the digest of the whole specification, so that a file of another cache, model
or recipe is never mistaken for one of this. No torch here: look-ups run in many small processes.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cytosyn_aug.cache.spec import FORMAT_VERSION, KEY_BYTES, CacheSpec
from cytosyn_aug.cache.tensor_files import map_tensors, write_tensors

SHARD_SUFFIX = ".safetensors"
# Odd, so that multiplying by it modulo 2 ** 64 maps distinct variants to distinct words.
_VARIANT_STEP = 0x9E3779B97F4A7C15

RecordKey = tuple[bytes, int]  # tile key and variant


class RecordBlock(NamedTuple):
    """Records in memory: keys uint8 [n, 32], variants uint16 [n], and every field [n, ...]."""

    keys: np.ndarray
    variants: np.ndarray
    fields: dict[str, np.ndarray]


class RecordBuffer:
    """Memory for records on their way to a shard: of fixed size, and searched by key.

    Args:
        spec: What a record holds.
        max_bytes: Size of the buffer; one record is always let in.
    """

    def __init__(self, spec: CacheSpec, max_bytes: int) -> None:
        self.capacity = max(1, max_bytes // spec.record_bytes)
        self.rows: dict[RecordKey, int] = {}
        self._keys = np.empty((self.capacity, KEY_BYTES), np.uint8)
        self._variants = np.empty(self.capacity, "<u2")
        self._fields = {f.name: np.empty((self.capacity, *f.shape), f.dtype) for f in spec.fields}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another record."""
        return len(self.rows) == self.capacity

    def add(self, record_key: RecordKey, record: Mapping[str, np.ndarray]) -> None:
        """Take a record in; one that is there already stays as it is.

        Args:
            record_key: Its tile key and variant.
            record: Every field, without the batch.
        """
        if record_key in self.rows:
            return
        row = len(self.rows)
        self._keys[row] = np.frombuffer(record_key[0], np.uint8)
        self._variants[row] = record_key[1]
        for name, array in self._fields.items():
            array[row] = record[name]
        self.rows[record_key] = row

    def read(self, record_key: RecordKey) -> dict[str, np.ndarray] | None:
        """Return a waiting record, or None."""
        row = self.rows.get(record_key)
        return None if row is None else {k: array[row] for k, array in self._fields.items()}

    def block(self) -> RecordBlock:
        """Return all waiting records, as views."""
        n = len(self.rows)
        return RecordBlock(
            self._keys[:n], self._variants[:n], {k: a[:n] for k, a in self._fields.items()}
        )

    def clear(self) -> None:
        """Forget all records."""
        self.rows = {}


def record_words(keys: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Return the numbers that records are sorted and searched by, uint64 [n].

    The first eight bytes of the key, which SHA-256 has spread evenly, shifted by the variant:
    among 40 M records two share a word with a probability of 4e-5, and are then told apart by
    their keys.

    Args:
        keys: uint8 [n, 32].
        variants: uint16 [n].
    """
    heads = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype("<u8")
    return heads + variants.astype("<u8") * np.uint64(_VARIANT_STEP)


def record_word(record_key: RecordKey) -> int:
    """Return `record_words` of one record, in less time than numpy takes for one."""
    return (int.from_bytes(record_key[0][:8], "big") + record_key[1] * _VARIANT_STEP) % (1 << 64)


def write_shard(folder: Path, spec: CacheSpec, block: RecordBlock) -> tuple[str, np.ndarray]:
    """Write records to a file of their own and return its name and sorted words.

    Names begin with the time, so that the earlier of two writers of one record is found first,
    and end at random, so that processes on any number of machines share a folder.

    Raises:
        OSError: The disk is full or cannot be written; no part of a file stays.
    """
    words = record_words(block.keys, block.variants)
    order = np.argsort(words, kind="stable")
    fields = {f.name: block.fields[f.name][order] for f in spec.fields}
    keys, variants, words = block.keys[order], block.variants[order], words[order]
    start = zlib.crc32(spec.digest.encode())
    rows = [_as_bytes(fields[name]) for name in spec.names]
    checksums = np.empty(len(words), "<u4")
    for n, (key, variant) in enumerate(zip(keys, variants.tolist(), strict=True)):
        crc = _head(start, key.tobytes(), variant)
        for matrix in rows:
            crc = zlib.crc32(matrix[n], crc)
        checksums[n] = crc
    name = f"{time.time_ns():016x}-{uuid.uuid4().hex[:16]}{SHARD_SUFFIX}"
    columns = {"words": words, "checksums": checksums, "variants": variants, "keys": keys}
    metadata = {"format_version": str(FORMAT_VERSION), "spec_digest": spec.digest}
    metadata["spec"] = spec.to_json()
    write_tensors(folder / name, columns | fields, metadata)
    return name, words


class Shard:
    """A shard's file in memory, checked against the specification; records are checked on reading.

    Attributes:
        words: uint64 [n], sorted.
        keys: uint8 [n, 32].
        variants: uint16 [n].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or belongs to another cache, model or recipe.
    """

    def __init__(self, file: Path, spec: CacheSpec) -> None:
        tensors, metadata, _ = map_tensors(file)
        if metadata.get("spec_digest") != spec.digest:
            raise ValueError(
                f"{file} is stale: written for a cache of digest {metadata.get('spec_digest')}, "
                f"this one has {spec.digest}; its records are ignored, remove it"
            )
        expected: dict[str, tuple[tuple[int, ...], str]]
        expected = {"words": ((), "<u8"), "checksums": ((), "<u4"), "variants": ((), "<u2")}
        expected |= {"keys": ((KEY_BYTES,), "|u1")}
        expected |= {f.name: (f.shape, np.dtype(f.dtype).str) for f in spec.fields}
        actual = {k: (t.shape[1:], t.dtype.str) for k, t in tensors.items()}
        lengths = {len(t) for t in tensors.values()}
        if actual != expected or len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"{file} holds {actual}, expected {expected}; remove it")
        self.file = file
        self.words, self.keys = tensors["words"], tensors["keys"]
        self.variants, self._checksums = tensors["variants"], tensors["checksums"]
        self._rows = {name: _as_bytes(tensors[name]) for name in spec.names}
        self._start = zlib.crc32(spec.digest.encode())

    def __len__(self) -> int:
        return len(self.words)

    def record_key(self, row: int) -> RecordKey:
        """Return tile key and variant of a record."""
        return self.keys[row].tobytes(), int(self.variants[row])

    def matrix(self, name: str) -> np.ndarray:
        """Return a field of all records, uint8 [n, bytes of a record], unchecked."""
        return self._rows[name]

    def read(self, row: int, record_key: RecordKey, out: Mapping[str, np.ndarray]) -> bool:
        """Copy a record and check the copy, not the map, which may be read again from a bad disk.

        Args:
            row: Which record.
            record_key: The tile key and variant it must have.
            out: For every field uint8 [num_bytes], to be filled.

        Returns:
            Whether this is the record that was once written under that key.
        """
        crc = _head(self._start, *record_key)
        for name, matrix in self._rows.items():
            content = out[name]
            content[:] = matrix[row]
            crc = zlib.crc32(content.data, crc)
        return crc == int(self._checksums[row])


def _head(start: int, key: bytes, variant: int) -> int:
    return zlib.crc32(key + variant.to_bytes(2, "little"), start)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array [n, ...] as uint8 [n, bytes of a record], without copying."""
    return array.reshape(len(array), -1).view(np.uint8)
