"""How far two images are from each other in colour, as the eye sees it: distance in CIE Lab."""

from __future__ import annotations

from torch import Tensor

from cytosyn_aug.images import optical_density
from cytosyn_aug.stain.density import tissue_weight
from cytosyn_aug.stain.reinhard import grey_to_lab


def colour_distance(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean Lab distance of each pair of images over the tissue of the first.

    Args:
        images: uint8 [B, 3, H, W].
        others: uint8 [B, 3, H, W], same device.

    Returns:
        float32 [B]; 0 where there is no tissue.
    """
    distance = (grey_to_lab(images) - grey_to_lab(others)).square().sum(1).sqrt()
    weight = tissue_weight(optical_density(images))[:, 0]
    return (distance * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-6)
