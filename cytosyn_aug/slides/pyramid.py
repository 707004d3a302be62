"""Writer of pyramidal TIFF files: one pass over the tiles, bounded memory.

Tiles of the finest level come in row by row; coarser levels are averages of 2x2 pixels, and wait in
one strip per level until a row of their tiles is full: 1.5 KB of memory per pixel of width. A TIFF
states where its directories are, so they come last, and no level is held back for another.

The file is a BigTIFF that two families of readers open with all levels and the scale. OpenSlide,
and what is built on it, walks the chain of directories and reads the resolution tags. Bio-Formats,
and what is built on that (QuPath, Fiji, OMERO), reads OME-XML in the first directory and follows
its SubIFDs. Here both ways lead to the same directories. `tifffile` writes either of these, but one
level after the other, and needs `imagecodecs` for JPEG.

This module refuses to know stains and slides: it gets pixels.

Sources: TIFF 6.0; BigTIFF; OME-TIFF 6 for SubIFDs; OpenSlide's "generic-tiff".
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

Compression = Literal["jpeg", "deflate"]

TILE_PX = 512
SOFTWARE = "cytosyn_aug"
_HALF = TILE_PX // 2
OME_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_SHORT, _LONG, _RATIONAL, _ASCII, _LONG8, _IFD8 = 3, 4, 5, 2, 16, 18
_LETTERS = {_SHORT: "H", _LONG: "I", _LONG8: "Q", _IFD8: "Q"}
Tag = tuple[int, int, Sequence[int] | str | Fraction]


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """How tiles are compressed.

    Attributes:
        compression: "jpeg", or "deflate", which loses nothing and is several times larger.
        quality: Of JPEG, 50 to 100. Colour keeps half its resolution in x (4:2:2). Bio-Formats
            7.3 misreads 4:4:4 (PSNR 14.7 dB; of 4:2:2 47.0, of 4:2:0 45.5, on real tissue).
    """

    compression: Compression = "jpeg"
    quality: int = 90

    def __post_init__(self) -> None:
        if self.compression not in ("jpeg", "deflate"):
            raise ValueError(f"compression is {self.compression!r}, expected 'jpeg' or 'deflate'")
        if not 50 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, expected 50 to 100")

    def encode(self, pixels: np.ndarray) -> bytes:
        """Compress an image: uint8 [H, W, 3], RGB."""
        if self.compression == "jpeg":
            stream = io.BytesIO()
            image = Image.fromarray(pixels)
            image.save(stream, "JPEG", quality=self.quality, subsampling="4:2:2")
            return stream.getvalue()
        apart = pixels.copy()  # predictor 2: differences to the pixel on the left
        apart[:, 1:] -= pixels[:, :-1]
        return zlib.compress(apart.tobytes(), 6)

    def encode_tile(self, pixels: np.ndarray) -> bytes:
        """Compress a tile, at most TILE_PX wide and high; its edge fills what it lacks."""
        height, width = pixels.shape[:2]
        missing = ((0, TILE_PX - height), (0, TILE_PX - width), (0, 0))
        return self.encode(np.pad(pixels, missing, "edge"))

    def tags(self) -> list[Tag]:
        """Return the tags by which a TIFF states the compression."""
        if self.compression == "jpeg":
            return [(259, _SHORT, [7]), (262, _SHORT, [6]), (530, _SHORT, [2, 1])]
        return [(259, _SHORT, [8]), (262, _SHORT, [2]), (317, _SHORT, [2])]


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Return width and height of each level: halved, until one tile holds all of it."""
    sizes = [(width, height)]
    while max(sizes[-1]) > TILE_PX and min(sizes[-1]) >= 2:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def halve(pixels: np.ndarray) -> np.ndarray:
    """Return rounded averages of 2x2 pixels; an odd last row or column is left out.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        uint8 [H // 2, W // 2, 3].
    """
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    even = pixels[:height:2, :width].astype(np.uint16) + pixels[1:height:2, :width]
    return ((even[:, ::2] + even[:, 1::2] + 2) >> 2).astype(np.uint8)


