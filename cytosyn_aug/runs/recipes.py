"""How whole data sets are augmented, normalised and sampled: frozen, and recorded in `run.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cytosyn_aug.config import Method, Preserve
from cytosyn_aug.stain.recipe import EditRecipe

Mode = Literal["stain", "resample"]
Source = Literal["tile", "slide"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentRecipe:
    """How tiles are augmented.

    Attributes:
        variants: Results of each tile.
        mode: "stain" restains; "resample" generates new tiles with the same features.
        strength: Of restaining, drawn evenly between these two for each result; 1 goes to the
            reference, 0 stays.
        preserve: "color" moves no structure; "none" draws the restained tile anew.
        mpp: Scale of the tiles in microns per pixel.
        steps: Forwards of resampling; None for 4 of a student, or 16 of the transformer.
        guidance_scale: Classifier-free guidance of resampling; 1 for none.
        edit: How the model restains.
        seed: Base seed.
        allow_geometry_change: Accept tiles with masks although structure changes; the masks are
            left behind.
        min_similarity: Least cosine similarity of the features of a tile and one drawn anew.
        max_similarity: Largest one; a copy has 1. What is out of these bounds is
            left out, and named in the manifest.
    """

    variants: int = 1
    mode: Mode = "stain"
    strength: tuple[float, float] = (1.0, 1.0)
    preserve: Preserve = "color"
    mpp: float = 0.5
    steps: int | None = None
    guidance_scale: float = 1.0
    edit: EditRecipe = field(default_factory=EditRecipe)
    seed: int = 0
    allow_geometry_change: bool = False
    min_similarity: float = -1.0
    max_similarity: float = 1.0

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"variants is {self.variants}, expected at least 1")
        if self.mode not in ("stain", "resample"):
            raise ValueError(f"mode is {self.mode!r}, expected 'stain' or 'resample'")
        if self.preserve not in ("color", "none"):
            raise ValueError(f"preserve is {self.preserve!r}, expected 'color' or 'none'")
        _check_strength(self.strength)
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
        method: "cytosyn" reads the stain with the model's probe; "macenko", "reinhard" and
            "transport" are those of `cytosyn_aug.transforms.classical`, without a network.
        source: Whose stain is changed: that of each "tile", or of its "slide", where its name or a
            table says which that is.
        strength: 1 goes to the reference, 0 stays.
        mpp: Scale of the tiles in microns per pixel.
        edit: How the model restains.
    """

    method: Method = "cytosyn"
    source: Source = "tile"
    strength: float = 1.0
    mpp: float = 0.5
    edit: EditRecipe = field(default_factory=EditRecipe)

    def __post_init__(self) -> None:
        _check_strength((self.strength, self.strength))
        if self.source not in ("tile", "slide"):
            raise ValueError(f"source is {self.source!r}, expected 'tile' or 'slide'")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecipe:
    """How tiles are generated.

    Attributes:
        steps: Forwards; None for 4 of a student, or 16 of the transformer.
        guidance_scale: Classifier-free guidance; 1 for none.
        seed: Base seed.
    """

    steps: int | None = None
    guidance_scale: float = 1.0
    seed: int = 0


def _check_strength(strength: tuple[float, float]) -> None:
    low, high = strength
    if not 0 <= low <= high <= 1:
        raise ValueError(f"strength is {low:g} to {high:g}, expected 0 <= low <= high <= 1")
