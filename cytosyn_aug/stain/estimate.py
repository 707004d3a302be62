"""The stain of tiles: nine statistics each, of themselves, their slide or a reference.

What stain a tile has is measured on its pixels and, where the model has a stain probe, read from
its features as well. A result depends on pixels, recipe and weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    DensityMap,
    DensityMoments,
    match_moments,
    moment_statistics,
    moments_from_statistics,
    pool_moments,
    tissue_moments,
)
from cytosyn_aug.stain.reference import StainReference


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecipe:
    """How a tile is restained.

    Attributes:
        probe_share: How far stain is read from features by the stain probe, from 0 (only the
            colour moments of the pixels at hand, which mix stain with composition) to 1 (only the
            probe). Ignored for models without a probe.
        noise_level: With `preserve="none"`: time t in (0, 1] the latents are noised to before
            they are drawn anew; small keeps structure, 1 forgets the tile.
        steps: Forwards on the way back, of the student if the model has one.
        guidance_scale: Classifier-free guidance towards the recoloured tile's features.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2, seed=0)
        >>> recipe = EditRecipe(noise_level=0.5, steps=2)
        >>> reference = StainReference.fit(generator, tiles)
        >>> StainNormalize(generator, reference, preserve="none", recipe=recipe)(tiles).shape
        torch.Size([2, 3, 224, 224])
    """

    probe_share: float = 0.5
    noise_level: float = 0.3
    steps: int = 4
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probe_share <= 1:
            raise ValueError(f"probe_share is {self.probe_share}, expected 0 to 1")
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level is {self.noise_level}, expected 0 < noise_level <= 1")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


class StainEstimate(NamedTuple):
    """The stain of tiles, as nine statistics each.

    Attributes:
        statistics: float64 [B, 9]; see `cytosyn_aug.stain.density.moment_statistics`.
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


def check_extent(height_px: int, width_px: int, mpp: float, tile: TileSpec) -> tuple[int, int]:
    """Return height and width of an image in pixels of the model's scale.

    Raises:
        ValueError: It covers less than the model's tile.
    """
    height, width = (round(n * mpp / tile.mpp) for n in (height_px, width_px))
    if min(height, width) < tile.size_px:
        raise ValueError(
            f"image is {width_px}x{height_px} px at {mpp:g} microns/pixel, the model "
            f"expects at least {tile.describe()}; re-tile larger or correct mpp. "
            f"{WHICH_IS_THE_IMAGE}"
        )
    return height, width


def central_tiles(grey: Tensor, mpp: float, tile: TileSpec) -> Tensor:
    """Return the centre of each image as uint8 tiles at the model's size and scale.

    Args:
        grey: float32 [B, 3, H, W] in 0 to 255.
        mpp: Scale of the images in microns per pixel.
        tile: The model's tiles.

    Returns:
        uint8 [B, 3, size, size].

    Raises:
        ValueError: The image covers less than the model's tile.
    """
    size = tile.size_px
    height, width = check_extent(grey.shape[2], grey.shape[3], mpp, tile)
    if (height, width) != tuple(grey.shape[2:]):
        grey = F.interpolate(grey, (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    crop = grey[:, :, top : top + size, left : left + size]
    return crop.round().clamp(0, 255).to(torch.uint8)


@isolated()
@torch.no_grad()
def estimate_stain(
    generator: TileGenerator,
    images: Tensor,
    source: StainReference | None,
    recipe: EditRecipe,
    features: Callable[[Tensor], Conditions] | None = None,
) -> StainEstimate:
    """Return the stain of tiles, on the device of `images`.

    1. Describe the stain of a tile by nine statistics of tissue optical density: as measured on the
       pixels, and as the stain probe reads them from the features.
    2. Average the two descriptions with `recipe.probe_share`.

    `match_statistics` then goes to those of a reference, which `reference_statistics` describes in
    the same two ways.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        source: Statistics of the slide the tiles come from; None for each tile's own.
        recipe: See `EditRecipe`.
        features: Gives CLS vectors of tiles with tissue, if they are needed; None asks the encoder.
    """
    generator.check_images(images)
    own = tissue_moments(images)
    has_tissue = own.tissue >= MIN_TISSUE
    if source is not None:
        statistics = reference_statistics(generator, source, recipe).expand(len(images), -1)
    else:
        statistics = moment_statistics(own.mean, own.covariance)
        rows = has_tissue.nonzero()[:, 0]
        # Only the probe needs features; a model without one restains without an encoder too.
        if generator.stain_probe is not None and recipe.probe_share > 0 and len(rows):
            cls = condition_vectors(generator, images[rows], features)
            statistics[rows] = _blend(generator, statistics[rows], cls, recipe)
    statistics = statistics.to(images.device)
    return StainEstimate(statistics, has_tissue, statistics.isfinite().all(1))


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


def match_statistics(estimate: StainEstimate, targets: Tensor) -> DensityMap:
    """Return the map from each tile's stain to its target's, by optimal transport.

    Args:
        estimate: The stain of tiles.
        targets: [B, 9] or [1, 9].
    """
    # Where the networks failed: an identity, since the eigenvalues of NaN raise for all tiles.
    start = torch.where(estimate.is_finite[:, None], estimate.statistics, targets)
    return match_moments(moments_from_statistics(start), moments_from_statistics(targets))


def condition_vectors(
    generator: TileGenerator,
    images: Tensor,
    features: Callable[[Tensor], Conditions] | None,
) -> Tensor:
    """Return CLS vectors [B, D] of tiles, from whoever is to tell them."""
    if features is None:
        return generator.cls_features(images)
    return read_conditions(features(images), len(generator.null_condition), len(images))


def _blend(
    generator: TileGenerator, measured: Tensor, cls: Tensor | None, recipe: EditRecipe
) -> Tensor:
    if generator.stain_probe is None or cls is None or recipe.probe_share == 0:
        return measured
    probed = generator.stain_probe.statistics(cls.to(generator.device)).to(measured)
    return torch.lerp(measured.expand_as(probed), probed, recipe.probe_share)