class _Level:
    """State of a level while it is written; all but the finest one have a strip."""

    def __init__(self, width: int, height: int, has_strip: bool) -> None:
        self.width, self.height = width, height
        self.columns, self.rows = -(-width // TILE_PX), -(-height // TILE_PX)
        self.strip = np.zeros((TILE_PX if has_strip else 0, width, 3), np.uint8)
        self.offsets: list[int] = []
        self.counts: list[int] = []


class PyramidWriter:
    """Writes one pyramid into a stream.

    Args:
        stream: Writable from its start; the caller closes it.
        width: Pixels of the finest level.
        height: Pixels of the finest level.
        mpp: Microns per pixel of the finest level.
        codec: How tiles are compressed.
    """

    def __init__(
        self, stream: BinaryIO, width: int, height: int, *, mpp: float, codec: Codec
    ) -> None:
        self._stream = stream
        self._mpp = mpp
        self._codec = codec
        self._levels = [_Level(*size, k > 0) for k, size in enumerate(level_sizes(width, height))]
        self._stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))

    def add(self, encoded: bytes, half: np.ndarray) -> None:
        """Take the next tile of the finest level, row by row.

        Args:
            encoded: By `Codec.encode_tile`.
            half: Its pixels by `halve`. Both are given, so that threads can make them.
        """
        finest = self._levels[0]
        row, column = divmod(len(finest.offsets), finest.columns)
        if row >= finest.rows:
            raise ValueError(f"got more than the {finest.columns * finest.rows} tiles there are")
        self._write_tile(finest, encoded)
        self._place(1, row, column, half)

    def finish(self, description: str, thumbnail: np.ndarray | None = None) -> int:
        """Write the directories, without which no reader finds the tiles.

        Args:
            description: Any text, kept as the description of the image in OME-XML.
            thumbnail: uint8 [H, W, 3], kept as a further directory that is not of the pyramid.

        Returns:
            Size of the file in bytes.
        """
        finest = self._levels[0]
        if len(finest.offsets) != finest.columns * finest.rows:
            raise ValueError(
                f"got {len(finest.offsets)} of {finest.columns * finest.rows} tiles; add them all"
            )
        directories = [self._level_tags(k) for k in range(len(self._levels))]
        if thumbnail is not None:
            directories.append(self._thumbnail_tags(thumbnail))
        directories[0] += [
            (270, _ASCII, _ome_xml(finest.width, finest.height, self._mpp, description)),
            (330, _IFD8, [0] * (len(self._levels) - 1)),
        ]
        self._write_directories(directories)
        return self._stream.tell()

    def _write_tile(self, level: _Level, encoded: bytes) -> None:
        level.offsets.append(self._stream.tell())
        level.counts.append(len(encoded))
        self._stream.write(encoded)

    def _place(self, number: int, row: int, column: int, half: np.ndarray) -> None:
        """Put a halved tile of the level before into the strip of this one."""
        if number == len(self._levels):
            return
        level, finer = self._levels[number], self._levels[number - 1]
        y, x = row % 2 * _HALF, column * _HALF
        level.strip[y : y + half.shape[0], x : x + half.shape[1]] = half
        if column == finer.columns - 1 and (row % 2 or row == finer.rows - 1):
            self._write_row(number, row // 2)

    def _write_row(self, number: int, row: int) -> None:
        level = self._levels[number]
        if row == level.rows:  # what is left is a row of pixels that halving dropped
            return
        for column in range(level.columns):
            x = column * TILE_PX
            tile = level.strip[: level.height - row * TILE_PX, x : x + TILE_PX]
            self._write_tile(level, self._codec.encode_tile(tile))
            self._place(number + 1, row, column, halve(tile))

    def _level_tags(self, number: int) -> list[Tag]:
        level = self._levels[number]
        return [
            *_image_tags(level.width, level.height, is_reduced=number > 0),
            *self._codec.tags(),
            *_scale_tags(
                self._mpp * self._levels[0].width / level.width,
                self._mpp * self._levels[0].height / level.height,
            ),
            (322, _SHORT, [TILE_PX]),
            (323, _SHORT, [TILE_PX]),
            (324, _LONG8, level.offsets),
            (325, _LONG8, level.counts),
        ]

    def _thumbnail_tags(self, thumbnail: np.ndarray) -> list[Tag]:
        height, width = thumbnail.shape[:2]
        encoded = self._codec.encode(thumbnail)
        strip: list[Tag] = [
            (270, _ASCII, "thumbnail"),
            (273, _LONG8, [self._stream.tell()]),
            (278, _LONG, [height]),
            (279, _LONG8, [len(encoded)]),
        ]
        self._stream.write(encoded)
        return [*_image_tags(width, height, is_reduced=True), *self._codec.tags(), *strip]

    def _write_directories(self, directories: list[list[Tag]]) -> None:
        """Write directories in a chain; the first one's SubIFDs are those of the other levels."""
        self._stream.write(bytes(-self._stream.tell() % 8))
        start = self._stream.tell()
        sizes = [_directory_size(tags) for tags in directories]
        places = [start + sum(sizes[:k]) for k in range(len(sizes))]
        children = places[1 : len(self._levels)]
        directories[0] = [t if t[0] != 330 else (330, _IFD8, children) for t in directories[0]]
        for tags, place, following in zip(directories, places, [*places[1:], 0], strict=True):
            self._stream.write(_directory(tags, place, following))
        self._stream.seek(8)
        self._stream.write(struct.pack("<Q", start))
        self._stream.seek(0, io.SEEK_END)


def _image_tags(width: int, height: int, *, is_reduced: bool) -> list[Tag]:
    return [
        (254, _LONG, [int(is_reduced)]),
        (256, _LONG, [width]),
        (257, _LONG, [height]),
        (258, _SHORT, [8, 8, 8]),
        (277, _SHORT, [3]),
        (284, _SHORT, [1]),
        (305, _ASCII, SOFTWARE),
    ]


def _scale_tags(mpp_x: float, mpp_y: float) -> list[Tag]:
    # Pixels per centimetre; both parts of the fraction have 32 bits.
    x, y = (Fraction(1e4 / mpp).limit_denominator(10_000) for mpp in (mpp_x, mpp_y))
    return [(282, _RATIONAL, x), (283, _RATIONAL, y), (296, _SHORT, [3])]


def _packed(kind: int, value: Sequence[int] | str | Fraction) -> tuple[int, bytes]:
    """Return the number of values of a tag, and its bytes."""
    if isinstance(value, Fraction):
        return 1, struct.pack("<II", value.numerator, value.denominator)
    if isinstance(value, str):
        text = value.encode("ascii", "xmlcharrefreplace") + b"\0"
        return len(text), text
    return len(value), struct.pack(f"<{len(value)}{_LETTERS[kind]}", *value)


def _filled(tags: list[Tag]) -> list[tuple[int, int, int, bytes]]:
    """Return tags in their order, as number, type, count and bytes; empty ones are left out."""
    packed = [(number, kind, *_packed(kind, value)) for number, kind, value in tags]
    return sorted(entry for entry in packed if entry[2])


def _directory_size(tags: list[Tag]) -> int:
    entries = _filled(tags)
    return 16 + 20 * len(entries) + sum(-(-len(x) // 8) * 8 for *_, x in entries if len(x) > 8)


def _directory(tags: list[Tag], place: int, following: int) -> bytes:
    """Return a BigTIFF directory with what does not fit into its entries after it."""
    entries = _filled(tags)
    after = place + 16 + 20 * len(entries)
    head, tail = struct.pack("<Q", len(entries)), b""
    for number, kind, count, content in entries:
        if len(content) > 8:
            where = struct.pack("<Q", after + len(tail))
            tail += content + bytes(-len(content) % 8)
        else:
            where = content.ljust(8, b"\0")
        head += struct.pack("<HHQ", number, kind, count) + where
    return head + struct.pack("<Q", following) + tail


def _ome_xml(width: int, height: int, mpp: float, description: str) -> str:
    """Return the shortest OME-XML of an RGB image with a scale; microns are its default unit."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{OME_NAMESPACE}" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        f'xsi:schemaLocation="{OME_NAMESPACE} {OME_NAMESPACE}/ome.xsd" Creator="{SOFTWARE}">'
        f'<Image ID="Image:0"><Description>{escape(description)}</Description>'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" Interleaved="true" '
        f'BigEndian="false" SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" '
        f'PhysicalSizeX="{mpp:.9g}" PhysicalSizeY="{mpp:.9g}">'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )
