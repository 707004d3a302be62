"""How far two images are from each other in colour, as the eye sees it: distance in CIE Lab."""

from __future__ import annotations

import torch
from torch import Tensor

from cytosyn_aug.images import optical_density
from cytosyn_aug.stain import tissue_weight

# Linear sRGB to XYZ, divided by the white point D65.
_XYZ_OF_RGB = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)


def grey_to_lab(grey: Tensor) -> Tensor:
    """Return CIE Lab (D65, 2 degrees) of sRGB grey levels.

    Args:
        grey: uint8 or float [B, 3, H, W] in 0 to 255.

    Returns:
        float32 [B, 3, H, W]; L in 0 to 100.

    Source: IEC 61966-2-1 and CIE 15, with the constants of scikit-image's `rgb2lab`.
    """
    value = grey.float() / 255.0
    linear = torch.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", linear.new_tensor(_XYZ_OF_RGB), linear)
    root = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


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
