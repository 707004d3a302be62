"""Seams: whether the colour of tissue steps more at the borders of tiles than inside them.

At each border, and along each tile's middle, the mean colours of narrow bands on both sides
are compared, in segments of an eighth of the tile. The ratio of the mean steps is 1 for tissue that
was never cut, and grows with what was done to each tile alone. Bright and dark tissue count alike;
segments that are not at least half tissue do not count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_SEGMENTS = 8
_BAND_SHARE = 32  # bands are this part of a tile wide: 16 px of 512, 7 of 224
_MIN_TISSUE = 0.5


class Bands(NamedTuple):
    """Mean colour and tissue of the bands of a tile, float64 [8, 4] each: RGB, tissue 0 to 1.

    Attributes:
        left, right, top, bottom: Inside its borders.
        middle: Pairs on both sides of its vertical and horizontal middle.
    """

    left: np.ndarray
    right: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    middle: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def tile_bands(pixels: np.ndarray, weight: np.ndarray) -> Bands:
    """Measure a tile.

    Args:
        pixels: uint8 [S, S, 3], S a multiple of 8.
        weight: uint8 [S, S], tissue weight, 255 for full; of the tile before any change, so that
            the same segments count before and after.
    """
    all_four = np.concatenate([pixels, weight[..., None]], 2)
    half, wide = len(pixels) // 2, max(1, len(pixels) // _BAND_SHARE)
    turned = all_four.transpose(1, 0, 2)
    places = (
        slice(0, wide),
        slice(-wide, None),
        slice(half - wide, half),
        slice(half, half + wide),
    )
    top, bottom, above, below = (_segments(all_four[place]) for place in places)
    left, right, before, after = (_segments(turned[place]) for place in places)
    return Bands(left, right, top, bottom, ((above, below), (before, after)))


def _segments(band: np.ndarray) -> np.ndarray:
    """Return means over segments of a band [wide, S, 4]."""
    wide, side, _ = band.shape
    means = band.reshape(wide, _SEGMENTS, side // _SEGMENTS, 4).mean((0, 2))
    means[:, 3] /= 255
    return means


class SeamMeter:
    """Steps at borders and inside, summed over the tiles of a grid that come row by row."""

    def __init__(self) -> None:
        self._border, self._inside = np.zeros(2), np.zeros(2)
        self._above: dict[int, tuple[int, np.ndarray]] = {}
        self._before: tuple[int, int, np.ndarray] | None = None

    def add(self, row: int, column: int, bands: Bands) -> None:
        """Take a tile; what lies beside or above it must have come before."""
        for pair in bands.middle:
            self._inside += _step(*pair)
        if self._before is not None and self._before[:2] == (row, column - 1):
            self._border += _step(self._before[2], bands.left)
        if column in self._above and self._above[column][0] == row - 1:
            self._border += _step(self._above[column][1], bands.top)
        self._before = (row, column, bands.right)
        self._above[column] = (row, bands.bottom)

    @property
    def ratio(self) -> float | None:
        """Mean step at borders over mean step inside; None without tissue on both."""
        if not self._border[1] or not self._inside[0]:
            return None
        (border, num_border), (inside, num_inside) = self._border, self._inside
        return float((border / num_border) / (inside / num_inside))


def _step(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sum of the steps between two bands, and how many segments count."""
    counts = np.minimum(one[:, 3], other[:, 3]) >= _MIN_TISSUE
    distance = np.linalg.norm(one[counts, :3] - other[counts, :3], axis=1)
    return np.array([distance.sum(), counts.sum()])
