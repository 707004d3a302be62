"""Reinhard's colour transfer in CIE Lab, over tissue only, batched and blank-safe; a baseline.

Source: Reinhard et al. (2001), "Color transfer between images". Deviations: CIE Lab (D65, as
scikit-image has it) instead of l-alpha-beta, as everyone in pathology uses it; mean and deviation
of tissue instead of all pixels, so that glass counts as nothing and is left alone; and the stretch
of a channel is bounded, since a tile of one colour would be stretched without end.
"""

from __future__ import annotations

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
from cytosyn_aug.stain.density import MAX_GAIN, MIN_TISSUE, tissue_weight
from cytosyn_aug.stain.lab import grey_to_lab, lab_to_grey

# Below this deviation a channel of Lab is noise, and is moved without being stretched.
_LEAST_DEVIATION = 0.5


class LabMoments(NamedTuple):
    """Colour of the tissue of each tile, float64.

    Attributes:
        mean: [B, 3], of L (0 to 100), a and b.
        deviation: [B, 3].
        tissue: [B], mean tissue weight in [0, 1].
    """

    mean: Tensor
    deviation: Tensor
    tissue: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinhardReference:
    """The colour of the tissue of a set of tiles.

    Attributes:
        mean: Mean of L, a and b.
        deviation: Their standard deviation.
        num_tiles: Tiles it was fitted to.

    Example:
        >>> tiles = TileGenerator.from_pretrained().sample(per_condition=2, steps=2, seed=0)
        >>> reference = ReinhardReference.fit(tiles)
        >>> len(reference.mean), len(reference.deviation), reference.num_tiles
        (3, 3, 2)
    """

    mean: Triple
    deviation: Triple
    num_tiles: int

    @classmethod
    @isolated()
    def fit(
        cls,
        tiles: TileSource,
        *,
        tile: TileSpec | None = None,
        max_tiles: int = MAX_TILES,
    ) -> ReinhardReference:
        """Fit to the tissue of all tiles together.

        Args:
            tiles: uint8 [N, 3, H, W], a folder of tiles, a slide, or several of these.
            tile: Size and scale at which slides are read; None for 224 px at 0.5 microns/pixel.
            max_tiles: Tiles to read of a folder or slide at the most.

        Raises:
            ValueError: The tiles show no tissue.
        """
        images = read_tiles(tiles, tile or TileSpec(), max_tiles)
        pooled = pool_lab_moments(
            lab_moments(grey_to_lab(images), tissue_weight(optical_density(images)))
        )
        if not (pooled.tissue >= MIN_TISSUE).all():
            raise ValueError(f"the {len(images)} tiles show no tissue; fit to tiles with tissue")
        mean, deviation = pooled.mean[0].tolist(), pooled.deviation[0].tolist()
        return cls(mean=tuple(mean), deviation=tuple(deviation), num_tiles=len(images))

    def save(self, file: Path | str) -> None:
        """Write a .json file."""
        save_record(file, self)

    @classmethod
    def load(cls, file: Path | str) -> ReinhardReference:
        """Read a saved reference; raises ValueError if it is not one."""
        return load_record(cls, file)

    def moments(self, device: torch.device) -> LabMoments:
        """Return the reference as a batch of one."""
        mean = torch.tensor([self.mean], dtype=torch.float64, device=device)
        deviation = torch.tensor([self.deviation], dtype=torch.float64, device=device)
        return LabMoments(mean, deviation, torch.ones(1, dtype=torch.float64, device=device))


def lab_moments(lab: Tensor, weight: Tensor) -> LabMoments:
    """Return the weighted colour of each tile.

    Args:
        lab: float [B, 3, H, W]; see `grey_to_lab`.
        weight: float [B, 1, H, W]; see `cytosyn_aug.stain.density.tissue_weight`.
    """
    total = weight.sum((2, 3), dtype=torch.float64).clamp_min(1e-9)
    mean = (lab * weight).sum((2, 3), dtype=torch.float64) / total
    apart = (lab - mean.to(lab)[:, :, None, None]).square_().mul_(weight)
    variance = apart.sum((2, 3), dtype=torch.float64) / total
    return LabMoments(mean, variance.sqrt(), weight.mean((1, 2, 3), dtype=torch.float64))


def pool_lab_moments(moments: LabMoments) -> LabMoments:
    """Combine the colour of many tiles into that of their union, batch size 1."""
    share = (moments.tissue / moments.tissue.sum().clamp_min(1e-9))[:, None]
    mean = (share * moments.mean).sum(0)
    variance = (share * (moments.deviation.square() + (moments.mean - mean).square())).sum(0)
    return LabMoments(mean[None], variance.sqrt()[None], moments.tissue.mean()[None])


def match_colour(lab: Tensor, source: LabMoments, target: LabMoments) -> Tensor:
    """Return images with the mean and deviation of `target` in each channel of Lab.

    Args:
        lab: float [B, 3, H, W].
        source: Moments [B, ...] or [1, ...].
        target: Moments [B, ...] or [1, ...].

    Returns:
        float32 grey levels [B, 3, H, W], not rounded; glass is moved too, until it is weighted.
    """
    gain = target.deviation / source.deviation.clamp_min(1e-9)
    gain = gain.clamp(1 / MAX_GAIN, MAX_GAIN)
    gain = torch.where(source.deviation < _LEAST_DEVIATION, torch.ones_like(gain), gain)
    offset = (target.mean - gain * source.mean).to(lab)[:, :, None, None]
    return lab_to_grey(torch.addcmul(offset, gain.to(lab)[:, :, None, None], lab))
