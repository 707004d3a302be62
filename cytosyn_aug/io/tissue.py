"""Tissue detection: where a slide shows tissue, and whether a tile does.

Two tests, the cheap one first: a mask on a thumbnail says which tiles are worth reading, and each
tile that was read is judged by its own pixels. Thresholds are fixed. Otsu's adapts to the slide
and on a slide with dense and fatty tissue finds none of the latter. A mask made elsewhere (GrandQC,
TRIDENT, by hand in QuPath) is imported in place of the first test. This module knows pixels and
level-0 positions, but no slides.

Sources: a fixed saturation of 8 as in CLAM's preset for TCGA; the tile rule (hue from cyan to red,
saturation above 8, value above 103) as described for Virchow, Vorontsov et al. (2024), methods.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cytosyn_aug.io.slide import Reading, Slide, SlideError, grid_positions

_MAX_ASPECT_ERROR = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class TissueConfig:
    """What counts as tissue.

    Attributes:
        mask_mpp: Scale of the thumbnail that the mask is made on.
        min_saturation: Smallest saturation of tissue in the mask, of 255.
        smooth_px: Side of the window, in mask pixels, that a pixel must have a majority in. Specks
            below half of it vanish; a smallest area is not needed, for what passes `min_tissue`
            covers that share of a whole tile.
        close_px: Gaps narrower than this are closed.
        pen_margin_px: Distance from pen marks that is given up.
        min_tissue: Smallest share of a tile inside the mask.
        min_stained: Smallest share of a tile's pixels with the colour of stained tissue.
        min_sharpness: Smallest variance of the Laplacian of a tile's grey levels; below it a tile
            is out of focus or empty. The least of 1,500 tiles of 39 slides chosen for training was
            296.
    """

    mask_mpp: float = 8.0
    min_saturation: int = 8
    smooth_px: int = 7
    close_px: int = 4
    pen_margin_px: int = 3
    min_tissue: float = 0.5
    min_stained: float = 0.5
    min_sharpness: float = 50.0

    def __post_init__(self) -> None:
        for name in ("min_tissue", "min_stained"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share, 0 to 1")
        if not 1 <= self.mask_mpp <= 64:
            raise ValueError(f"mask_mpp is {self.mask_mpp}, expected 1 to 64 microns/pixel")
        if self.smooth_px % 2 == 0 or not 1 <= self.smooth_px <= 15:
            raise ValueError(f"smooth_px is {self.smooth_px}, expected an odd number up to 15")


class TileQuality(NamedTuple):
    """What a tile's pixels say: share that is stained, 0 to 1, and variance of the Laplacian."""

    stained: float
    sharpness: float


class TissueMask:
    """Tissue of one slide, asked by level-0 position.

    Attributes:
        is_tissue: bool [H, W].
        pixel_level0: Width and height of a mask pixel in level-0 pixels.
        unreadable: Share of the mask where the slide could not be seen, which counts as tissue.
    """

    def __init__(
        self,
        is_tissue: np.ndarray,
        pixel_level0: tuple[float, float],
        unreadable: float = 0.0,
    ) -> None:
        self.is_tissue = is_tissue
        self.pixel_level0 = pixel_level0
        self.unreadable = unreadable
        sums = np.zeros((is_tissue.shape[0] + 1, is_tissue.shape[1] + 1), np.int64)
        sums[1:, 1:] = is_tissue.cumsum(0, dtype=np.int64).cumsum(1)
        self._sums = sums  # of all pixels above and to the left

    def fractions(self, positions: np.ndarray, extent_level0: int) -> np.ndarray:
        """Return the share of tissue of square tiles.

        Args:
            positions: int64 [N, 2], upper left corners as x, y in level-0 pixels.
            extent_level0: Side of the tiles.

        Returns:
            float64 [N] in 0 to 1, to the precision of whole mask pixels.
        """
        limit = np.array(self.is_tissue.shape[::-1])
        first = np.rint(positions / self.pixel_level0).astype(np.int64)
        last = np.rint((positions + extent_level0) / self.pixel_level0).astype(np.int64)
        first = np.clip(first, 0, limit - 1)
        last = np.clip(np.maximum(last, first + 1), 1, limit)
        (x0, y0), (x1, y1) = first.T, last.T
        s = self._sums
        inside = s[y1, x1] - s[y0, x1] - s[y1, x0] + s[y0, x0]
        shares: np.ndarray = inside / ((x1 - x0) * (y1 - y0))
        return shares


