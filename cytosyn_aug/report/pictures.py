"""Images behind a row of a manifest: its source and its result, read one at a time.

Results are in the run's folder: images, members of tar shards, records of a cache. Sources are
where the input lay when the run began, or where the reader says it lies now, and count only if
their pixels have the key that the manifest names. Pictures that cannot be had say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import ItemError, read_image
from cytosyn_aug.io.tar_files import TarMember, list_members
from cytosyn_aug.runs.listing import Item, make_listing
from cytosyn_aug.runs.manifest import Manifest
from cytosyn_aug.runs.reading import LoadedTile, Reader
from cytosyn_aug.runs.tables import is_slide

_TAR = ".tar"


class TileImage(NamedTuple):
    """An image, or why there is none.

    Attributes:
        pixels: uint8 [H, W, 3], or None.
        problem: Half a sentence, "" with pixels.
    """

    pixels: np.ndarray | None
    problem: str = ""


class RunPictures:
    """Finds sources and results of one run.

    Args:
        manifest: The run.
        source: Where its input lies now; None for where it lay.
    """

    def __init__(self, manifest: Manifest, source: Path | str | None = None) -> None:
        self._folder = manifest.folder
        self._format = manifest.identity.get("format", "")
        self._command = manifest.identity["command"]
        self._kind = manifest.identity["input"]["kind"]
        given = source if source is not None else manifest.context.get("input")
        self.source = None if given is None else Path(given)
        tile = TileSpec(**manifest.context.get("tile", {}))
        mpp = manifest.identity["input"].get("mpp")
        root = Path() if self.source is None else self.source
        self._root = root if root.is_dir() else root.parent
        # Of what kind matters only to tiles cut from slides: a table's are not judged again.
        listing = make_listing("table", self._root, ())
        self._reader = Reader(listing, tile, lambda height, width: None, mpp)
        self._members = lru_cache(maxsize=4)(_members)
        self._cache: LatentCache | None = None

    @property
    def has_sources(self) -> bool:
        """Whether results were made from tiles, rather than from numbers."""
        return self._kind != "numbers"

    @property
    def has_results(self) -> bool:
        """Whether results are images, rather than numbers in a cache."""
        return self._command != "cache" and self._format != "latents"

    def before(self, row: Mapping[str, Any]) -> TileImage:
        """Return the tile a result was made from."""
        if not self.has_sources:
            return TileImage(None, "was generated from no tile")
        if self.source is None:
            return TileImage(None, "the run does not say where its input lay; give --source")
        if not self.source.exists():
            return TileImage(None, f"{self.source} is not there; give --source")
        try:
            loaded = self._load(row)
        except ItemError as error:
            return TileImage(None, str(error))
        if row.get("key") and loaded.key != row["key"]:
            return TileImage(None, "has changed since")
        return TileImage(loaded.pixels)

    def after(self, row: Mapping[str, Any]) -> TileImage:
        """Return a result."""
        if not self.has_results:
            return TileImage(None, f"is in the cache as {self._format or 'encodings'}")
        try:
            if self._format == "images":
                return self._cached(row)
            output = row.get("output") or ""
            if not output:
                return TileImage(None, "has no output")
            shard, member = _split(self._folder, output) or ("", "")
            if shard:
                place = self._members(self._folder / shard).get(member)
                if place is None:
                    return TileImage(None, f"{shard} lacks {member}")
                with (self._folder / shard).open("rb") as stream:
                    stream.seek(place.offset)
                    return TileImage(read_image(stream.read(place.size)).pixels)
            return TileImage(read_image(self._folder / output).pixels)
        except (ItemError, OSError, ValueError) as error:
            return TileImage(None, str(error))

    def written_at(self, row: Mapping[str, Any]) -> float | None:
        """Return when the file with a result was written, in seconds; None if there is none."""
        output = row.get("output") or ""
        if not output:
            return None
        shard, _ = _split(self._folder, output) or (output, "")
        try:
            return (self._folder / shard).stat().st_mtime
        except OSError:
            return None

    def _load(self, row: Mapping[str, Any]) -> LoadedTile:
        name, x, y = row["source"], row.get("x"), row.get("y")
        has_place = x is not None and y is not None
        if self._kind == "slides" or (
            self._kind == "table" and is_slide(self._root / name, has_place=has_place)
        ):
            return self._reader.read(Item(name, x=x, y=y, mpp=row.get("mpp"), file=name))
        if self._kind != "shards":
            return self._reader.read(Item(name))
        shard, member = _split(self._root, name) or ("", "")
        try:
            place = self._members(self._root / shard).get(member) if shard else None
        except ValueError as error:
            raise ItemError(str(error)) from error
        if place is None:
            raise ItemError(f"is not in {self._root}")
        item = Item(name, file=shard, offset=place.offset, size=place.size)
        return self._reader.read(item)

    def _cached(self, row: Mapping[str, Any]) -> TileImage:
        if self._cache is None:
            self._cache = LatentCache.open(self._folder)
        records = self._cache.get([row["key"]], [row["variant"]])
        if not records.is_found[0]:
            return TileImage(None, "is not in the cache")
        return TileImage(records.fields["images"][0].permute(1, 2, 0).contiguous().numpy())


def _split(root: Path, name: str) -> tuple[str, str] | None:
    """Split the path of a member of a tar file below a folder, `a/shard.tar/key.png`."""
    end = name.find(f"{_TAR}/")
    while end >= 0:
        shard, member = name[: end + len(_TAR)], name[end + len(_TAR) + 1 :]
        if (root / shard).is_file():
            return shard, member
        end = name.find(f"{_TAR}/", end + 1)
    return None


def _members(file: Path) -> dict[str, TarMember]:
    return {member.name: member for member in list_members(file)}
