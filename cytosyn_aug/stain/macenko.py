"""Macenko's two stains of a tile or a slide, batched and blank-safe; a classical baseline.

Tissue pixels lie near a plane in optical density; the extreme directions in it are the two stains,
and a high percentile of their concentrations is how strong they are. To normalise is then one
linear map of optical density for a tile, which `cytosyn_aug.stain.density` applies as it does every
other:
glass stays, results are clipped once. Statistics are float64.

Source: Macenko et al. (2009), "A method for normalizing histology slides for quantitative
analysis", and the code by M. Veta that torchstain ported. Deviations, all of them where that code
invents tissue: the percentile of concentrations is taken over tissue pixels instead of all; tiles
with too little tissue or only one direction of colour are not normalised; glass is left alone. Grey
levels come back by the exact inverse of the optical density, which is one less than the code's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import TileSpec, Triple
from cytosyn_aug.images import optical_density
from cytosyn_aug.io.json_files import load_record, save_record
from cytosyn_aug.io.tile_source import MAX_TILES, TileSource, read_tiles
from cytosyn_aug.stain.density import DARK_TO, DensityMap

# Transmitted light, least optical density of tissue and percentile, as published.
WHITE = 240.0
MIN_DENSITY = 0.15
ANGLE_PERCENT = 1.0
CONCENTRATION_PERCENT = 99.0
# Fewer tissue pixels than this share tell no stain.
MIN_SHARE = 0.005
# Stains closer than this cannot be told apart: all pixels have one colour, up to noise. In 501
# tiles of 39 slides they are 9 to 31 degrees apart.
MIN_ANGLE_DEGREES = 3.0
# Our optical density is that of 256; theirs, of WHITE, is smaller by this.
_OFFSET = math.log(256.0 / WHITE)
# Percentiles over many tiles are taken of at most so many pixels, evenly spaced.
_MAX_PIXELS = 4_000_000


class Stains(NamedTuple):
    """Two stains of each tile, float64.

    Attributes:
        vectors: [B, 3, 2], optical density of RGB at unit length; haematoxylin, then eosin.
        concentrations: [B, 2], the 99th percentile of how much of each a pixel holds.
        is_sound: bool [B]; False where a tile does not tell (few tissue pixels, or of one colour).
    """

    vectors: Tensor
    concentrations: Tensor
    is_sound: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MacenkoReference:
    """The two stains of a set of tiles.

    Attributes:
        haematoxylin: Its optical density of RGB, of unit length.
        eosin: The same of eosin.
        concentrations: 99th percentile of how much of each a tissue pixel holds.
        num_tiles: Tiles it was fitted to.

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=4, steps=4)
        >>> MacenkoNormalize(MacenkoReference.fit(tiles))(tiles).shape
        torch.Size([4, 3, 224, 224])
    """

    haematoxylin: Triple
    eosin: Triple
    concentrations: tuple[float, float]
    num_tiles: int

    @classmethod
    @isolated()
    def fit(
        cls,
        tiles: TileSource,
        *,
        tile: TileSpec | None = None,
        max_tiles: int = MAX_TILES,
    ) -> MacenkoReference:
        """Fit to the tissue pixels of all tiles together.

        Args:
            tiles: uint8 [N, 3, H, W], a folder of tile images, a slide, or several of these two.
            tile: Size and scale of the tiles cut from a slide; None for 224 px at 0.5 mpp.
            max_tiles: Of a larger folder or slide, so many evenly spaced tiles are read.

        Raises:
            FileNotFoundError: The folder or slide does not exist.
            ValueError: The tiles do not tell two stains apart.
        """
        images = read_tiles(tiles, tile or TileSpec(), max_tiles)
        pixels = images.transpose(0, 1).flatten(1)
        pixels = pixels[None, :, :: 1 + pixels.shape[1] // _MAX_PIXELS, None]
        stains = estimate_stains(optical_density(pixels))
        if not stains.is_sound.all():
            raise ValueError(
                f"the {len(images)} tiles do not show two stains that differ; fit to tiles with "
                "tissue"
            )
        haematoxylin, eosin = stains.vectors[0].T.tolist()
        return cls(
            haematoxylin=tuple(haematoxylin),
            eosin=tuple(eosin),
            concentrations=tuple(stains.concentrations[0].tolist()),
            num_tiles=len(images),
        )

    def save(self, file: Path | str) -> None:
        """Write a .json file."""
        save_record(file, self)

    @classmethod
    def load(cls, file: Path | str) -> MacenkoReference:
        """Read a saved reference; raises ValueError if it is not one."""
        return load_record(cls, file)

    def stains(self, device: torch.device) -> Stains:
        """Return the reference as a batch of one."""
        vectors = torch.tensor([self.haematoxylin, self.eosin], dtype=torch.float64, device=device)
        strong = torch.tensor([self.concentrations], dtype=torch.float64, device=device)
        return Stains(vectors.T[None], strong, torch.ones(1, dtype=torch.bool, device=device))


def estimate_stains(density: Tensor) -> Stains:
    """Return the stains of each tile.

    1. Optical density, and which pixels are tissue.
    2. The plane of the two largest directions of variance.
    3. The extreme angles in it, at the 1st and 99th percentile: the stains. The one with more red
       density is haematoxylin.
    4. Concentrations by least squares, and their 99th percentile.

    Args:
        density: Optical density [B, 3, H, W]; see `cytosyn_aug.images.optical_density`.
    """
    # 1
    brightest = density.flatten(2).amin(1)
    density = density.flatten(2) - _OFFSET
    is_tissue = (brightest - _OFFSET >= MIN_DENSITY) & (brightest < DARK_TO)
    number = is_tissue.sum(1, dtype=torch.int32)
    # 2
    inside = (density * is_tissue[:, None]).double()
    mean = inside.sum(2) / number.clamp_min(1)[:, None]
    square = inside @ inside.transpose(1, 2) - number[:, None, None] * (
        mean[:, :, None] * mean[:, None, :]
    )
    _, directions = torch.linalg.eigh(square / (number - 1).clamp_min(1)[:, None, None])
    plane = directions[:, :, 1:]
    # 3
    # Angles are measured from the main direction, pointed at the tissue, so that none wraps.
    is_backward = (plane[:, :, 1] * mean).sum(1) < 0
    plane = torch.where(is_backward[:, None, None], -plane, plane)
    along = plane.to(density).transpose(1, 2) @ density
    angle = torch.atan2(along[:, 0], along[:, 1])
    low = -_high_percentile(-angle, is_tissue, 100 - ANGLE_PERCENT)
    high = _high_percentile(angle, is_tissue, 100 - ANGLE_PERCENT)
    ends = torch.stack([low, high], 1).double()
    vectors = plane @ torch.stack([ends.sin(), ends.cos()], 1)
    is_swapped = vectors[:, 0, 0] < vectors[:, 0, 1]
    vectors = torch.where(is_swapped[:, None, None], vectors.flip(2), vectors)
    # 4
    concentrations = (torch.linalg.pinv(vectors).to(density) @ density).flatten(0, 1)
    is_tissue = is_tissue.repeat_interleave(2, 0)
    strong = _high_percentile(concentrations, is_tissue, CONCENTRATION_PERCENT)
    strong = strong.double().view(-1, 2)
    is_sound = number >= max(3, MIN_SHARE * density.shape[2])
    is_apart = ends[:, 1] - ends[:, 0] >= math.radians(MIN_ANGLE_DEGREES)
    return Stains(vectors, strong, is_sound & is_apart & (strong > 0).all(1))


def normalising_map(source: Stains, target: Stains) -> DensityMap:
    """Return the map of optical density that replaces the stains of `source` by those of `target`.

    Args:
        source: Stains [B, ...]; those that are not sound get the identity.
        target: Stains [B, ...] or [1, ...].
    """
    eye = torch.eye(3, dtype=torch.float64, device=source.vectors.device)
    safe = torch.where(source.is_sound[:, None, None], source.vectors, eye[:, :2])
    ratio = target.concentrations / torch.where(
        source.is_sound[:, None], source.concentrations, torch.ones_like(source.concentrations)
    )
    matrix = (target.vectors * ratio[:, None, :]) @ torch.linalg.pinv(safe)
    matrix = torch.where(source.is_sound[:, None, None], matrix, eye)
    # od - offset is mapped, od is what DensityMap speaks of.
    offset = _OFFSET * (1.0 - matrix.sum(2))
    return DensityMap(matrix, offset)


def _high_percentile(values: Tensor, is_counted: Tensor, percent: float) -> Tensor:
    """Return a percentile above the median of rows [B, N], at the nearest rank; 0 of none.

    Only the tail is sorted, which is most of the speed.
    """
    last = (is_counted.sum(1, dtype=torch.int32) - 1).clamp_min(0).double()
    from_above = (last - (0.01 * percent * last).round()).long()
    tail = torch.where(is_counted, values, -torch.inf).topk(int(from_above.max()) + 1, 1).values
    return tail.gather(1, from_above[:, None])[:, 0].nan_to_num(0, 0, 0)