def tissue_pixels(image: np.ndarray, config: TissueConfig) -> np.ndarray:
    """Return where a thumbnail shows stained tissue that no pen has marked.

    A median of saturation followed by a threshold is a majority vote among thresholded pixels,
    which a box average counts at a cost that does not grow with the window.

    Args:
        image: uint8 [H, W, 3], RGB, at about `config.mask_mpp`.
        config: Thresholds.

    Returns:
        bool [H, W].
    """
    green, blue = image[..., 1], image[..., 2]
    value = image.max(-1).astype(np.int32)  # 255 * 255 would not fit into 16 bits
    saturated = (value - image.min(-1)) * 255 > config.min_saturation * value
    pen = _dilate(pen_pixels(image), config.pen_margin_px)
    stained = saturated & (blue >= green) & (value >= 60)  # no hue from red over yellow to cyan
    tissue = _box_average(stained, config.smooth_px // 2) > 127
    closed = ~_dilate(~_dilate(tissue, config.close_px // 2), config.close_px // 2)
    unmarked: np.ndarray = closed & ~pen
    return unmarked


def pen_pixels(image: np.ndarray) -> np.ndarray:
    """Return where a thumbnail shows the ink of a pen: black, blue, green or red.

    Haematoxylin and eosin keep green the least of the three; pens other than purple ones do not,
    or go beyond what tissue reaches.

    Args:
        image: uint8 [H, W, 3], RGB.

    Returns:
        bool [H, W].
    """
    red, green, blue = (image[..., k].astype(np.int16) for k in range(3))
    value = image.max(-1)
    black_ink = (value < 60) & (value - image.min(-1) < 25)
    blue_ink = (blue - red > 60) & (green - red > -10) & (green < 170)
    green_ink = (green - red > 25) & (green - blue > 5) & (red < 150)
    red_ink = (red - green > 110) & (red - blue > 90) & (green < 90)
    is_ink: np.ndarray = black_ink | blue_ink | green_ink | red_ink
    return is_ink


def tile_quality(image: np.ndarray) -> TileQuality:
    """Measure a tile, in a tenth of a millisecond: every tile that is read pays for it.

    Args:
        image: uint8 [H, W, 3], RGB. Colour is judged on every second pixel, sharpness on all of
            the green channel, which both stains darken.
    """
    red, green, blue = (np.ascontiguousarray(image[::2, ::2, k]) for k in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    # Hue from cyan over blue to red means that blue is at least green; a saturation of 8 of 255
    # means that value - least is at least value / 32. Neither needs more than 8 bits.
    is_stained = (blue >= green) & (value > 103) & (value - least > (value - 1) >> 5)
    grey = image[..., 1].astype(np.int16)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1]
    laplacian += grey[1:-1, :-2]
    laplacian += grey[1:-1, 2:]
    laplacian -= grey[1:-1, 1:-1] << 2
    flat = laplacian.ravel().astype(np.float32)
    variance = float(flat @ flat) / flat.size - float(flat.mean()) ** 2
    return TileQuality(np.count_nonzero(is_stained) / is_stained.size, variance)


def reason_to_reject(quality: TileQuality, config: TissueConfig) -> str | None:
    """Return "blank" or "blurred", or None for a tile to keep."""
    if quality.stained < config.min_stained:
        return "blank"
    return "blurred" if quality.sharpness < config.min_sharpness else None


def load_mask(file: Path, width_level0: int, height_level0: int, pixel_level0: float) -> TissueMask:
    """Read a mask made elsewhere.

    Args:
        file: `.png` of the whole slide at any scale, where anything but 0 is tissue; or
            `.geojson` with polygons in level-0 pixels, as QuPath exports them.
        width_level0: Width of the slide.
        height_level0: Height of the slide.
        pixel_level0: Side of the mask's pixels in level-0 pixels, to within rounding.

    Raises:
        ValueError: The file is neither, is damaged, or is not of this slide's shape.
    """
    columns = max(round(width_level0 / pixel_level0), 1)
    rows = max(round(height_level0 / pixel_level0), 1)
    if file.suffix.lower() == ".png":
        is_tissue = _painted(file, width_level0 / height_level0, (columns, rows))
    elif file.suffix.lower() in (".geojson", ".json"):
        is_tissue = _drawn(file, (columns, rows), pixel_level0)
    else:
        raise ValueError(f"{file} is not a mask of a known format; expected .png or .geojson")
    return TissueMask(is_tissue, (width_level0 / columns, height_level0 / rows))


def _painted(file: Path, aspect: float, size: tuple[int, int]) -> np.ndarray:
    """Return an image's mask, reduced by majority to the size that is asked for."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable PNG: {error}") from error
    height, width = values.shape[:2]
    if abs(width / height / aspect - 1) > _MAX_ASPECT_ERROR:
        raise ValueError(
            f"{file} is {width}x{height} px, {width / height:.3f} times as wide as high, but its "
            f"slide {aspect:.3f} times; a mask must cover the whole slide and no more"
        )
    channels = values.reshape(height, width, -1)[..., :3]  # not alpha
    binary = Image.fromarray(np.asarray((channels > 0).any(-1)).astype(np.uint8) * 255)
    return np.asarray(binary.resize(size, Image.Resampling.BOX)) > 127


def _drawn(file: Path, size: tuple[int, int], pixel_level0: float) -> np.ndarray:
    """Return polygons, each with its holes, as one mask."""
    whole = np.zeros(size[::-1], bool)
    try:
        for rings in _polygons(json.loads(file.read_text())):
            canvas = Image.new("1", size)
            draw = ImageDraw.Draw(canvas)
            for k, ring in enumerate(rings):
                corners = [(float(x) / pixel_level0, float(y) / pixel_level0) for x, y, *_ in ring]
                draw.polygon(corners, fill=int(k == 0))
            whole |= np.asarray(canvas)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not GeoJSON with polygons: {error!r}") from error
    return whole


def _polygons(content: Any) -> Iterator[Iterable[Any]]:  # Any: JSON of any shape
    """Yield the rings of every polygon; the first is the outline, the rest are holes."""
    if isinstance(content, list):
        for item in content:
            yield from _polygons(item)
        return
    kind = content["type"]
    if kind == "FeatureCollection":
        yield from _polygons(content["features"])
    elif kind == "Feature":
        yield from _polygons(content["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(content["geometries"])
    elif kind == "Polygon":
        yield content["coordinates"]
    elif kind == "MultiPolygon":
        yield from content["coordinates"]
    else:
        raise ValueError(f"geometry {kind}, expected Polygon or MultiPolygon")


def _box_average(is_set: np.ndarray, radius_px: int) -> np.ndarray:
    """Return the average over a square window as uint8, 0 to 255."""
    image = Image.fromarray(is_set.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.BoxBlur(radius_px)))


def _dilate(is_set: np.ndarray, radius_px: int) -> np.ndarray:
    """Return the pixels within a square of this radius around set ones."""
    return _box_average(is_set, radius_px) > 0


def slide_mask(slide: Slide, imported: Path | None, config: TissueConfig) -> TissueMask:
    """Return the tissue of a slide, from an imported mask or from a thumbnail.

    Raises:
        ValueError: The imported mask is not one of this slide.
        SlideError: The slide has no level coarse enough, or is damaged all over.
    """
    if imported is not None:
        pixel = config.mask_mpp / slide.scale.mpp
        return load_mask(imported, slide.width_level0, slide.height_level0, pixel)
    image, pixel, is_unreadable = slide.thumbnail(config.mask_mpp)
    if is_unreadable.all():
        raise SlideError(f"{slide.file.name} opens, but no part of it can be decoded")
    # What cannot be seen may be tissue: its tiles are tried, and those that fail are named.
    is_tissue = tissue_pixels(image, config) | is_unreadable
    return TissueMask(is_tissue, (pixel, pixel), float(is_unreadable.mean()))


def candidate_positions(
    slide: Slide, reading: Reading, mask: TissueMask, config: TissueConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of tiles with enough tissue, and how much each has."""
    extent = reading.extent_level0
    positions = grid_positions(slide.width_level0, slide.height_level0, extent)
    tissue = mask.fractions(positions, extent)
    is_enough = tissue >= config.min_tissue
    return positions[is_enough], tissue[is_enough]
