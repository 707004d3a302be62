"""Records of a cache: what one holds, and the write-once files that stack them.

A shard is a plain safetensors file of n records, sorted by word:

    words     uint64 [n]        what the index is sorted by; see `record_words`
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

Tag = tuple[bytes, int]  # tile key and variant: the name of a record


class Block(NamedTuple):
    """Records in memory: keys uint8 [n, 32], variants uint16 [n], and every field [n, ...]."""

    keys: np.ndarray
    variants: np.ndarray
    fields: dict[str, np.ndarray]


class RecordBuffer:
    """Records that wait to be written: preallocated, so bounded, and findable by tag.

    Args:
        spec: What a record holds.
        max_bytes: Size of the buffer; one record is always let in.
    """

    def __init__(self, spec: CacheSpec, max_bytes: int) -> None:
        self.capacity = max(1, max_bytes // spec.record_bytes)
        self.rows: dict[Tag, int] = {}
        self._keys = np.empty((self.capacity, KEY_BYTES), np.uint8)
        self._variants = np.empty(self.capacity, "<u2")
        self._fields = {f.name: np.empty((self.capacity, *f.shape), f.dtype) for f in spec.fields}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        """Whether the next new record finds no place."""
        return len(self.rows) == self.capacity

    def add(self, tag: Tag, record: Mapping[str, np.ndarray]) -> None:
        """Take a record in; one that is there already stays as it is.

        Args:
            tag: Its name.
            record: Every field, without the batch.
        """
        if tag in self.rows:
            return
        row = len(self.rows)
        self._keys[row] = np.frombuffer(tag[0], np.uint8)
        self._variants[row] = tag[1]
        for name, array in self._fields.items():
            array[row] = record[name]
        self.rows[tag] = row

    def read(self, tag: Tag) -> dict[str, np.ndarray] | None:
        """Return a waiting record, or None."""
        row = self.rows.get(tag)
        return None if row is None else {k: array[row] for k, array in self._fields.items()}

    def block(self) -> Block:
        """Return all waiting records, as views."""
        n = len(self.rows)
        return Block(
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


def tag_word(tag: Tag) -> int:
    """Return `record_words` of one record, in less time than numpy takes for one."""
    return (int.from_bytes(tag[0][:8], "big") + tag[1] * _VARIANT_STEP) % (1 << 64)


def write_shard(folder: Path, spec: CacheSpec, block: Block) -> tuple[str, np.ndarray]:
    """Write records to a file of their own and return its name and sorted words.

    Names begin with the time, so that the earlier of two writers of one record is found first,
    and end at random, so that processes on any number of machines share a folder.

    Raises:
        OSError: See `cytosyn_aug.io.files.atomic_file`.
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
    own = {"words": words, "checksums": checksums, "variants": variants, "keys": keys}
    metadata = {"format_version": str(FORMAT_VERSION), "spec_digest": spec.digest}
    metadata["spec"] = spec.to_json()
    write_tensors(folder / name, own | fields, metadata)
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
        found = {k: (t.shape[1:], t.dtype.str) for k, t in tensors.items()}
        lengths = {len(t) for t in tensors.values()}
        if found != expected or len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"{file} holds {found}, expected {expected}; remove it")
        self.file = file
        self.words, self.keys = tensors["words"], tensors["keys"]
        self.variants, self._checksums = tensors["variants"], tensors["checksums"]
        self._rows = {name: _as_bytes(tensors[name]) for name in spec.names}
        self._start = zlib.crc32(spec.digest.encode())

    def __len__(self) -> int:
        return len(self.words)

    def tag(self, row: int) -> Tag:
        """Return the name of a record."""
        return self.keys[row].tobytes(), int(self.variants[row])

    def matrix(self, name: str) -> np.ndarray:
        """Return a field of all records, uint8 [n, bytes of a record], unchecked."""
        return self._rows[name]

    def read(self, row: int, tag: Tag, out: Mapping[str, np.ndarray]) -> bool:
        """Copy a record and check the copy, not the map, which may be read again from a bad disk.

        Args:
            row: Which record.
            tag: The name it must have.
            out: For every field uint8 [num_bytes], to be filled.

        Returns:
            Whether this is the record that was once written under that name.
        """
        crc = _head(self._start, *tag)
        for name, matrix in self._rows.items():
            place = out[name]
            place[:] = matrix[row]
            crc = zlib.crc32(place.data, crc)
        return crc == int(self._checksums[row])


def _head(start: int, key: bytes, variant: int) -> int:
    return zlib.crc32(key + variant.to_bytes(2, "little"), start)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array [n, ...] as uint8 [n, bytes of a record], without copying."""
    return array.reshape(len(array), -1).view(np.uint8)
