"""Tiles drawn anew by the diffusion model, as pure functions: restained tiles, and resampled ones.

A result depends on pixels, recipe, seed and weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import FiniteImages, finite_images
from cytosyn_aug.model.conditions import Conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import interpolate, sample_noise
from cytosyn_aug.stain.density import (
    is_tissue,
)
from cytosyn_aug.stain.estimate import condition_vectors
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.restain import Restained


@isolated()
@torch.no_grad()
def redraw(
    generator: TileGenerator, images: Tensor, recipe: EditRecipe, seeds: Sequence[int]
) -> FiniteImages:
    """Noise the latents of tiles to `recipe.noise_level` and draw them anew from their features.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        recipe: Noise level, steps and guidance of drawing.
        seeds: One seed per tile, for its noise.

    Returns:
        uint8 [B, 3, size, size] on the generator's device, and which are to be used. Blank tiles
        are those that came in.

    Source: Meng et al. (2022), SDEdit.
    """
    generator.check_images(images)
    out = images.to(generator.device, copy=True)
    is_finite = torch.ones(len(out), dtype=torch.bool, device=out.device)
    rows = is_tissue(images).nonzero()[:, 0].tolist()
    if rows:
        latents = redraw_latents(generator, images[rows], recipe, [seeds[k] for k in rows])
        out[rows], is_finite[rows] = _decode(generator, latents)
    return FiniteImages(out, is_finite)


def redraw_restained(
    generator: TileGenerator, restained: Restained, recipe: EditRecipe, seeds: Sequence[int]
) -> Restained:
    """Draw edited tiles anew after they were restained; the others stay as they are.

    Args:
        generator: The model.
        restained: Tiles of the model's size.
        recipe: How the model draws.
        seeds: One seed per tile, for its noise.

    Returns:
        With `is_finite` and `is_edited` False where the networks failed on a tile.
    """
    rows = restained.is_edited.nonzero()[:, 0]
    if not len(rows):
        return restained
    tiles = restained.images[rows].round().to(torch.uint8)
    drawn = redraw(generator, tiles, recipe, [seeds[k] for k in rows.tolist()])
    images, is_finite = restained.images.clone(), restained.is_finite.clone()
    images[rows] = drawn.images.to(images)
    is_finite[rows] = drawn.is_finite.to(is_finite.device)
    return Restained(images, restained.is_tissue, is_finite, restained.is_edited & is_finite)


@isolated()
@torch.no_grad()
def redraw_latents(
    generator: TileGenerator, images: Tensor, recipe: EditRecipe, seeds: Sequence[int]
) -> Tensor:
    """Return the whitened latents [B, C, h, w] of `redraw`, on the generator's device.

    For stores of latents: a `ReplayBank`, or a cache of variants. Blank tiles are drawn too; leave
    them out (`cytosyn_aug.stain.density.is_tissue`), as those stores do.
    """
    cls = generator.cls_features(images)
    latents = generator.whiten(generator.encode(images).mean)
    noise = sample_noise(seeds, generator.latent_shape).to(latents)
    return generator.draw(
        interpolate(latents, noise, recipe.noise_level),
        cls,
        steps=recipe.steps,
        start_time=recipe.noise_level,
        guidance_scale=recipe.guidance_scale,
        seeds=seeds,
    )


class Resampled(NamedTuple):
    """Result of `resample`: new tiles, and what there is to say of them.

    Attributes:
        images: uint8 [B, 3, size, size]; blank tiles are those that came in.
        similarity: float32 [B], cosine of the features of new and old tile; NaN for blank tiles,
            where it was not asked, and without an encoder, which alone could tell it.
        is_tissue: bool [B]; False where the old tile is blank.
        is_finite: bool [B]; False where the networks failed and the old tile must be returned.
    """

    images: Tensor
    similarity: Tensor
    is_tissue: Tensor
    is_finite: Tensor


@isolated()
@torch.no_grad()
def resample(
    generator: TileGenerator,
    images: Tensor,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    features: Callable[[Tensor], Conditions] | Tensor | None = None,
    compares: bool = True,
) -> Resampled:
    """Generate a new tile from the features of each old one.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        seeds: One seed per tile.
        steps: Forwards; None for 4 of a student, or 16 of the transformer of a model without.
        guidance_scale: Classifier-free guidance in t <= 0.75 (1 = noise); 1 for none.
        features: CLS vectors [B, D] of the tiles, or a function that gives those of the uint8
            tiles with tissue; None asks the encoder.
        compares: Tell similarity, for which the encoder sees the new tiles too.

    Returns:
        On the generator's device.
    """
    generator.check_images(images)
    out = images.to(generator.device, copy=True)
    has_tissue = is_tissue(images).to(out.device)
    is_finite = torch.ones_like(has_tissue)
    similarity = torch.full((len(out),), torch.nan, dtype=torch.float32, device=out.device)
    rows = has_tissue.nonzero()[:, 0].tolist()
    if not rows:
        return Resampled(out, similarity, has_tissue, is_finite)
    chosen = [seeds[k] for k in rows]
    index = torch.tensor(rows, device=images.device)
    cls = condition_vectors(generator, images, index, features).to(out.device)
    noise = sample_noise(chosen, generator.latent_shape)
    latents = generator.draw(noise, cls, steps=steps, guidance_scale=guidance_scale, seeds=chosen)
    drawn = _decode(generator, latents)
    out[rows], is_finite[rows] = drawn
    if compares and generator.encoder is not None:
        similarity[rows] = torch.cosine_similarity(cls, generator.cls_features(drawn.images))
        is_finite &= similarity.isfinite() | ~has_tissue
    return Resampled(out, similarity, has_tissue, is_finite)


def _decode(generator: TileGenerator, latents: Tensor) -> FiniteImages:
    return finite_images(generator.decode_pixels(latents, is_few_step=True))
