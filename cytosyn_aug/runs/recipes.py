"""Recipes and other settings of runs over whole data sets. No torch here.

Every option is stated here once: type, default, and a sentence as its annotation. Commands take
their flags from here (`cytosyn_aug.cli.options.add_settings`), and a test compares the functions of
`cytosyn_aug.offline` with it. Fields without a sentence are no options. Recipes are recorded in
`run.json`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cytosyn_aug.config import Method, Preserve
from cytosyn_aug.runs.ray_actors import RayCluster
from cytosyn_aug.stain.recipe import EditRecipe

Mode = Literal["stain", "resample"]
Source = Literal["tile", "slide"]
InputKind = Literal["tree", "table", "shards", "slides"]
ImageFormat = Literal["png", "webp", "tar"]
Format = Literal[ImageFormat, "latents", "images"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentRecipe:
    """How tiles are augmented.

    Attributes:
        mpp: Scale of the tiles as they are read, in microns per pixel.
        edit: How the model restains.
    """

    variants: Annotated[int, "Results per tile."] = 1
    mode: Annotated[
        Mode, '"stain" restains; "resample" draws new tiles with the same features.'
    ] = "stain"
    strength: Annotated[
        tuple[float, float],
        "Strength of restaining: one number, or the least and the largest to draw between; 1 goes "
        "to the reference, 0 stays.",
    ] = (1.0, 1.0)
    preserve: Annotated[
        Preserve, '"color" moves no structure; "none" draws the restained tile anew.'
    ] = "color"
    mpp: float = 0.5
    steps: Annotated[
        int | None,
        "Forwards of resampling; by default 4 of a student, or 16 of the transformer.",
    ] = None
    guidance_scale: Annotated[
        float, "Classifier-free guidance of resampling; 1 is no guidance."
    ] = 1.0
    edit: EditRecipe = field(default_factory=EditRecipe)
    seed: Annotated[int, "Base seed, from which each result derives its own."] = 0
    allow_geometry_change: Annotated[
        bool, "Accept tiles with masks although structure will move; the masks are left behind."
    ] = False
    min_similarity: Annotated[
        float,
        "Leave out results drawn anew whose features have a smaller cosine to those of their "
        "source; -1 keeps all.",
    ] = -1.0
    max_similarity: Annotated[
        float,
        "Leave out results drawn anew whose features have a larger cosine to those of their "
        "source; 1 keeps all.",
    ] = 1.0

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"variants is {self.variants}, expected at least 1")
        if self.mode not in ("stain", "resample"):
            raise ValueError(f"mode is {self.mode!r}, expected 'stain' or 'resample'")
        if self.preserve not in ("color", "none"):
            raise ValueError(f"preserve is {self.preserve!r}, expected 'color' or 'none'")
        _check_strength(self.strength)
        _check_drawing(self.steps, self.guidance_scale)
        if not -1 <= self.min_similarity <= self.max_similarity <= 1:
            raise ValueError(
                f"similarities are {self.min_similarity:g} and {self.max_similarity:g}, expected "
                "-1 <= min_similarity <= max_similarity <= 1"
            )
        if self.is_bounded and self.keeps_structure:
            raise ValueError(
                "min_similarity and max_similarity bound what is drawn anew, and mode stain with "
                "preserve 'color' moves nothing; leave them out, or use mode resample"
            )

    @property
    def is_bounded(self) -> bool:
        """Whether results may be left out for their similarity."""
        return (self.min_similarity, self.max_similarity) != (-1.0, 1.0)

    @property
    def keeps_structure(self) -> bool:
        """Whether masks of a tile are true of its variants."""
        return self.mode == "stain" and self.preserve == "color"


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizeRecipe:
    """How tiles are normalised.

    Attributes:
        mpp: Scale of the tiles as they are read, in microns per pixel.
        edit: How the model restains.
    """

    method: Annotated[
        Method,
        '"cytosyn" reads the stain with the model; "macenko", "reinhard" and "transport" use no '
        "network.",
    ] = "cytosyn"
    source: Annotated[
        Source,
        'Whose stain is changed: that of each "tile", or of its "slide", which is more even and '
        "needs names that say the slide.",
    ] = "tile"
    strength: Annotated[float, "From 0, which stays, to 1, which goes to the reference."] = 1.0
    mpp: float = 0.5
    edit: EditRecipe = field(default_factory=EditRecipe)

    def __post_init__(self) -> None:
        _check_strength((self.strength, self.strength))
        if self.source not in ("tile", "slide"):
            raise ValueError(f"source is {self.source!r}, expected 'tile' or 'slide'")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecipe:
    """How tiles are generated."""

    steps: Annotated[
        int | None, "Forwards per tile; by default 4 of a student, or 16 of the transformer."
    ] = None
    guidance_scale: Annotated[float, "Classifier-free guidance; 1 is no guidance."] = 1.0
    seed: Annotated[int, "Base seed, from which each tile derives its own."] = 0

    def __post_init__(self) -> None:
        _check_drawing(self.steps, self.guidance_scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """What a run works on.

    Attributes:
        source: Folder of tiles, table, tar shards or slides; OUT where tiles are generated.
    """

    source: Path | str
    input: Annotated[InputKind | None, "What IN is; by default that is looked up."] = None
    mpp: Annotated[
        float | None,
        "Microns per pixel: of tiles, by default the model's; of slides, by default what they "
        "state.",
    ] = None
    unit_tiles: Annotated[int, "Tiles per work unit; a killed process loses at most two units."] = (
        256
    )

    def __post_init__(self) -> None:
        if self.unit_tiles < 1:
            raise ValueError(f"unit_tiles is {self.unit_tiles}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How a run is worked on; nothing here changes a byte of it, but for `overwrite`.

    Attributes:
        shard: Index i and number n: take only units i, i + n, i + 2 n and so on.
        progress: Show a bar on stderr.
        ray: Do the units on a cluster of Ray, whose machines see IN and OUT by the same absolute
            paths; None for in this process.
    """

    shard: tuple[int, int] = (0, 1)
    readers: Annotated[int, "Threads that decode."] = 4
    writers: Annotated[int, "Threads that encode and write."] = 4
    overwrite: Annotated[bool, "First remove whatever run OUT holds."] = False
    dry_run: Annotated[bool, "Say what would be done, as JSON, and write nothing."] = False
    progress: bool = True
    ray: RayCluster | None = None

    def __post_init__(self) -> None:
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard is {index}/{count}, expected i/n with 0 <= i < n, as 0/4")
        if self.overwrite and count > 1:
            raise ValueError(
                "--overwrite with --shard would remove what other shards wrote; remove the folder "
                "once, before the first"
            )
        if min(self.readers, self.writers) < 1:
            raise ValueError("readers and writers are threads, expected at least 1 of each")


def _check_strength(strength: tuple[float, float]) -> None:
    low, high = strength
    if not 0 <= low <= high <= 1:
        raise ValueError(f"strength is {low:g} to {high:g}, expected 0 <= low <= high <= 1")


def _check_drawing(steps: int | None, guidance_scale: float) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance scale is {guidance_scale}, expected a number; 1 is no guidance")
