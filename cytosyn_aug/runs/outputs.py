"""Where results go: a tree of images, tar shards, or a cache of variants.

Each takes results from any thread and finishes them unit by unit. An image appears under its name
whole or not at all; a tar shard and the records of a cache when their unit is done. Names stay
inside of OUT, whatever links point where.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

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

Format = Literal["png", "webp", "tar", "latents", "images"]
# What images become files by; caches hold no files.
ENCODERS: Mapping[str, Callable[[np.ndarray], bytes]] = {
    "png": encode_png,
    "webp": encode_webp,
    "tar": encode_webp,
}
BYTES_PER_PIXEL = {"png": 2.2, "webp": 2.0, "tar": 2.0}


class Place(NamedTuple):
    """Where a result belongs: unit, row in the listing, variant."""

    unit: int
    row: int
    variant: int


class Result(NamedTuple):
    """One edited tile.

    Attributes:
        pixels: uint8 [H, W, 3].
        mask: Bytes of the mask's file, None for none.
        key: Of the source tile.
        fields: Fields of a cache's record but for images, without batch dimension.
        json: Of the source tile, as it stands; None for none.
    """

    pixels: np.ndarray
    mask: bytes | None
    key: str
    fields: Mapping[str, Tensor]
    json: bytes | None = None


class Written(NamedTuple):
    """Where a result and its mask are, relative to OUT; "" for nowhere."""

    output: str
    mask: str = ""


class Output(Protocol):
    """What writes results; `commit` comes once, after all results of a unit."""

    def write(self, place: Place, item: Item, result: Result) -> Written:
        """Take one result; return what the manifest says of it."""

    def discard(self, place: Place, item: Item) -> None:
        """Remove what an earlier attempt wrote of a tile that cannot be had now."""

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
        self._encode = ENCODERS[codec]
        self._lock = threading.Lock()
        self._known: set[Path] = {self._root}
        self._touched: dict[int, set[Path]] = {}

    def write(self, place: Place, item: Item, result: Result) -> Written:
        """Write an image, and its mask beside it."""
        name = self._name(item.stem, place.variant)
        output, mask = f"{name}.{self._codec}", ""
        self._put(place, output, self._encode(result.pixels))
        if result.mask is not None:
            mask = f"{name}_mask{PurePosixPath(item.mask).suffix}"
            self._put(place, mask, result.mask)
        return Written(output, mask)

    def discard(self, place: Place, item: Item) -> None:
        """Remove the image and mask of a variant, if they are there."""
        name = self._name(item.stem, place.variant)
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

    def _put(self, place: Place, name: str, content: bytes) -> None:
        file = self._root / name
        self._make_folder(file.parent, place.unit)
        # Named after its place, so that what a killed process left is written over.
        temporary = self._work / f"{place.row:09d}_{place.variant:05d}"
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
    """One tar file a unit, as WebDataset reads them, of WebP without loss.

    Two units wait in memory, encoded: 50 MB for 256 tiles of 224 px and one variant.

    Args:
        folder: OUT.
        name: See `TreeOutput`.
    """

    def __init__(self, folder: Path, name: Callable[[str, int], str]) -> None:
        self._folder, self._name = folder, name
        self._waiting: dict[int, dict[Place, list[tuple[str, bytes]]]] = {}
        self._lock = threading.Lock()

    def write(self, place: Place, item: Item, result: Result) -> Written:
        """Keep an encoded image until its unit is done; its key has label, .json and mask, too."""
        key = self._name(item.stem, place.variant).replace(".", "%2E")  # a key ends at a dot
        members = [(f"{key}.webp", encode_webp(result.pixels))]
        if item.label:
            members.append((f"{key}.cls", item.label.encode()))
        if result.json is not None:
            members.append((f"{key}.json", result.json))
        if result.mask is not None:
            members.append((f"{key}.mask{PurePosixPath(item.mask).suffix}", result.mask))
        with self._lock:
            self._waiting.setdefault(place.unit, {})[place] = members
        shard = shard_name(place.unit)
        mask = f"{shard}/{members[-1][0]}" if result.mask is not None else ""
        return Written(f"{shard}/{members[0][0]}", mask)

    def discard(self, place: Place, item: Item) -> None:
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
            for place in sorted(waiting):
                for name, content in waiting[place]:
                    shard.add(name, content)
            shard.finish()


class CacheOutput:
    """Records of a cache of variants, see `cytosyn_aug.transforms.cached_variants`.

    Args:
        cache: Made with `records_spec`.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._waiting: dict[int, dict[Place, Result]] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def write(self, place: Place, item: Item, result: Result) -> Written:
        """Keep a record until its unit is done."""
        with self._lock:
            self._waiting.setdefault(place.unit, {})[place] = result
        return Written("")

    def discard(self, place: Place, item: Item) -> None:
        """Do nothing: a record is found by pixels, and true of them."""

    def commit(self, unit: int) -> None:
        """Put the records of a unit into the cache and flush it."""
        waiting = self._waiting.pop(unit, {})
        if not waiting:
            return
        places = sorted(waiting)
        results = [waiting[place] for place in places]
        fields = {
            name: torch.stack([result.fields[name] for result in results])
            for name in results[0].fields
        }
        if "images" in self._cache.spec.names:
            pixels = torch.from_numpy(np.stack([result.pixels for result in results]))
            fields["images"] = pixels.permute(0, 3, 1, 2)
        variants = [place.variant for place in places]
        with self._turn:  # a cache is for one thread at a time
            self._cache.put([result.key for result in results], fields, variants)
            self._cache.flush()


def make_output(
    out: Path, format: Format, name: Callable[[str, int], str], folder: RunFolder
) -> Output:
    """Return where images go.

    Args:
        out: OUT.
        format: "png", "webp" or "tar".
        name: See `TreeOutput`.
        folder: The run's folder.
    """
    if format == "tar":
        return TarOutput(out, name)
    return TreeOutput(out, folder.work / "files", format, name)


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


def make_cache(out: Path, spec: CacheSpec, folder: RunFolder) -> Output:
    """Return a cache that takes records, opened or made."""
    refuse_links([out / SHARD_FOLDER])
    return CacheOutput(LatentCache.open(out, spec))


def variant_name(stem: str, variant: int) -> str:
    """Return the name of a variant: `tile_v0`."""
    return f"{stem}_v{variant}"


def same_name(stem: str, variant: int) -> str:
    """Return the name of the only result of a tile: its own."""
    return stem


def shard_name(unit: int) -> str:
    """Return the name of a unit's tar file."""
    return f"shard-{unit:06d}.tar"
