"""The four methods of normalisation behind one interface: fit a reference, change colours to it.

The four kinds of references, each of which names its method, and what they have in common: they are
fitted to tiles, and two of a kind give a function of colour. The functions are those of the
transforms (`StainNormalize`, `MacenkoNormalize`, ...) with `source`, without their question whether
a tile is worth changing, which would answer differently for neighbours.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import Method, TileSpec
from cytosyn_aug.images import optical_density
from cytosyn_aug.io.json_files import record_to_dict
from cytosyn_aug.io.tile_source import MAX_TILES, TileSource
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.colour_table import Recolour
from cytosyn_aug.stain.density import (
    DensityMap,
    apply_density_map,
    blend_with_identity,
    match_moments,
    tissue_weight,
)
from cytosyn_aug.stain.estimate import StainEstimate, reference_statistics
from cytosyn_aug.stain.lab import grey_to_lab
from cytosyn_aug.stain.macenko import MacenkoReference, normalising_map
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.stain.reinhard import ReinhardReference, match_colour
from cytosyn_aug.stain.restain import recolour
from cytosyn_aug.stain.transport import DensityReference

AnyReference = StainReference | MacenkoReference | ReinhardReference | DensityReference

KINDS: dict[Method, type[AnyReference]] = {
    "cytosyn": StainReference,
    "macenko": MacenkoReference,
    "reinhard": ReinhardReference,
    "transport": DensityReference,
}
_CPU = torch.device("cpu")


def method_of(reference: AnyReference) -> Method:
    """Return the method that a kind of reference stands for.

    Raises:
        TypeError: It is no reference.
    """
    for method, kind in KINDS.items():
        if isinstance(reference, kind):
            return method
    names = ", ".join(kind.__name__ for kind in KINDS.values())
    raise TypeError(f"reference is {type(reference).__name__}, expected one of {names}")


def fit_reference(
    method: Method,
    tiles: TileSource,
    generator: TileGenerator | None = None,
    max_tiles: int = MAX_TILES,
) -> AnyReference:
    """Fit the reference of a method to tiles, a folder, a slide, or several of these.

    Slides are read at the model's tile spec, or without a model at 224 px and 0.5 microns/pixel.

    Raises:
        ValueError: No such method, no generator for "cytosyn", or tiles that tell no stain.
    """
    if method == "cytosyn":
        return StainReference.fit(_needed(generator), tiles, max_tiles=max_tiles)
    tile = TileSpec() if generator is None else generator.tile
    if method == "macenko":
        return MacenkoReference.fit(tiles, tile=tile, max_tiles=max_tiles)
    if method == "reinhard":
        return ReinhardReference.fit(tiles, tile=tile, max_tiles=max_tiles)
    if method == "transport":
        return DensityReference.fit(tiles, tile=tile, max_tiles=max_tiles)
    raise ValueError(f"method is {method!r}, expected one of {', '.join(KINDS)}")


def reference_digest(reference: AnyReference) -> str:
    """Return 16 hexadecimal digits of SHA-256 over all of a reference."""
    if isinstance(reference, StainReference):
        content = reference.to_dict()
    else:
        content = record_to_dict(reference)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@isolated()
def recolour_to(
    reference: AnyReference,
    source: AnyReference,
    *,
    generator: TileGenerator | None,
    edit: EditRecipe,
    strength: float,
) -> Recolour:
    """Return the function of grey levels [1, 3, H, W] that takes `source` to `reference`.

    Args:
        reference: Where to go.
        source: The slide's own stain, of the same kind.
        generator: The model of a `StainReference`.
        edit: How the model reads stain.
        strength: 1 goes to the reference, 0 stays.

    Raises:
        ValueError: Of two kinds, of another model, or of statistics that are not finite.
    """
    if type(source) is not type(reference):
        raise ValueError(
            f"source is {type(source).__name__} and reference {type(reference).__name__}; fit both "
            "with one method"
        )
    if isinstance(reference, ReinhardReference) and isinstance(source, ReinhardReference):
        return _lab_change(reference, source, strength)
    if isinstance(reference, StainReference) and isinstance(source, StainReference):
        return _stain_change(reference, source, _needed(generator), edit, strength)
    change = blend_with_identity(_density_change(reference, source), torch.tensor([strength]))
    return lambda grey: apply_density_map(grey, change)


def _stain_change(
    reference: StainReference,
    source: StainReference,
    generator: TileGenerator,
    edit: EditRecipe,
    strength: float,
) -> Recolour:
    own, targets = (reference_statistics(generator, x, edit).cpu() for x in (source, reference))
    if not (own.isfinite().all() and targets.isfinite().all()):
        raise ValueError("the features of a reference are not finite; fit it again in float32")
    is_tissue = torch.ones(1, dtype=torch.bool)
    estimate = StainEstimate(own, is_tissue=is_tissue, is_finite=is_tissue)
    share = torch.tensor([strength])
    return lambda grey: recolour(grey, estimate, targets, share).images


def _density_change(reference: AnyReference, source: AnyReference) -> DensityMap:
    if isinstance(reference, MacenkoReference) and isinstance(source, MacenkoReference):
        return normalising_map(source.stains(_CPU), reference.stains(_CPU))
    assert isinstance(reference, DensityReference)
    assert isinstance(source, DensityReference)
    return match_moments(source.moments(_CPU), reference.moments(_CPU))


def _lab_change(
    reference: ReinhardReference, source: ReinhardReference, strength: float
) -> Recolour:
    own, target = source.moments(_CPU), reference.moments(_CPU)

    def change(grey: Tensor) -> Tensor:
        mapped = match_colour(grey_to_lab(grey), own, target)
        return torch.lerp(grey, mapped, tissue_weight(optical_density(grey)) * strength)

    return change


def _needed(generator: TileGenerator | None) -> TileGenerator:
    if generator is None:
        raise ValueError(
            "a StainReference is read with the model it was fitted with: pass generator=, or use "
            "a MacenkoReference, ReinhardReference or DensityReference, which need none"
        )
    return generator
