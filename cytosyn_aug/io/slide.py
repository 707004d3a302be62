"""Whole slides: their scale, and tiles read from them at a coarser one.

Positions and extents are pixels of level 0, the finest; scales are microns per pixel (mpp). A tile
is read from the coarsest level that is still fine enough and reduced with a Lanczos filter, never
enlarged by more than `MAX_ENLARGEMENT`. Colour profiles are not applied: the released model was
trained without. This module refuses to know what is tissue and where tiles go.

Source: the OpenSlide 4 reference; the rules for scales follow what TCGA's slides state, or do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import openslide
from PIL import Image

from cytosyn_aug.config import TileSpec

Grid = Literal["exact", "deepzoom"]
ScaleSource = Literal["user", "properties", "aperio", "tiff", "power"]

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu"),
    ".czi",
)
MIN_OPENSLIDE = (4, 0, 1)  # earlier: CVE-2026-48977, CVE-2026-54604
MAX_REGION_PX = 8192 * 8192  # OpenSlide allocates four bytes per pixel of a region
MAX_ENLARGEMENT = 1.05  # "20x" scanners differ from 0.5 microns/pixel by as much
_LEVEL_TOLERANCE = 1.01  # levels are 4.00012 times smaller, not 4
LEAST_MPP, MOST_MPP = 0.05, 10.0  # that is plausible
_PLAUSIBLE_TIFF_MPP = (0.1, 2.0)  # outside: the 72 or 300 dpi that software writes by default
_MICRONS = {"centimeter": 1e4, "inch": 25_400.0}
_THUMBNAIL_BLOCK_PX = 128
_GIVE_MPP = (
    "give the right one yourself (mpp=; --mpp of augment, normalize and cache; --slide-mpp of "
    "normalize-slide; or a column mpp in a table of slides)"
)


class SlideError(ValueError):
    """A slide, or a region of one, that cannot be read or must not be; the message names it."""


class Thumbnail(NamedTuple):
    """A whole slide at a coarse scale.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        pixel_level0: Side of its pixels in level-0 pixels.
        is_unreadable: bool [H, W]; where the slide could not be decoded, and the image is black.
    """

    image: np.ndarray
    pixel_level0: float
    is_unreadable: np.ndarray


class Scale(NamedTuple):
    """Microns per pixel of level 0, who stated it, and remarks on contradictions."""

    mpp: float
    source: ScaleSource
    notes: tuple[str, ...] = ()


class Reading(NamedTuple):
    """How the tiles of one slide are read.

    Attributes:
        size_px: Side of a tile as delivered.
        extent_level0: Side in level-0 pixels, and the step of the grid: tiles neither overlap nor
            leave gaps.
        level: Level that is read.
        level_px: Side in pixels of that level.
        mpp: Scale as delivered; `extent_level0` is a whole number, so this is near the target.
    """

    size_px: int
    extent_level0: int
    level: int
    level_px: int
    mpp: float


def slide_scale(properties: Mapping[str, str], mpp: float | None = None) -> Scale:
    """Return the scale of a slide from the first of these that states one.

    1. `mpp`, given by the user;
    2. the reader's property `openslide.mpp-x` (a generic TIFF's is that of number 4);
    3. the scanner's property `aperio.MPP`;
    4. the TIFF resolution, with a unit and between 0.1 and 2 microns/pixel;
    5. the objective power as 10 / power, with a remark.

    A source that states nonsense is an error, not a reason to ask the next one: the others then
    are in doubt as well. The exception is number 4, where nonsense is a default nobody stated.

    Args:
        properties: OpenSlide's properties.
        mpp: Overrides everything, microns per pixel.

    Raises:
        SlideError: Nothing states a scale, or what is stated is implausible.
    """
    if mpp is not None:
        given = _plausible(mpp, "the given mpp")
        return Scale(given, "user", _contradiction(given, properties))
    is_generic = properties.get("openslide.vendor") == "generic-tiff"
    sources: list[tuple[ScaleSource, str, str]] = [("aperio", "aperio.MPP", "aperio.MPP")]
    if not is_generic:
        sources.insert(0, ("properties", "openslide.mpp-x", "openslide.mpp-y"))
    for source, key_x, key_y in sources:
        if key_x in properties:
            x = _plausible(properties[key_x], key_x)
            return _with_notes(x, _plausible(properties.get(key_y, x), key_y), source, properties)
    tiff_x, tiff_y = _tiff_mpp(properties, "X"), _tiff_mpp(properties, "Y")
    if tiff_x and tiff_y:
        return _with_notes(tiff_x, tiff_y, "tiff", properties)
    power = _number(properties.get("openslide.objective-power", "nan"))
    if power > 0:
        note = f"mpp is taken from the objective power {power:g}; scanners differ by 10 % and more"
        return Scale(_plausible(10 / power, "10 / openslide.objective-power"), "power", (note,))
    raise SlideError(f"states neither microns/pixel nor an objective power; {_GIVE_MPP}")


def _contradiction(given: float, properties: Mapping[str, str]) -> tuple[str, ...]:
    """Return a remark if a slide states another scale than the one that is given."""
    try:
        stated = slide_scale(properties)
    except SlideError:  # which is what scales are given for
        return ()
    if abs(given / stated.mpp - 1) <= 0.05:
        return ()
    return (f"the given {given:g} microns/pixel is used; the slide states {stated.mpp:.4g}",)


def plan_reading(
    mpp: float, downsamples: Sequence[float], tile: TileSpec, grid: Grid = "exact"
) -> Reading:
    """Return how tiles are read from a slide of this scale.

    "exact" reads `tile.size_px * tile.mpp` microns, to the nearest level-0 pixel. "deepzoom" reads
    `size_px` times a power of two, as `openslide.deepzoom` with `overlap=0` does, and accepts a
    scale within 5 % of the target.

    Args:
        mpp: Scale of level 0.
        downsamples: How much smaller each level is than level 0, ascending from 1.
        tile: Target.
        grid: "exact" or "deepzoom".

    Raises:
        SlideError: The slide is too coarse, or the deep-zoom grid misses the target.
    """
    ratio = tile.mpp / mpp
    if ratio * MAX_ENLARGEMENT < 1:
        raise SlideError(
            f"has {mpp:.4g} microns/pixel, coarser than the target {tile.mpp:g}; "
            "enlarging would invent detail: leave the slide out or choose a coarser target"
        )
    if grid == "deepzoom":
        extent = tile.size_px << max(0, round(math.log2(ratio)))
    else:
        extent = round(tile.size_px * ratio)
    reached = mpp * extent / tile.size_px
    if abs(reached / tile.mpp - 1) > 0.05:
        raise SlideError(f"reaches {reached:.4g} microns/pixel on a deep-zoom grid; use exact")
    largest = max(1.0, extent / tile.size_px * _LEVEL_TOLERANCE)
    level = max(k for k, downsample in enumerate(downsamples) if downsample <= largest)
    return Reading(tile.size_px, extent, level, round(extent / downsamples[level]), reached)


class Slide:
    """An open slide. Not to be shared between processes: each opens its own.

    Example:
        with Slide("slide.svs") as slide:
            reading = slide.plan(TileSpec())
            tile = slide.read_tile(0, 0, reading)

    Attributes:
        file: Path of the slide.
        scale: Its scale, and where that comes from.
        width_level0: Width in level-0 pixels.
        height_level0: Height in level-0 pixels.
        downsamples: Downsample of each level.
        identity: OpenSlide's hash of the coarsest level, "" where there is none.
        comment: What its first image is described with, "" for nothing.
        has_colour_profile: Whether it comes with an ICC profile.

    Raises:
        SlideError: Missing, unsupported, truncated or damaged, or without a usable scale.
    """

    def __init__(self, file: Path | str, mpp: float | None = None) -> None:
        check_openslide()
        self.file = Path(file)
        handle = self._open()
        self._handle: openslide.OpenSlide | None = handle
        properties = dict(handle.properties)
        try:
            self.scale = slide_scale(properties, mpp)
        except SlideError as error:
            self.close()
            raise SlideError(f"{self.file.name} {error}") from error
        self.width_level0, self.height_level0 = handle.dimensions
        self.downsamples: tuple[float, ...] = handle.level_downsamples
        self.identity: str = properties.get("openslide.quickhash-1", "")
        self.comment: str = properties.get("openslide.comment", "")
        self.has_colour_profile = "openslide.icc-size" in properties
        self._background = "#" + properties.get("openslide.background-color", "ffffff")

    def plan(self, tile: TileSpec, grid: Grid = "exact") -> Reading:
        """Return `plan_reading` for this slide; its errors name the slide."""
        try:
            return plan_reading(self.scale.mpp, self.downsamples, tile, grid)
        except SlideError as error:
            raise SlideError(f"{self.file.name} {error}") from error

    def read_tile(self, x_level0: int, y_level0: int, reading: Reading) -> Image.Image:
        """Return the tile whose upper left corner is at a level-0 position.

        What lies outside the slide, or was not scanned, has the slide's background colour.

        Args:
            x_level0: Column of the corner.
            y_level0: Row of the corner.
            reading: From `plan`.

        Returns:
            RGB image of `reading.size_px` squared.

        Raises:
            SlideError: The region cannot be decoded, after a second attempt, or is too large.
        """
        size = (reading.level_px, reading.level_px)
        opaque = self.read_region(x_level0, y_level0, reading.level, size)
        if reading.level_px == reading.size_px:
            return opaque
        return opaque.resize((reading.size_px,) * 2, Image.Resampling.LANCZOS)

    def read_region(
        self, x_level0: int, y_level0: int, level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Return a region of a level as RGB, with the background where nothing was scanned.

        Args:
            x_level0: Column of the corner.
            y_level0: Row of the corner.
            level: Level that is read.
            size: Width and height in pixels of that level.

        Raises:
            SlideError: The region cannot be decoded, after a second attempt, or is too large.
        """
        region = self._read_region(x_level0, y_level0, level, size)
        if region.getchannel("A").getextrema()[0] == 255:
            return region.convert("RGB")
        opaque = Image.new("RGB", region.size, self._background)
        opaque.paste(region, mask=region)
        return opaque

    def scanner_thumbnail(self) -> Image.Image | None:
        """Return the small picture of the slide that some scanners add, never their label."""
        self._handle = self._handle or self._open()
        image = self._handle.associated_images.get("thumbnail")
        return None if image is None else image.convert("RGB")

    def thumbnail(self, mpp: float) -> Thumbnail:
        """Return the whole slide at a coarse scale, read in blocks so that memory stays bounded.

        Args:
            mpp: Wanted scale; the returned one differs by less than a percent.

        Raises:
            SlideError: The slide has no level coarse enough to be read in bounded memory.
        """
        reading = self.plan(TileSpec(size_px=_THUMBNAIL_BLOCK_PX, mpp=mpp))
        _check_region(self.file, reading.level_px, reading.level_px)
        block, extent = _THUMBNAIL_BLOCK_PX, reading.extent_level0
        pixel_level0 = extent / block
        columns, rows = -(-self.width_level0 // extent), -(-self.height_level0 // extent)
        image = np.zeros((rows * block, columns * block, 3), np.uint8)
        is_unreadable = np.zeros(image.shape[:2], bool)
        for row, column in np.ndindex(rows, columns):
            here = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
            try:
                image[here] = self.read_tile(column * extent, row * extent, reading)
            except SlideError:
                is_unreadable[here] = True
        height = math.ceil(self.height_level0 / pixel_level0)
        width = math.ceil(self.width_level0 / pixel_level0)
        return Thumbnail(image[:height, :width], pixel_level0, is_unreadable[:height, :width])

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            num_bytes = self.file.stat().st_size
        except OSError as error:
            raise SlideError(f"{self.file} cannot be opened: {error.strerror}") from error
        try:
            return openslide.OpenSlide(self.file)
        except openslide.OpenSlideError as error:  # "unsupported" is also what truncation gives
            companion = self.file.with_suffix("")
            if self.file.suffix == ".mrxs" and not (companion / "Slidedat.ini").is_file():
                raise SlideError(
                    f"{self.file.name} cannot be opened: the folder {companion.name} with "
                    "Slidedat.ini is not beside it, which holds the pixels of an MRXS; copy both"
                ) from error
            raise SlideError(
                f"{self.file.name} ({num_bytes:,} bytes) is of a format OpenSlide "
                f"does not read, truncated or damaged: {error}; compare its size and MD5 with "
                "the download manifest"
            ) from error

    def _read_region(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        """Read, and once more with a new handle: after an error OpenSlide's old one stays dead."""
        _check_region(self.file, *size)
        failure: openslide.OpenSlideError | None = None
        for _ in range(2):
            try:
                self._handle = self._handle or self._open()
                region: Image.Image = self._handle.read_region((x, y), level, size)
                return region
            except openslide.OpenSlideError as error:
                self.close()
                failure = error
        where = f"{self.file.name} at x={x} y={y} level {level}"
        raise SlideError(
            f"{where} cannot be decoded: {failure}; replace the slide by a sound copy"
        ) from failure


def check_openslide() -> None:
    """Refuse an OpenSlide with known security holes, such as some distributions' own.

    Raises:
        ImportError: It is older than `MIN_OPENSLIDE`.
    """
    version = openslide.__library_version__
    if tuple(int(n) for n in version.split(".")[:3]) < MIN_OPENSLIDE:
        wanted = ".".join(map(str, MIN_OPENSLIDE))
        raise ImportError(f"OpenSlide is {version}, expected {wanted}: pip install openslide-bin")


def grid_positions(width_level0: int, height_level0: int, extent_level0: int) -> np.ndarray:
    """Return the corners of all whole tiles, row by row: int64 [N, 2] as x, y in level-0 pixels."""
    columns, rows = width_level0 // extent_level0, height_level0 // extent_level0
    y, x = np.divmod(np.arange(rows * columns), max(columns, 1))
    return np.stack([x, y], axis=1) * extent_level0


def _check_region(file: Path, width_px: int, height_px: int) -> None:
    if width_px * height_px > MAX_REGION_PX:
        raise SlideError(
            f"{file.name} has no level coarse enough: {width_px}x{height_px} px would be read at "
            f"once, expected at most {MAX_REGION_PX:,} px; convert it to a pyramid"
        )


def _plausible(value: object, name: str) -> float:
    number = _number(value)
    if not LEAST_MPP <= number <= MOST_MPP:
        raise SlideError(
            f"has {name} = {value}, expected {LEAST_MPP:g} to {MOST_MPP:g} microns/pixel; "
            f"{_GIVE_MPP}"
        )
    return number


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def _tiff_mpp(properties: Mapping[str, str], axis: str) -> float | None:
    microns = _MICRONS.get(properties.get("tiff.ResolutionUnit", ""))
    resolution = _number(properties.get(f"tiff.{axis}Resolution", "nan"))
    if microns is None or not resolution > 0:
        return None
    mpp = microns / resolution
    return mpp if _PLAUSIBLE_TIFF_MPP[0] <= mpp <= _PLAUSIBLE_TIFF_MPP[1] else None


def _with_notes(x: float, y: float, source: ScaleSource, properties: Mapping[str, str]) -> Scale:
    notes = tuple(_contradictions(x, y, _number(properties.get("openslide.objective-power"))))
    return Scale(math.sqrt(x * y), source, notes)


def _contradictions(x: float, y: float, power: float) -> Iterator[str]:
    if abs(x / y - 1) > 0.02:
        yield f"pixels are not square: {x:.4g} by {y:.4g} microns; their mean is used"
    if power > 0 and abs(math.sqrt(x * y) * power / 10 - 1) > 0.25:
        yield f"{math.sqrt(x * y):.4g} microns/pixel contradicts objective power {power:g}"
