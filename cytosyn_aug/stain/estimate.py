"""The stain of tiles: nine statistics each, of themselves, their slide or a reference.

What stain a tile has is measured on its pixels and, where the model has a stain probe, read from
its features as well. A result depends on pixels, recipe and weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import TileSpec
from cytosyn_aug.images import WHICH_IS_THE_IMAGE
from cytosyn_aug.model.conditions import Conditions, read_conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import (
    MIN_TISSUE,
    DensityMoments,
    moment_statistics,
    pool_moments,
    tissue_moments,
)
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference


class StainEstimate(NamedTuple):
    """The stain of tiles, as nine statistics each.

    Attributes:
        statistics: float64 [B, 9], mean and root of the covariance of optical density.
        is_tissue: bool [B]; False where the tile is blank and must be returned as it is.
        is_finite: bool [B]; False where the networks failed, so that the statistics say nothing.
    """

    statistics: Tensor
    is_tissue: Tensor
    is_finite: Tensor


def check_scale(mpp: float, tile: TileSpec) -> None:
    """Raise ValueError for images of a scale that the model's tiles cannot be cut from."""
    ratio = mpp / tile.mpp
    if not 0.2 <= ratio <= 2.0:
        raise ValueError(
            f"mpp is {mpp}, the model expects {tile.describe()}; give the scale of the "
            "images in microns per pixel, between a fifth of and twice the model's"
        )


def covers_tile(height_px: int, width_px: int, mpp: float, tile: TileSpec) -> bool:
    """Return whether an image of this size and scale covers the model's tile."""
    return min(_sides_at(height_px, width_px, mpp, tile)) >= tile.size_px


def check_extent(height_px: int, width_px: int, mpp: float, tile: TileSpec) -> None:
    """Raise ValueError for images that cover less than the model's tile.

    Args:
        height_px: Of the images.
        width_px: Of the images.
        mpp: Scale of the images in microns per pixel.
        tile: The model's tiles.
    """
    if not covers_tile(height_px, width_px, mpp, tile):
        raise ValueError(
            f"image is {width_px}x{height_px} px at {mpp:g} microns/pixel, the model "
            f"expects at least {tile.describe()}; re-tile larger or correct mpp. "
            f"{WHICH_IS_THE_IMAGE}"
        )


def central_tiles(grey: Tensor, mpp: float, tile: TileSpec) -> Tensor:
    """Return the centre of each image as uint8 tiles at the model's size and scale.

    Args:
        grey: float32 [B, 3, H, W] in 0 to 255, at least as large as the model's tile; see
            `check_extent`.
        mpp: Scale of the images in microns per pixel.
        tile: The model's tiles.

    Returns:
        uint8 [B, 3, size, size].
    """
    size = tile.size_px
    height, width = _sides_at(grey.shape[2], grey.shape[3], mpp, tile)
    assert min(height, width) >= size, "check_extent is for whoever lets images in"
    if (height, width) != tuple(grey.shape[2:]):
        grey = F.interpolate(grey, (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    crop = grey[:, :, top : top + size, left : left + size]
    return crop.round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def estimate_stain(
    generator: TileGenerator,
    tiles: Tensor,
    source: StainReference | Sequence[StainReference | None] | None,
    recipe: EditRecipe,
    features: Callable[[Tensor], Conditions] | Tensor | None = None,
) -> StainEstimate:
    """Return the stain of tiles, on their device.

    1. Describe the stain of a tile by nine statistics of tissue optical density: as measured on the
       pixels, and as the stain probe reads them from the features.
    2. Average the two descriptions with `recipe.probe_share`.
    3. Where the stain of the tile's slide is known, take that instead.

    Args:
        generator: The model.
        tiles: uint8 [B, 3, size, size].
        source: Statistics of the slide the tiles come from, for all or for each; None for each
            tile's own.
        recipe: How the model reads stain.
        features: CLS vectors [B, D] of the tiles, or a function that gives those of the uint8
            tiles whose own stain counts; None asks the encoder.
    """
    own = tissue_moments(tiles)
    is_tissue = own.tissue >= MIN_TISSUE
    statistics = moment_statistics(own.mean, own.covariance)
    sources = list(source) if isinstance(source, Sequence) else [source] * len(tiles)
    for reference in {id(x): x for x in sources if x is not None}.values():
        of_slide = torch.tensor([x is reference for x in sources], device=tiles.device)
        statistics[of_slide] = reference_statistics(generator, reference, recipe).to(statistics)
    is_alone = torch.tensor([x is None for x in sources], device=tiles.device)
    rows = (is_tissue & is_alone).nonzero()[:, 0]
    # Only the probe needs features; a model without one restains without an encoder too.
    if generator.stain_probe is not None and recipe.probe_share > 0 and len(rows):
        cls = condition_vectors(generator, tiles, rows, features)
        statistics[rows] = _blend(generator, statistics[rows], cls, recipe)
    return StainEstimate(statistics, is_tissue, statistics.isfinite().all(1))


@isolated()
@torch.no_grad()
def reference_statistics(
    generator: TileGenerator, reference: StainReference, recipe: EditRecipe
) -> Tensor:
    """Return the nine statistics [1, 9] of all tiles of a reference together, float64."""
    reference.check_model(generator)
    measured = measured_statistics(reference)
    return _blend(generator, measured, reference.cls, recipe).mean(0, keepdim=True)


def measured_statistics(reference: StainReference) -> Tensor:
    """Return the nine statistics [1, 9] of a reference's pixels, without any network, float64."""
    pooled = pool_moments(DensityMoments(*reference.moments))
    return moment_statistics(pooled.mean, pooled.covariance)


def condition_vectors(
    generator: TileGenerator,
    tiles: Tensor,
    rows: Tensor,
    features: Callable[[Tensor], Conditions] | Tensor | None,
) -> Tensor:
    """Return the CLS vectors [n, D] of some tiles, known, asked for, or from the encoder.

    Args:
        generator: The model.
        tiles: uint8 [B, 3, size, size].
        rows: int64 [n], the tiles in question.
        features: CLS vectors [B, D] of all tiles, or a function that gives those of uint8 tiles;
            None asks the encoder.
    """
    if features is None:
        return generator.cls_features(tiles[rows])
    if isinstance(features, Tensor):
        return features[rows.to(features.device)]
    return read_conditions(features(tiles[rows]), len(generator.null_condition), len(rows))


def _sides_at(height_px: int, width_px: int, mpp: float, tile: TileSpec) -> tuple[int, int]:
    """Return height and width of an image in pixels of the model's scale."""
    return round(height_px * mpp / tile.mpp), round(width_px * mpp / tile.mpp)


def _blend(
    generator: TileGenerator, measured: Tensor, cls: Tensor | None, recipe: EditRecipe
) -> Tensor:
    if generator.stain_probe is None or cls is None or recipe.probe_share == 0:
        return measured
    probed = generator.stain_probe.statistics(cls.to(generator.device)).to(measured)
    return torch.lerp(measured.expand_as(probed), probed, recipe.probe_share)
