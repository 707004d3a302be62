"""Colour statistics of tissue, and colour changes that cannot move a nucleus.

Optical density is near linear in the amount of stain, so a change of stain is close to an affine
map there. This module measures weighted moments of tissue pixels, matches moments, and applies
the resulting map to original pixels, fading out over glass. All of it is batched and blank-safe.
It refuses to know how the wanted colours were found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cytosyn_aug.images import density_to_grey, optical_density

# Mean optical density over RGB at which tissue begins to count and counts fully. Pale stroma is
# about 0.2, glass below 0.08; a hard threshold would draw a rim around pale tissue. Measured on
# six development slides: ending at 0.20 instead of 0.25 closes 0.01 more of the colour gap, and
# moves glass by 0.1 grey levels instead of 0.0 (LOG.md, 2026-11-23).
FADE_FROM, FADE_TO = 0.10, 0.20
# Density of the brightest channel at which tissue begins to count less, and no longer counts: 32
# and 16 grey levels. Black is what lies beyond a slide's edge, padding, a marker or soot, and would
# outweigh every nucleus. Of 48 million pixels of tiles chosen for training (1,000 tiles), 0.02 %
# are that dark.
DARK_FROM, DARK_TO = 2.05, 2.71
# Tiles with less tissue than this fraction of their area are blank and stay as they are.
MIN_TISSUE = 0.02
# Moments are taken after averaging over squares of this side: the VAE blurs and shifts detail by
# a pixel or two, and a change of stain is not about single pixels.
POOL_PX = 4
# Largest stretch or compression of any direction of optical density.
MAX_GAIN = 3.0
_RIDGE = 1e-4


class DensityMoments(NamedTuple):
    """Weighted moments of tissue optical density, float64.

    Attributes:
        mean: [B, 3].
        covariance: [B, 3, 3].
        tissue: [B], mean tissue weight in [0, 1], the fraction of the tile that is tissue.
    """

    mean: Tensor
    covariance: Tensor
    tissue: Tensor


class DensityMap(NamedTuple):
    """Affine map of optical density: od -> matrix od + offset; [B, 3, 3] and [B, 3], float64."""

    matrix: Tensor
    offset: Tensor


def tissue_weight(density: Tensor) -> Tensor:
    """Return the weight [B, 1, H, W] in [0, 1] of tissue, which is neither glass nor black.

    Smooth in the mean of optical density at the bright end, and in its minimum at the dark one.
    """
    stained = _smooth_step(density.mean(1, keepdim=True), FADE_FROM, FADE_TO)
    return stained * _smooth_step(density.amin(1, keepdim=True), DARK_TO, DARK_FROM)


def density_moments(density: Tensor, weight: Tensor) -> DensityMoments:
    """Return weighted moments of each tile.

    Args:
        density: float [B, 3, H, W].
        weight: float [B, 1, H, W].
    """
    d, w = density.double().flatten(2), weight.double().flatten(2)
    total = w.sum(2).clamp_min(1e-9)
    mean = (d * w).sum(2) / total
    centred = (d - mean[:, :, None]) * w.sqrt()
    covariance = centred @ centred.transpose(1, 2) / total[:, :, None]
    return DensityMoments(mean, covariance, weight.double().mean((1, 2, 3)))


def moment_statistics(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return moments as nine numbers [B, 9]: the mean, and the root of the covariance.

    Both are linear in optical density, so averaging and interpolating them is meaningful.

    Args:
        mean: [B, 3].
        covariance: [B, 3, 3].
    """
    rows, columns = torch.triu_indices(3, 3, device=mean.device)
    return torch.cat([mean, _power(covariance, 0.5)[:, rows, columns]], 1)


def moments_from_statistics(statistics: Tensor) -> DensityMoments:
    """Invert `moment_statistics`; the tissue fraction is set to one."""
    rows, columns = torch.triu_indices(3, 3, device=statistics.device)
    root = statistics.new_zeros(len(statistics), 3, 3)
    root[:, rows, columns] = statistics[:, 3:]
    root[:, columns, rows] = statistics[:, 3:]
    return DensityMoments(statistics[:, :3], root @ root, statistics.new_ones(len(statistics)))


