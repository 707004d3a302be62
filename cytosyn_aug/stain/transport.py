"""Reference of optical transport: mean and covariance of the optical density of tissue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cytosyn_aug.autocast import isolated
from cytosyn_aug.config import TileSpec, Triple
from cytosyn_aug.io.json_files import load_record, save_record
from cytosyn_aug.io.tile_source import MAX_TILES, TileSource, read_tiles
from cytosyn_aug.stain.density import (
    MIN_TISSUE,
    POOL_PX,
    DensityMoments,
    pool_moments,
    tissue_moments,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityReference:
    """Mean and covariance of the optical density of the tissue of a set of tiles.

    Attributes:
        mean: Mean of RGB.
        covariance: Triples of the covariance.
        num_tiles: Tiles it was fitted to.

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=2, steps=2, seed=0)
        >>> reference = DensityReference.fit(tiles)
        >>> len(reference.mean), len(reference.covariance), reference.num_tiles
        (3, 3, 2)
    """

    mean: Triple
    covariance: tuple[Triple, Triple, Triple]
    num_tiles: int

    @classmethod
    @isolated()
    def fit(
        cls,
        tiles: TileSource,
        *,
        tile: TileSpec | None = None,
        max_tiles: int = MAX_TILES,
    ) -> DensityReference:
        """Fit to the tissue of all tiles together.

        Args:
            tiles: uint8 [N, 3, H, W], a folder of tiles, a slide, or several of these.
            tile: Size and scale at which slides are read; None for 224 px at 0.5 microns/pixel.
            max_tiles: Tiles to read of a folder or slide at the most.

        Raises:
            ValueError: The tiles show no tissue.
        """
        images = read_tiles(tiles, tile or TileSpec(), max_tiles)
        check_pooled(images.shape[2], images.shape[3])
        pooled = pool_moments(tissue_moments(images))
        if not (pooled.tissue >= MIN_TISSUE).all():
            raise ValueError(f"the {len(images)} tiles show no tissue; fit to tiles with tissue")
        mean, (r, g, b) = pooled.mean[0].tolist(), pooled.covariance[0].tolist()
        rows = (tuple(r), tuple(g), tuple(b))
        return cls(mean=tuple(mean), covariance=rows, num_tiles=len(images))

    def save(self, file: Path | str) -> None:
        """Write a .json file."""
        save_record(file, self)

    @classmethod
    def load(cls, file: Path | str) -> DensityReference:
        """Read a saved reference; raises ValueError if it is not one."""
        return load_record(cls, file)

    def moments(self, device: torch.device) -> DensityMoments:
        """Return the reference as a batch of one."""
        mean = torch.tensor([self.mean], dtype=torch.float64, device=device)
        covariance = torch.tensor([self.covariance], dtype=torch.float64, device=device)
        return DensityMoments(mean, covariance, torch.ones(1, dtype=torch.float64, device=device))


def check_pooled(height_px: int, width_px: int) -> None:
    """Raise ValueError for images smaller than the squares that density is averaged over."""
    if min(height_px, width_px) < POOL_PX:
        raise ValueError(
            f"image is {width_px}x{height_px} px, and optical density is averaged over squares: "
            f"expected at least {POOL_PX}x{POOL_PX} px; give whole tiles"
        )
