"""Restaining, as one pure function of tiles, and its two halves.

    estimate_stain   the stain of tiles, or of the slide that they come from: nine statistics each
    recolour         from there to the statistics of a target, by one smooth change of colour
    restain          both, for images of any size

The transform and training's comparison call `restain`. Who restains a tile to several targets
(views, the variants of a data set) estimates once and calls `recolour` for each, and a slide
tabulates `recolour` for all colours; so all of them agree to the grey level. The change is an
affine map of optical density, applied to the original pixels and faded out over glass and black, so
nothing can move. A result depends on pixels, targets, strength, recipe and weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.model.conditions import Conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import (
    DensityMap,
    apply_density_map,
    blend_with_identity,
    match_moments,
    moments_from_statistics,
)
from cytosyn_aug.stain.estimate import StainEstimate, central_tiles, estimate_stain
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference


class Restained(NamedTuple):
    """Restained images, and what was done to each.

    Attributes:
        images: float32 [B, 3, H, W], grey levels in [0, 255], not rounded. Images that were not
            edited keep their values.
        is_tissue: bool [B]; False where the image is blank and stays as it is.
        is_finite: bool [B]; False where the networks failed and the image stays as it is.
        is_edited: bool [B]; tissue, finite, and a strength above 0.
    """

    images: Tensor
    is_tissue: Tensor
    is_finite: Tensor
    is_edited: Tensor


@isolated()
@torch.no_grad()
def restain(
    generator: TileGenerator,
    images: Tensor,
    targets: Tensor,
    strength: Tensor,
    *,
    mpp: float,
    source: StainReference | Sequence[StainReference | None] | None,
    recipe: EditRecipe,
    features: Callable[[Tensor], Conditions] | Tensor | None = None,
) -> Restained:
    """Take images to the stain of their targets.

    Args:
        generator: The model.
        images: uint8 or float [B, 3, H, W], grey levels in [0, 255]; each covers at least the
            model's tile, which callers check where images come in.
        targets: float64 [B, 9] or [1, 9], statistics of the references to go to
            (`cytosyn_aug.stain.estimate.reference_statistics`).
        strength: float [B]; 1 goes to the target, 0 stays.
        mpp: Scale of the images in microns per pixel.
        source: Statistics of the slide the images come from, for all or for each; None for the
            image's own, estimated at its centre.
        recipe: How the model reads stain.
        features: CLS vectors [B, D] of the central tiles, or a function that gives those of uint8
            tiles; None asks the encoder.

    Returns:
        On the device of `images`.
    """
    tiles = central_tiles(images.float(), mpp, generator.tile)
    estimate = estimate_stain(generator, tiles, source, recipe, features)
    return recolour(images, estimate, targets, strength)


@isolated()
@torch.no_grad()
def recolour(
    images: Tensor, estimate: StainEstimate, targets: Tensor, strength: Tensor
) -> Restained:
    """Take images from an estimate of their stain to that of their targets.

    Args:
        images: uint8 or float [B, 3, H, W], grey levels in [0, 255].
        estimate: The stain that the images have, of each or of all (batch size 1).
        targets: float64 [B, 9] or [1, 9], statistics to go to.
        strength: float [B] or [1]; 1 goes to the target, 0 stays.
    """
    change = blend_with_identity(stain_change(estimate, targets), strength)
    is_edited = estimate.is_tissue & estimate.is_finite & (strength > 0)
    recoloured = apply_density_map(images, change)
    restained = torch.where(is_edited[:, None, None, None], recoloured, images)
    return Restained(restained, estimate.is_tissue, estimate.is_finite, is_edited)


def stain_change(estimate: StainEstimate, targets: Tensor) -> DensityMap:
    """Return the maps of optical density from each tile's stain to its target's.

    By optimal transport between the two, which are taken for normal distributions.

    Args:
        estimate: The stain of tiles.
        targets: float64 [B, 9] or [1, 9], statistics to go to.
    """
    # Where the networks failed: an identity, since the eigenvalues of NaN raise for all tiles.
    start = torch.where(estimate.is_finite[:, None], estimate.statistics, targets)
    return match_moments(moments_from_statistics(start), moments_from_statistics(targets))
