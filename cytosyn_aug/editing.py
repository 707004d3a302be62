"""The two things done to a tile: restain it, or resample it. Policies, as pure functions.

Restaining estimates, at the model's tile size, how the tile's colours would change under another
laboratory's stain, and applies that smooth change to the original pixels: nuclei cannot move.
Resampling generates a new tile from the features of the old one.

A result depends on pixels, recipe, seed and weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.flow import interpolate
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.reference import StainReference
from cytosyn_aug.sampling import (
    adams_bashforth2,
    guide,
    linear_grid,
    polynomial_grid,
    sample_noise,
)
from cytosyn_aug.stain import (
    MIN_TISSUE,
    DensityMap,
    density_moments,
    match_moments,
    pooled_density,
    tissue_weight,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecipe:
    """How a tile is restained.

    Attributes:
        noise_level: Time t in (0, 1] the content's latents are noised to; 1 forgets the content.
        steps: Velocity evaluations on the way back.
        guidance_scale: Classifier-free guidance towards the target's features.
    """

    noise_level: float = 0.6
    steps: int = 4
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level is {self.noise_level}, expected 0 < noise_level <= 1")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


class Restained(NamedTuple):
    """Result of `restain`.

    Attributes:
        images: uint8 [B, 3, size, size], the raw decode of the edited latents.
        change: The colour change in optical density, to be applied to original pixels.
        is_tissue: bool [B]; False where the tile is blank and must be returned as it is.
    """

    images: Tensor
    change: DensityMap
    is_tissue: Tensor


@torch.no_grad()
def restain(
    generator: TileGenerator,
    images: Tensor,
    reference: StainReference,
    source: StainReference | None,
    recipe: EditRecipe,
    seeds: Sequence[int],
) -> Restained:
    """Restain tiles towards a reference.

    1. Shift the content's features by the difference between the reference's mean features and
       the source's.
    2. Noise the content's latents to `recipe.noise_level` and integrate back twice from the same
       noise, under the shifted and under the content's own features. Their difference is the
       stain; what the model gets wrong about this tile is in both and cancels.
    3. Match the moments of tissue optical density of the second decode to those of the first.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        reference: Where to go.
        source: Statistics of the slide the tiles come from; None for each tile's own.
        recipe: See `EditRecipe`.
        seeds: One seed a tile, for its noise.

    Returns:
        The edited tiles and their colour change, on the generator's device.

    Source: Meng et al. (2022), SDEdit, for step 2.
    """
    reference.check_model(generator)
    own = generator.features(images).cls
    target = reference.cls.mean(0).to(own)
    start = own if source is None else source.cls.mean(0).to(own)
    shifted = own + target - start
    latents = generator.whiten(generator.encode(images).mean)
    noise = sample_noise(seeds, generator.latent_shape).to(latents)
    noised = interpolate(latents, noise, recipe.noise_level)
    times = linear_grid(recipe.steps, recipe.noise_level)
    null = generator.null_condition

    def back(condition: Tensor) -> Tensor:
        velocity = guide(generator.velocity, condition, null, recipe.guidance_scale)
        return generator.decode(adams_bashforth2(velocity, noised, times))

    before, after = back(own), back(shifted)
    return Restained(after, colour_change(before, after), tissue_fraction(images) >= MIN_TISSUE)


def colour_change(before: Tensor, after: Tensor) -> DensityMap:
    """Return the smooth change of optical density between two versions of the same tiles.

    Args:
        before: uint8 [B, 3, H, W].
        after: uint8 [B, 3, H, W], the same structures recoloured, give or take a pixel.
    """
    a, b = pooled_density(before), pooled_density(after)
    weight = tissue_weight(a)
    return match_moments(density_moments(a, weight), density_moments(b, weight))


def tissue_fraction(images: Tensor) -> Tensor:
    """Return the mean tissue weight [B] of uint8 images."""
    return tissue_weight(pooled_density(images)).mean((1, 2, 3))


class Resampled(NamedTuple):
    """Result of `resample`: new tiles, their similarity to the old, and which were not blank."""

    images: Tensor
    similarity: Tensor
    is_tissue: Tensor


@torch.no_grad()
def resample(
    generator: TileGenerator,
    images: Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    guidance_high: float = 0.75,
) -> Resampled:
    """Generate a new tile from the features of each old one.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        seeds: One seed a tile.
        steps: Velocity evaluations.
        guidance_scale: Classifier-free guidance in t <= `guidance_high`; 1 for none.
        guidance_high: Upper end of the guidance interval, t = 1 is noise.

    Returns:
        uint8 tiles, cosine similarity of CLS features [B] and the tissue gate [B].
    """
    cls = generator.features(images).cls
    velocity = guide(
        generator.velocity, cls, generator.null_condition, guidance_scale, high=guidance_high
    )
    noise = sample_noise(seeds, generator.latent_shape).to(cls)
    made = generator.decode(adams_bashforth2(velocity, noise, polynomial_grid(steps)))
    similarity = torch.cosine_similarity(cls, generator.features(made).cls)
    return Resampled(made, similarity, tissue_fraction(images) >= MIN_TISSUE)
