"""Tiles on disk: tar shards of lossless WebP, and one table that says where each tile is.

    OUT/dataset.json          written last: what is here, and the digest of the table
    OUT/tiles.parquet         one row per tile: where it comes from, where its bytes are
    OUT/<split>/<slide>.tar   plain USTAR; members <slide>/<x>_<y>.webp

The coordinates are the truth, the shards a copy that can be cut again. Every read checks the
record's CRC-32, because 95 % of single flipped bits in lossless WebP decode to wrong pixels without
an error. Any tar reader reads the shards; the table gives random access. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import decode_tile

FORMAT_VERSION = 1
DATASET_NAME = "dataset.json"
TABLE_NAME = "tiles.parquet"
_NAME = pa.dictionary(pa.int32(), pa.string())
TILE_SCHEMA = pa.schema(
    [
        *((name, _NAME) for name in ("split", "project", "site", "patient", "slide")),
        ("x_level0", pa.int32()),
        ("y_level0", pa.int32()),
        ("extent_level0", pa.int32()),  # side of the tile in level-0 pixels; 0: not known
        ("level", pa.int8()),
        ("mpp", pa.float64()),  # as delivered
        ("tissue", pa.float32()),  # share of the tile inside the mask
        ("stained", pa.float32()),
        ("sharpness", pa.float32()),
        ("source", pa.string()),  # file that was ingested; "" for tiles cut here
        ("shard", _NAME),
        ("offset", pa.int64()),  # of the WebP's first byte in the shard
        ("size", pa.int32()),
        ("crc32", pa.uint32()),
    ]
)
_MAX_OPEN_SHARDS = 128
_READ_COLUMNS = ("shard", "slide", "x_level0", "y_level0", "offset", "size", "crc32")


class _Descriptor:
    """An open shard; closed when the last thread that reads from it lets go of it."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class TileStore:
    """Random access to the tiles of a finished tile stage, checked record by record.

    Threads may share it. It may be copied into other processes, forked or spawned: each opens
    shards of its own, at most 128 at a time. In memory a tile costs about 40 bytes.

    Example:
        store = TileStore("tiles", "train")
        image = store.read(0)  # uint8 [224, 224, 3]

    Attributes:
        tile: Size and scale of the tiles.
        slides: Names of the slides, sorted.
        slide_index: int64 [N], position in `slides` of each tile's slide.

    Raises:
        ValueError: The stage has not finished, is of another version, has no such split, or the
            table is not the one `dataset.json` vouches for.
    """

    def __init__(self, folder: Path | str, split: str | None = None) -> None:
        self.folder = Path(folder)
        description = read_description(self.folder)
        self.tile = TileSpec(**description["tile"])
        chosen = None if split is None else pc.field("split") == split
        table = pq.read_table(self.folder / TABLE_NAME, columns=list(_READ_COLUMNS), filters=chosen)
        if not len(table):
            names = ", ".join(description["splits"])
            raise ValueError(f"{self.folder} has no tiles of split {split}, expected {names}")
        self.slides, self.slide_index = _coded(table["slide"])
        self._shards, self._shard_index = _coded(table["shard"])
        self._columns = {n: table[n].to_numpy() for n in _READ_COLUMNS[2:]}
        self._handles: OrderedDict[int, _Descriptor] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.slide_index)

    def read(self, index: int) -> np.ndarray:
        """Return a tile, uint8 [H, W, 3].

        Raises:
            ValueError: Its bytes are not those that were written; names shard and tile.
            OSError: They cannot be read; names both too.
        """
        content = self.read_bytes(index)
        try:
            return decode_tile(content)
        except OSError as error:
            raise ValueError(f"{self.folder / self.name(index)} is no WebP: {error}") from error

    def read_bytes(self, index: int) -> bytes:
        """Return a tile as stored, after checking it."""
        offset, size, crc32 = (int(self._columns[n][index]) for n in ("offset", "size", "crc32"))
        try:
            shard = self._open(int(self._shard_index[index]))
            content = os.pread(shard.number, size, offset)
        except OSError as error:
            raise OSError(f"{self.folder / self.name(index)} cannot be read: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc32:
            raise ValueError(
                f"{self.folder / self.name(index)} differs from what was written ({len(content)} "
                f"of {size} bytes, wrong CRC-32); delete this shard and run the tile stage again"
            )
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": OrderedDict(), "_process": -1}

    def _open(self, shard: int) -> _Descriptor:
        if self._process != os.getpid():  # after a fork: descriptors are shared, the table is not
            self._handles, self._process = OrderedDict(), os.getpid()
        handle = self._handles.pop(shard, None)
        if handle is None:
            if len(self._handles) >= _MAX_OPEN_SHARDS:
                self._handles.popitem(last=False)
            handle = _Descriptor(self.folder / self._shards[shard])
        self._handles[shard] = handle
        return handle

    def name(self, index: int) -> str:
        """Return a tile's shard, relative to `folder`, and corner, for messages."""
        x, y = self._columns["x_level0"][index], self._columns["y_level0"][index]
        return f"{self._shards[self._shard_index[index]]} tile {x}_{y}"


def read_description(folder: Path) -> dict[str, Any]:
    """Return `dataset.json`, after checking that the table is the one it describes.

    Raises:
        ValueError: It is missing (the stage has not finished), of another version or wrong.
    """
    file = folder / DATASET_NAME
    if not file.is_file():
        raise ValueError(f"{folder} has no {DATASET_NAME}; the tile stage did not finish, rerun it")
    description: dict[str, Any] = json.loads(file.read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {description.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}; cut the tiles again or install the matching release"
        )
    if file_sha256(folder / TABLE_NAME) != description["files"][TABLE_NAME]:
        raise ValueError(f"{folder / TABLE_NAME} is not the one {file} describes; copy it again")
    return description


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_tiles(folder: Path) -> Iterator[str]:
    """Read every table and tile of a finished stage; yield one sentence a fault.

    Raises:
        ValueError: The table is not the one that the description names.
    """
    store = TileStore(folder)
    for name, sha256 in read_description(folder)["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            yield f"{folder / name} is not the file that was written"
    for index in range(len(store)):
        try:
            image = store.read(index)
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        if image.shape[:2] != (store.tile.size_px,) * 2:
            yield f"{folder / store.name(index)} is of {image.shape[1]}x{image.shape[0]} px"


def _coded(column: pa.ChunkedArray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sorted values of a column of names, and int64 positions in them."""
    values = column.unify_dictionaries().combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # no rows
        return (), np.zeros(0, np.int64)
    codes = values.indices.to_numpy().astype(np.int64)
    used, codes = np.unique(codes, return_inverse=True)
    names = np.array(values.dictionary.to_pylist())[used]
    order = np.argsort(names)
    return tuple(names[order].tolist()), np.argsort(order)[codes]
