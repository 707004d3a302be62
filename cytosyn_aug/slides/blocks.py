"""Blocks of a slide: read, recoloured, measured and compressed, by many threads.

A block is what the writer of pyramids takes as a tile. This module knows neither where the change
of colour comes from nor where blocks go.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.slides.pyramid import TILE_PX, Codec, halve
from cytosyn_aug.slides.seams import SeamMeter, TileLines, tile_lines
from cytosyn_aug.slides.view import SlideView
from cytosyn_aug.stain.colour_table import ColourTable

_TRIAL_BLOCKS = 16
PYRAMID = 4 / 3  # of the finest level, all levels together


class Block(NamedTuple):
    """A block, ready to be written.

    Attributes:
        row, column: Its place.
        encoded: Its new pixels, compressed.
        half: Its new pixels at half the scale, rounded averages of 2x2 pixels.
        tissue: Sum of the tissue weights of its pixels.
        lines: For seams, before and after; None of a block that is cut off by the slide's edge.
        digest: SHA-256 of its new pixels.
        is_damaged: Whether it could not be decoded, and is black.
    """

    row: int
    column: int
    encoded: bytes
    half: np.ndarray
    tissue: float
    lines: tuple[TileLines, TileLines] | None
    digest: bytes
    is_damaged: bool


class BlockMaker:
    """Makes blocks of a slide, in any number of threads; a context that closes their handles.

    Args:
        file: The slide.
        view: What is shown of it.
        table: The change of colour.
        codec: How blocks are compressed.
        slide_mpp: Scale of the slide, where it states none or a wrong one.
        allows_damage: Leave blocks that cannot be decoded black, instead of raising.

    Attributes:
        positions: Rows and columns of all blocks, row by row.
    """

    def __init__(
        self,
        file: Path,
        view: SlideView,
        table: ColourTable,
        codec: Codec,
        *,
        slide_mpp: float | None,
        allows_damage: bool,
    ) -> None:
        self.view, self.table, self.codec = view, table, codec
        rows, columns = -(-view.height // TILE_PX), -(-view.width // TILE_PX)
        self.positions = [(row, column) for row in range(rows) for column in range(columns)]
        self._file, self._slide_mpp, self._allows_damage = file, slide_mpp, allows_damage
        self._slides = ExitStack()
        self._thread = threading.local()

    def make(self, position: tuple[int, int]) -> Block:
        """Make the block at a row and column.

        Raises:
            SlideError: It cannot be decoded.
        """
        row, column = position
        pixels = self._read(row, column)
        if pixels is None:
            height = min(TILE_PX, self.view.height - row * TILE_PX)
            width = min(TILE_PX, self.view.width - column * TILE_PX)
            recoloured, tissue, lines = np.zeros((height, width, 3), np.uint8), 0.0, None
        else:
            recoloured, weight = self.table.look_up(pixels)
            tissue, lines = float(weight.sum(dtype=np.int64)) / 255, None
            if pixels.shape[:2] == (TILE_PX, TILE_PX):
                lines = tile_lines(pixels, weight), tile_lines(recoloured, weight)
        return Block(
            row,
            column,
            self.codec.encode_tile(recoloured),
            halve(recoloured),
            tissue,
            lines,
            hashlib.sha256(recoloured.tobytes()).digest(),
            pixels is None,
        )

    def estimate_bytes(self) -> int:
        """Return about how many bytes a pyramid of all blocks takes, from some of them."""
        step = max(1, len(self.positions) // _TRIAL_BLOCKS)
        samples = (self._read(row, column) for row, column in self.positions[::step])
        sizes = [len(self.codec.encode_tile(pixels)) for pixels in samples if pixels is not None]
        return int(sum(sizes) / max(1, len(sizes)) * len(self.positions) * PYRAMID)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._slides.close()

    def _read(self, row: int, column: int) -> np.ndarray | None:
        """Return the pixels of a block; None where they cannot be decoded and that is allowed."""
        if not hasattr(self._thread, "slide"):
            # One handle per thread: after an error a handle is closed, and others must go on.
            slide = Slide(self._file, self._slide_mpp)
            self._thread.slide = self._slides.enter_context(slide)
        try:
            x, y = column * TILE_PX, row * TILE_PX
            return self.view.read(self._thread.slide, x, y, TILE_PX)
        except SlideError:
            if not self._allows_damage:
                raise
            return None


class BlockTotals:
    """Totals of blocks, which are added in their order.

    Attributes:
        num_blocks: How many.
        tissue: Sum of the tissue weights of all pixels.
        before, after: Their seams.
        damaged: Rows and columns of those that could not be decoded.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.tissue = 0.0
        self.before, self.after = SeamMeter(), SeamMeter()
        self.damaged: list[tuple[int, int]] = []
        self._hash = hashlib.sha256()

    def add(self, block: Block) -> None:
        """Take the next block."""
        self.num_blocks += 1
        self.tissue += block.tissue
        self._hash.update(block.digest)
        if block.lines is not None:
            self.before.add(block.row, block.column, block.lines[0])
            self.after.add(block.row, block.column, block.lines[1])
        if block.is_damaged:
            self.damaged.append((block.row, block.column))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over all pixels."""
        return self._hash.hexdigest()[:16]
