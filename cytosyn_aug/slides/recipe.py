"""Recipe of a normalised slide, and report on it: frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cytosyn_aug.config import Method
from cytosyn_aug.io.slide import LEAST_MPP, MOST_MPP
from cytosyn_aug.io.tile_source import MAX_TILES
from cytosyn_aug.slides.pyramid import Codec, Compression
from cytosyn_aug.slides.view import Region
from cytosyn_aug.stain.recipe import EditRecipe

Status = Literal["normalized", "no_tissue"]
SLIDES_COMMAND = "normalize-slide"  # as a run of slides names itself in `run.json`


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideRecipe:
    """How a slide is normalised and written.

    Attributes:
        strength: 1 goes to the reference, 0 stays.
        region: x, y, width and height in level-0 pixels, for trying; None for the whole slide.
            The stain is that of the whole slide all the same.
        mpp: Scale of the result; None for the slide's own.
        slide_mpp: Scale of the slide, where it states none or a wrong one.
        max_tiles: Tiles that the slide's stain is measured on.
        compression: "jpeg", or "deflate" without loss.
        quality: Of JPEG.
        keeps_thumbnail: Keep the scanner's small picture of the slide, recoloured; a thumbnail may
            show pen marks and what was written on the glass.
        allows_damage: Leave blocks that cannot be decoded black and name them, instead of giving
            the slide up.
        edit: How the model reads stain.
    """

    strength: float = 1.0
    region: Region | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    max_tiles: int = MAX_TILES
    compression: Compression = "jpeg"
    quality: int = 90
    keeps_thumbnail: bool = False
    allows_damage: bool = False
    edit: EditRecipe = field(default_factory=EditRecipe)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}, expected 0 to 1")
        if self.mpp is not None and not LEAST_MPP <= self.mpp <= MOST_MPP:
            raise ValueError(
                f"mpp is {self.mpp:g}, expected {LEAST_MPP:g} to {MOST_MPP:g} microns/pixel"
            )
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}, expected at least 1")
        Codec(compression=self.compression, quality=self.quality)


def recipe_as_json(recipe: SlideRecipe) -> dict[str, Any]:  # Any: JSON
    """Return a recipe as files and `run.json` hold it.

    Pixels of slides are never drawn anew, because they would differ at the borders of tiles; so
    `preserve`, which is an option for tiles, is always "color".
    """
    settings = asdict(recipe)
    return {"strength": settings.pop("strength"), "preserve": "color"} | settings


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideReport:
    """What became of a slide.

    Attributes:
        out: The file that was written.
        status: "normalized", or "no_tissue": written with its own colours.
        method: Method of normalisation.
        width_px: Width of the finest level.
        height_px: Height of the finest level.
        mpp: Its scale.
        num_levels: Levels of the pyramid.
        num_tiles: Tiles of the finest level.
        num_bytes: Size of the file.
        tissue: Share of tissue, 0 to 1.
        seam_ratio: Mean step of colour at the borders of the result's tiles over that inside of
            them; None where too little is tissue.
        seam_ratio_before: Seam ratio of the slide's own colours.
        damaged: Corners, in level-0 pixels, of blocks that could not be decoded and are black.
        notes: Remarks on the slide.
        source_digest: OpenSlide's hash of the slide, "" where there is none.
        change_digest: Of the change of colour.
        pixels_digest: Of the pixels of the finest level, before compression.
        seconds: Wall-clock time.
    """

    out: Path
    status: Status
    method: Method
    width_px: int
    height_px: int
    mpp: float
    num_levels: int
    num_tiles: int
    num_bytes: int
    tissue: float
    seam_ratio: float | None
    seam_ratio_before: float | None
    damaged: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    source_digest: str
    change_digest: str
    pixels_digest: str
    seconds: float
