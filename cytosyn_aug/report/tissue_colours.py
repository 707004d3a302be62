"""Tissue colours in two spaces that pathologists read: CIE Lab, and the amounts of stain.

Optical density is nearly the sum of haematoxylin and eosin, each with a direction of its own. The
directions here are fixed, those of Ruifrok and Johnston, so that slides, references and results are
measured with one ruler; what the two do not explain (a third direction) is left out.

Source: Ruifrok and Johnston (2001), "Quantification of histochemical staining by color
deconvolution", the H, E and residual vectors as scikit-image's `rgb_from_hed` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.images import optical_density
from cytosyn_aug.report.tallies import Histogram
from cytosyn_aug.stain.density import MIN_TISSUE, tissue_weight
from cytosyn_aug.stain.lab import grey_to_lab, lab_to_grey

HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
_RESIDUAL = (0.27, 0.57, 0.78)
# Range of each axis; tissue lies inside of it.
AXES = {
    "L*": (0.0, 100.0),
    "a*": (-40.0, 90.0),
    "b*": (-75.0, 55.0),
    "H": (-0.5, 4.5),
    "E": (-1.0, 3.0),
}
LAB, STAINS = ("L*", "a*", "b*"), ("H", "E")
_NUM_BINS = 100
# Of larger images the centre is measured, so that a tile of 4,096 px costs what one of 512 does.
MAX_SIDE = 512


def stain_amounts(density: Tensor) -> Tensor:
    """Return how much haematoxylin and eosin there is in each pixel.

    Args:
        density: Optical density [B, 3, H, W], natural logarithm.

    Returns:
        float32 [B, 2, H, W]: 1 is a density of 1 along the stain's unit vector.
    """
    vectors = torch.tensor([HAEMATOXYLIN, EOSIN, _RESIDUAL], dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    unmixing = torch.linalg.inv(vectors.T)[:2].to(density)
    return (unmixing @ density.flatten(2)).unflatten(2, density.shape[2:])


class TissueColour(NamedTuple):
    """Mean colour of the tissue of a tile, by axis of `AXES`; and its share of the tile."""

    means: dict[str, float]
    tissue: float


class ColourDistribution:
    """Colours of the tissue pixels of many tiles, and the mean colour of each.

    Attributes:
        histograms: Of pixels, by axis.
        tiles: Mean colours of the tiles with tissue, in the order they came.
    """

    def __init__(self) -> None:
        self.histograms = {k: Histogram(*ends, _NUM_BINS) for k, ends in AXES.items()}
        self.tiles: list[TissueColour] = []

    def add(self, pixels: np.ndarray) -> None:
        """Take a tile, uint8 [H, W, 3]; a blank one counts as nothing."""
        images = as_images(pixels)
        density = optical_density(images)
        weight = tissue_weight(density)
        tissue = float(weight.mean(dtype=torch.float64))
        if tissue < MIN_TISSUE:
            return
        values = torch.cat([grey_to_lab(images), stain_amounts(density)], 1)[0]
        weights = weight.flatten().double().numpy()
        means = {}
        for name, channel in zip(AXES, values.flatten(1).double().numpy(), strict=True):
            # Each tile counts alike, however large.
            self.histograms[name].add(channel, weights / weights.sum())
            means[name] = float((channel * weights).sum() / weights.sum())
        self.tiles.append(TissueColour(means, tissue))

    def mean(self) -> dict[str, float] | None:
        """Return the mean colour of the tiles; None without any."""
        if not self.tiles:
            return None
        return {k: float(np.mean([tile.means[k] for tile in self.tiles])) for k in AXES}


def colour_of_grey(rgb: tuple[float, float, float]) -> dict[str, float]:
    """Return one colour, in grey levels 0 to 255, along all axes."""
    grey = torch.tensor(rgb)[None, :, None, None]
    values = torch.cat([grey_to_lab(grey), stain_amounts(optical_density(grey))], 1)
    return dict(zip(AXES, values.flatten().tolist(), strict=True))


def rgb_of_lab(mean: Mapping[str, float]) -> tuple[int, int, int]:
    """Return a colour in CIE Lab as whole grey levels 0 to 255."""
    lab = torch.tensor([mean[axis] for axis in LAB])[None, :, None, None]
    red, green, blue = lab_to_grey(lab).round().flatten().int().tolist()
    return red, green, blue


def pooled_histograms(distributions: Sequence[ColourDistribution]) -> dict[str, Histogram]:
    """Return the histograms of several distributions together, by axis."""
    pooled = ColourDistribution().histograms
    for distribution in distributions:
        for axis, histogram in distribution.histograms.items():
            pooled[axis].counts += histogram.counts
    return pooled


def as_images(pixels: np.ndarray) -> Tensor:
    """Return the centre of uint8 [H, W, 3] as uint8 [1, 3, h, w], at most `MAX_SIDE` per side."""
    top, left = (max(0, (n - MAX_SIDE) // 2) for n in pixels.shape[:2])
    part = pixels[top : top + MAX_SIDE, left : left + MAX_SIDE]
    return torch.from_numpy(part.copy()).permute(2, 0, 1)[None]
