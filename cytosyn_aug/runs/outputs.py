"""Outputs of a run: a tree of images, tar shards, or a cache.

Each takes results from any thread and finishes them unit by unit. An image appears under its name
whole or not at all; a tar shard and the records of a cache when their unit is done. Names stay
inside of OUT, whatever links point where.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.cache.spec import (
    CACHE_NAME,
    SHARD_FOLDER,
    CacheSpec,
    check_equal,
    read_spec,
)
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.io.files import atomic_file, check_inside, flush_folder, refuse_links
from cytosyn_aug.io.image_files import encode_png, encode_webp
from cytosyn_aug.io.tar_files import ShardWriter
from cytosyn_aug.runs.folder import RunFolder
from cytosyn_aug.runs.listing import Item
from cytosyn_aug.runs.reading import LoadedTile
from cytosyn_aug.runs.recipes import Format

_ENCODERS: Mapping[str, Callable[[np.ndarray], bytes]] = {
    "png": encode_png,
    "webp": encode_webp,
    "tar": encode_webp,
}
BYTES_PER_PIXEL = {"png": 2.2, "webp": 2.0, "tar": 2.0}


class ResultKey(NamedTuple):
    """Which result of a run: unit, row of its tile in the listing, variant."""

    unit: int
    row: int
    variant: int


class Result(NamedTuple):
    """One edited tile.

    Attributes:
        pixels: uint8 [H, W, 3].
        source: The tile it was made from, with its mask and its .json.
        fields: Fields of a cache's record but for images, without batch dimension.
    """

    pixels: np.ndarray
    source: LoadedTile
    fields: Mapping[str, Tensor]


class Output(Protocol):
    """What writes results; `commit` comes once, after all results of a unit."""

    def write(self, key: ResultKey, result: Result) -> dict[str, str]:
        """Take one result; return its cells `output` and `mask`: paths relative to OUT, or ""."""

    def discard(self, key: ResultKey, item: Item) -> None:
        """Remove what an earlier attempt wrote of a tile that has no result now."""

    def commit(self, unit: int) -> None:
        """Put what belongs together in place."""


class TreeOutput:
    """Images in the folders of their sources.

    Args:
        folder: OUT.
        work: Folder on the same file system for unfinished files.
        codec: "png" or "webp", both without loss.
        name: Gives the name of a variant, without suffix, from the stem and its number.
    """

    def __init__(
        self, folder: Path, work: Path, codec: str, name: Callable[[str, int], str]
    ) -> None:
        self._root = folder.resolve()
        self._work, self._codec, self._name = work, codec, name
        self._encode = _ENCODERS[codec]
        self._lock = threading.Lock()
        self._known: set[Path] = {self._root}
        self._touched: dict[int, set[Path]] = {}

    def write(self, key: ResultKey, result: Result) -> dict[str, str]:
        """Write an image, and its mask beside it."""
        tile = result.source
        name = self._name(tile.item.stem, key.variant)
        output, mask = f"{name}.{self._codec}", ""
        self._put(key, output, self._encode(result.pixels))
        if tile.mask is not None:
            mask = f"{name}_mask{PurePosixPath(tile.item.mask).suffix}"
            self._put(key, mask, tile.mask)
        return {"output": output, "mask": mask}

    def discard(self, key: ResultKey, item: Item) -> None:
        """Remove the image and mask of a variant, if they are there."""
        name = self._name(item.stem, key.variant)
        for old in (f"{name}.{self._codec}", f"{name}_mask{PurePosixPath(item.mask).suffix}"):
            folder = (self._root / old).parent
            if folder.is_dir() and folder.resolve().is_relative_to(self._root):
                (self._root / old).unlink(missing_ok=True)

    def commit(self, unit: int) -> None:
        """Make sure that the names of files are on disk, as their bytes are."""
        with self._lock:
            touched = self._touched.pop(unit, set())
        for folder in sorted(touched):
            flush_folder(folder)

    def _put(self, key: ResultKey, name: str, content: bytes) -> None:
        file = self._root / name
        self._make_folder(file.parent, key.unit)
        # Named after its key, so that what a killed process left is written over.
        temporary = self._work / f"{key.row:09d}_{key.variant:05d}"
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError as error:
            reason = f"{error.strerror}; make room or mend it, and run the same again for the rest"
            raise OSError(error.errno, reason, str(file)) from error

    def _make_folder(self, folder: Path, unit: int) -> None:
        with self._lock:
            above = [f for f in folder.parents if f.is_relative_to(self._root)]
            self._touched.setdefault(unit, set()).update([folder, *above])
            if folder in self._known:
                return
            check_inside(folder, self._root)
            folder.mkdir(parents=True, exist_ok=True)
            self._known.add(folder)


class TarOutput:
    """One tar file per unit, as WebDataset reads them, of WebP without loss.

    Two units wait in memory, encoded: 50 MB for 256 tiles of 224 px and one variant.

    Args:
        folder: OUT.
        name: Gives the name of a variant, without suffix, from the stem and its number.
    """

    def __init__(self, folder: Path, name: Callable[[str, int], str]) -> None:
        self._folder, self._name = folder, name
        self._waiting: dict[int, dict[ResultKey, list[tuple[str, bytes]]]] = {}
        self._lock = threading.Lock()

    def write(self, key: ResultKey, result: Result) -> dict[str, str]:
        """Keep an encoded image until its unit is done; its key has label, .json and mask, too."""
        tile, item = result.source, result.source.item
        name = self._name(item.stem, key.variant).replace(
            ".", "%2E"
        )  # WebDataset keys end at a dot
        members = [(f"{name}.webp", encode_webp(result.pixels))]
        if item.label:
            members.append((f"{name}.cls", item.label.encode()))
        if tile.json is not None:
            members.append((f"{name}.json", tile.json))
        if tile.mask is not None:
            members.append((f"{name}.mask{PurePosixPath(item.mask).suffix}", tile.mask))
        with self._lock:
            self._waiting.setdefault(key.unit, {})[key] = members
        shard = shard_name(key.unit)
        mask = f"{shard}/{members[-1][0]}" if tile.mask is not None else ""
        return {"output": f"{shard}/{members[0][0]}", "mask": mask}

    def discard(self, key: ResultKey, item: Item) -> None:
        """Do nothing: the whole shard is written anew."""

    def commit(self, unit: int) -> None:
        """Write the shard of a unit, if there is anything in it."""
        waiting = self._waiting.pop(unit, {})
        file = self._folder / shard_name(unit)
        if not waiting:
            file.unlink(missing_ok=True)
            return
        with atomic_file(file) as stream:
            shard = ShardWriter(stream)
            for key in sorted(waiting):
                for name, content in waiting[key]:
                    shard.add(name, content)
            shard.finish()


class CacheOutput:
    """Records of a cache, which `cytosyn_aug.transforms.cached_variants` looks up.

    Args:
        cache: Made with `records_spec`.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._waiting: dict[int, dict[ResultKey, tuple[str, dict[str, Tensor]]]] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def write(self, key: ResultKey, result: Result) -> dict[str, str]:
        """Keep a record until its unit is done."""
        fields = dict(result.fields)
        if "images" in self._cache.spec.names:
            fields["images"] = torch.from_numpy(result.pixels).permute(2, 0, 1)
        with self._lock:
            self._waiting.setdefault(key.unit, {})[key] = (result.source.key, fields)
        return {"output": "", "mask": ""}

    def discard(self, key: ResultKey, item: Item) -> None:
        """Do nothing: a record is found by pixels, and true of them."""

    def commit(self, unit: int) -> None:
        """Put the records of a unit into the cache and flush it."""
        waiting = self._waiting.pop(unit, {})
        if not waiting:
            return
        keys = sorted(waiting)
        records = [waiting[key] for key in keys]
        fields = {name: torch.stack([f[name] for _, f in records]) for name in records[0][1]}
        with self._turn:  # a cache is for one thread at a time
            self._cache.put([tile for tile, _ in records], fields, [key.variant for key in keys])
            self._cache.flush()


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where results of a run go, before anything of it is made.

    Attributes:
        open: Opens or makes it, for one process, given the folder of the run.
        bytes_per_pixel: Of results, about.
        encode: From uint8 [H, W, 3] to the bytes of a file; None if results are no images.
    """

    open: Callable[[RunFolder], Output]
    bytes_per_pixel: float
    encode: Callable[[np.ndarray], bytes] | None = None


def image_files(out: Path, format: Format, name: Callable[[str, int], str]) -> Destination:
    """Return images as files of a tree or in tar files.

    Args:
        out: OUT.
        format: "png", "webp" or "tar".
        name: Gives the name of a variant, without suffix, from the stem and its number.
    """
    make = partial(_open_files, out, format, name)
    return Destination(open=make, bytes_per_pixel=BYTES_PER_PIXEL[format], encode=_ENCODERS[format])


def cache_records(cache: Path, spec: CacheSpec) -> Destination:
    """Return records of a cache, whose tiles have one size."""
    return Destination(
        open=partial(_open_cache, cache, spec),
        bytes_per_pixel=spec.record_bytes / spec.tile.size_px**2,
    )


def check_cache(cache: Path, spec: CacheSpec, run: Path) -> None:
    """Refuse a cache that a run cannot add to, before anything is written.

    Args:
        cache: Its folder, which may not exist yet.
        spec: What the run's records are.
        run: Folder of the run, below that of the cache.

    Raises:
        ValueError: It holds something else, is damaged, or links lead out of it.
    """
    refuse_links([cache / SHARD_FOLDER, run.parent, run])
    if (cache / CACHE_NAME).is_file():
        check_equal(cache, read_spec(cache), spec)


def variant_name(stem: str, variant: int) -> str:
    """Return the name of a variant: `tile_v0`."""
    return f"{stem}_v{variant}"


def same_name(stem: str, variant: int) -> str:
    """Return the name of the only result of a tile: its own."""
    return stem


def shard_name(unit: int) -> str:
    """Return the name of a unit's tar file."""
    return f"shard-{unit:06d}.tar"


def _open_files(
    out: Path, format: Format, name: Callable[[str, int], str], folder: RunFolder
) -> Output:
    if format == "tar":
        return TarOutput(out, name)
    return TreeOutput(out, folder.work / "files", format, name)


def _open_cache(cache: Path, spec: CacheSpec, folder: RunFolder) -> Output:
    refuse_links([cache / SHARD_FOLDER])
    return CacheOutput(LatentCache.open(cache, spec))