def pooled_density(images: Tensor) -> Tensor:
    """Return optical density of images in grey levels, averaged over POOL_PX squares."""
    return F.avg_pool2d(optical_density(images), POOL_PX)


def tissue_moments(images: Tensor) -> DensityMoments:
    """Return the moments of tissue in images [B, 3, H, W] given in grey levels."""
    density = pooled_density(images)
    return density_moments(density, tissue_weight(density))


def is_tissue(images: Tensor) -> Tensor:
    """Return which tiles show tissue, bool [B]; the others are blank and must stay as they are.

    Args:
        images: uint8 or float [B, 3, H, W] in grey levels 0 to 255.
    """
    return tissue_weight(pooled_density(images)).double().mean((1, 2, 3)) >= MIN_TISSUE


def pool_moments(moments: DensityMoments) -> DensityMoments:
    """Combine the moments of many tiles into those of their union, batch size 1."""
    share = moments.tissue / moments.tissue.sum().clamp_min(1e-9)
    mean = (share[:, None] * moments.mean).sum(0)
    apart = moments.mean - mean
    covariance = moments.covariance + apart[:, :, None] * apart[:, None, :]
    covariance = (share[:, None, None] * covariance).sum(0)
    return DensityMoments(mean[None], covariance[None], moments.tissue.mean()[None])


def match_moments(source: DensityMoments, target: DensityMoments) -> DensityMap:
    """Return the optimal-transport map that gives `source` the moments of `target`.

    Moments are matched instead of colours regressed pixel by pixel: edits move detail by a pixel,
    and least squares would then shrink the colours to their mean. The gain of every direction is
    bounded, and a small ridge keeps directions without variance where they are.

    Args:
        source: Moments [B, ...].
        target: Moments [B, ...] or [1, ...].

    Source: Dowson and Landau (1982), map between normal distributions.
    """
    eye = torch.eye(3, dtype=torch.float64, device=source.mean.device)
    a, b = source.covariance + _RIDGE * eye, target.covariance + _RIDGE * eye
    root = _power(a, 0.5)
    inverse = _power(a, -0.5)
    matrix = inverse @ _power(root @ b @ root, 0.5) @ inverse
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.transpose(1, 2)))
    values = values.clamp(1 / MAX_GAIN, MAX_GAIN)
    matrix = (vectors * values[:, None, :]) @ vectors.transpose(1, 2)
    offset = target.mean - (matrix @ source.mean[:, :, None])[:, :, 0]
    return DensityMap(matrix, offset)


def blend_with_identity(change: DensityMap, strength: Tensor) -> DensityMap:
    """Return the map moved from the identity (strength 0) to itself (1), strength [B]."""
    eye = torch.eye(3, dtype=change.matrix.dtype, device=change.matrix.device)
    s = strength.to(change.matrix)
    matrix = eye + s[:, None, None] * (change.matrix - eye)
    return DensityMap(matrix, s[:, None] * change.offset)


def apply_density_map(images: Tensor, change: DensityMap) -> Tensor:
    """Recolour the tissue of images [B, 3, H, W] in grey levels; glass and black stay.

    Args:
        images: uint8 or float grey levels in [0, 255], any size.
        change: One map per tile.

    Returns:
        float32 grey levels, clipped once, not rounded.
    """
    return recolour_density(optical_density(images), change)


def recolour_density(density: Tensor, change: DensityMap) -> Tensor:
    """Do what `apply_density_map` does, from optical density [B, 3, H, W] that is at hand."""
    matrix = change.matrix.to(density)
    mapped = matrix @ density.flatten(2)
    mapped = mapped.add_(change.offset.to(density)[:, :, None]).view_as(density)
    return density_to_grey(torch.lerp(density, mapped, tissue_weight(density)).clamp_min_(0))


def _smooth_step(x: Tensor, start: float, end: float) -> Tensor:
    """Return 0 at `start` and before it, 1 at `end` and behind it, by Hermite's polynomial."""
    x = ((x - start) / (end - start)).clamp_(0, 1)
    return x * x * (3 - 2 * x)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    powers = values.clamp_min(1e-8).pow(exponent)[:, None, :]
    return torch.matmul(vectors * powers, vectors.transpose(1, 2))
