"""Seam ratio: steps of tissue colour at the borders of tiles over steps inside of them.

Mean tissue colours of the two lines of pixels on both sides of a border are compared, in quarters
of the tile's side, and so are those on both sides of each tile's middle. The ratio of the mean
steps is 1 for tissue that was never cut, and grows with what was done to each tile alone. Lines are
long and thin because what lies across them, nuclei and fibres, then averages out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_SEGMENTS = 4
_MIN_TISSUE = 0.5
_MIN_BORDERS = 32  # segments; with 50 the ratio of an uncut slide was still off by 0.4


class TileLines(NamedTuple):
    """Mean tissue colour, and share of tissue, of lines of a tile: float64 [4, 4] each.

    Attributes:
        left, right, top, bottom: At its borders.
        middle: Pairs on both sides of its horizontal and vertical middle.
    """

    left: np.ndarray
    right: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    middle: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def tile_lines(pixels: np.ndarray, weight: np.ndarray) -> TileLines:
    """Measure a tile.

    Args:
        pixels: uint8 [S, S, 3], S a multiple of 4.
        weight: uint8 [S, S], tissue weight, 255 for full; of the tile before any change, so that
            the same pixels count before and after.
    """
    half = len(pixels) // 2
    rows = [_line(pixels[k], weight[k]) for k in (0, -1, half - 1, half)]
    columns = [_line(pixels[:, k], weight[:, k]) for k in (0, -1, half - 1, half)]
    middle = (rows[2], rows[3]), (columns[2], columns[3])
    return TileLines(columns[0], columns[1], rows[0], rows[1], middle)


def _line(pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return tissue colour and share of a line [S, 3], in segments."""
    share = weight.reshape(_SEGMENTS, -1, 1) / 255
    total = share.sum(1)
    colour = (pixels.reshape(_SEGMENTS, -1, 3) * share).sum(1) / np.maximum(total, 1e-9)
    return np.concatenate([colour, total / share.shape[1]], 1)


class SeamMeter:
    """Steps at borders and inside, summed over the tiles of a grid that come row by row."""

    def __init__(self) -> None:
        self._border, self._inside = np.zeros(2), np.zeros(2)
        self._above: dict[int, tuple[int, np.ndarray]] = {}
        self._before: tuple[int, int, np.ndarray] | None = None

    def add(self, row: int, column: int, lines: TileLines) -> None:
        """Take a tile; what lies beside or above it must have come before."""
        for pair in lines.middle:
            self._inside += _step(*pair)
        if self._before is not None and self._before[:2] == (row, column - 1):
            self._border += _step(self._before[2], lines.left)
        if column in self._above and self._above[column][0] == row - 1:
            self._border += _step(self._above[column][1], lines.top)
        self._before = (row, column, lines.right)
        self._above[column] = (row, lines.bottom)

    @property
    def ratio(self) -> float | None:
        """Mean step at borders over mean step inside; None where too few tell."""
        if min(self._border[1], self._inside[1]) < _MIN_BORDERS or not self._inside[0]:
            return None
        (border, num_border), (inside, num_inside) = self._border, self._inside
        return float((border / num_border) / (inside / num_inside))


def _step(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sum of the steps between two lines, and how many segments count."""
    counts = np.minimum(one[:, 3], other[:, 3]) >= _MIN_TISSUE
    distance = np.linalg.norm(one[counts, :3] - other[counts, :3], axis=1)
    return np.array([distance.sum(), counts.sum()])
