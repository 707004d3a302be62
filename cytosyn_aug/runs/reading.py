"""Reader of tiles: from a row of a listing to pixels and mask, in any thread.

No torch here, and no model: whether a tile fits one is for a function that is passed in to say.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import MAX_PIXELS, ItemError, read_image
from cytosyn_aug.io.slide import MAX_ENLARGEMENT, Slide, SlideError
from cytosyn_aug.io.tissue import TissueConfig, reason_to_reject, tile_quality
from cytosyn_aug.runs.listing import Item, Listing

_MAX_OPEN_SLIDES = 4  # a thread; a unit seldom spans more
_MAX_MASK_BYTES = 4 * MAX_PIXELS


class LoadedTile(NamedTuple):
    """A tile that was read.

    Attributes:
        item: Its row of the listing.
        pixels: uint8 [H, W, 3], RGB; [0, 0, 3] where there is nothing to read.
        key: `cytosyn_aug.images.tile_key` of the pixels, or of the name where there are none.
        mask: Bytes of the file with its mask, None for none.
        notes: Remarks for the manifest.
        json: Bytes of a .json beside it in a tar file, None for none.
        rejected: Why a tile cut from a slide is left out, "" if it is not.
    """

    item: Item
    pixels: np.ndarray
    key: str
    mask: bytes | None = None
    notes: tuple[str, ...] = ()
    json: bytes | None = None
    rejected: str = ""


class Reader:
    """Reads tiles of one listing, from any number of threads.

    Args:
        listing: Where they are.
        tile: Tiles that slides are cut to.
        check: Given height and width, raises `ItemError` for a tile that cannot be edited.
        mpp: Scale in microns per pixel: of slides, instead of what they state, an item's own wins;
            of tiles, None for that of `tile`.
    """

    def __init__(
        self,
        listing: Listing,
        tile: TileSpec,
        check: Callable[[int, int], None],
        mpp: float | None = None,
    ) -> None:
        self.listing, self.tile, self.check, self.mpp = listing, tile, check, mpp
        self._tiles_mpp = tile.mpp if mpp is None or listing.is_cut() else mpp
        self._tissue = TissueConfig()
        self._open = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:  # Any: as Python types it
        return Reader, (self.listing, self.tile, self.check, self.mpp)  # no open slides

    def read(self, item: Item) -> LoadedTile:
        """Return a tile.

        Raises:
            ItemError: It cannot be used; the message says why.
        """
        if item.error:
            raise ItemError(item.error)
        if self.listing.kind == "numbers":
            return LoadedTile(item, np.zeros((0, 0, 3), np.uint8), item.name)
        if item.file and item.offset < 0:
            return self._read_slide(item)
        self._check_scale(item)
        source = self.listing.root / (item.file or item.name)
        content = source if item.offset < 0 else _bytes_at(source, item.offset, item.size)
        pixels, notes = read_image(content)
        self.check(*pixels.shape[:2])
        mask = self._mask(item, notes)
        json = None
        if item.json_offset >= 0:
            json = _bytes_at(source, item.json_offset, item.json_size)
        return LoadedTile(item, pixels, pixels_key(pixels), mask, notes, json)

    def _check_scale(self, item: Item) -> None:
        """Refuse a tile whose row states another scale than the one all tiles are edited at."""
        expected = self._tiles_mpp
        if item.mpp is not None and not abs(item.mpp / expected - 1) < MAX_ENLARGEMENT - 1:
            raise ItemError(
                f"has {item.mpp:g} microns/pixel by its row, expected {expected:g} as all tiles of "
                "a run; list tiles of one scale, and give it as --mpp"
            )

    def _mask(self, item: Item, notes: tuple[str, ...]) -> bytes | None:
        if not item.mask:
            return None
        if any(note.startswith("turned") for note in notes):
            raise ItemError("has an EXIF orientation, and a mask that may not have it; turn both")
        if item.mask_offset >= 0:
            return _bytes_at(self.listing.root / item.file, item.mask_offset, item.mask_size)
        file = self.listing.root / item.mask
        try:
            if file.stat().st_size > _MAX_MASK_BYTES:
                raise ItemError(f"has a mask of {file.stat().st_size:,} bytes; check {item.mask}")
            return file.read_bytes()
        except OSError as error:
            raise ItemError(f"has a mask that cannot be read: {error.strerror}") from error

    def _read_slide(self, item: Item) -> LoadedTile:
        assert item.x is not None
        assert item.y is not None
        try:
            mpp = self.mpp if item.mpp is None else item.mpp
            slide = self._slide(self.listing.root / item.file, mpp)
            reading = slide.plan(self.tile)
            _check_inside(slide, item.x, item.y, reading.extent_level0)
            image = slide.read_tile(item.x, item.y, reading)
        except SlideError as error:
            raise ItemError(str(error)) from error
        pixels = np.array(image)
        rejected = ""
        if self.listing.kind == "slides":  # a table's tiles were chosen by someone
            rejected = reason_to_reject(tile_quality(pixels), self._tissue) or ""
        mask = self._mask(item, ())
        return LoadedTile(item, pixels, pixels_key(pixels), mask, rejected=rejected)

    def _slide(self, file: Path, mpp: float | None) -> Slide:
        """Return a slide opened by this thread: handles are not shared."""
        slides: OrderedDict[tuple[Path, float | None], Slide] | None
        slides = getattr(self._open, "slides", None)
        if slides is None:
            slides = self._open.slides = OrderedDict()
        slide = slides.pop((file, mpp), None) or Slide(file, mpp)
        slides[file, mpp] = slide
        if len(slides) > _MAX_OPEN_SLIDES:
            slides.popitem(last=False)[1].close()
        return slide


def _check_inside(slide: Slide, x: int, y: int, extent: int) -> None:
    width, height = slide.width_level0, slide.height_level0
    if min(x, y) < 0 or x + extent > width or y + extent > height:
        raise ItemError(
            f"lies outside of the slide: {extent} px from x={x} y={y} of level 0, which is "
            f"{width}x{height} px; correct x and y"
        )


def pixels_key(pixels: np.ndarray) -> str:
    """Return what `cytosyn_aug.images.tile_key` does, of uint8 [H, W, 3]."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    header = ",".join(str(n) for n in planes.shape).encode()
    return hashlib.sha256(header + planes.tobytes()).hexdigest()


def _bytes_at(file: Path, offset: int, size: int) -> bytes:
    try:
        with file.open("rb") as stream:
            content = os.pread(stream.fileno(), size, offset)
    except OSError as error:
        raise ItemError(f"cannot be read from {file}: {error.strerror}") from error
    if len(content) != size:
        raise ItemError(f"is cut off: {file} has {len(content)} of its {size} bytes")
    return content
