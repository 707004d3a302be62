"""Structure score of two images: correlation of their gradients, whatever their colours.

Gradients of mean optical density are compared: edges of nuclei and fibres that stay where they were
keep the direction of their gradients under any change of stain, and an edit that moves them by two
pixels does not. Optical density, because a stronger stain then only lengthens the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cytosyn_aug.images import optical_density

# Squared gradients of a flat image are those of rounding to grey levels, about 3e-5 per pixel.
_LEAST_ENERGY = 1e-4


def gradient_correlation(images: Tensor, others: Tensor) -> Tensor:
    """Return the correlation of the gradients of each pair of images.

    Args:
        images: uint8 [B, 3, H, W].
        others: uint8 [B, 3, H, W], same device.

    Returns:
        float64 [B] in [-1, 1]: 1 where one is the other with stronger or weaker stain, about 0
        where they have nothing to do with each other, -1 of a negative; NaN where one is flat.

    Raises:
        ValueError: They are of different shapes.
    """
    if images.shape != others.shape:
        raise ValueError(
            f"got images of shape {list(images.shape)} and {list(others.shape)}, expected one; "
            "structure is compared pixel by pixel"
        )
    one, other = _gradients(images), _gradients(others)
    energy, other_energy = one.square().mean(1), other.square().mean(1)
    correlation = (one * other).mean(1) / (energy * other_energy).sqrt()
    is_structured = (energy > _LEAST_ENERGY) & (other_energy > _LEAST_ENERGY)
    return torch.where(is_structured, correlation.clamp(-1, 1), torch.nan)


def _gradients(images: Tensor) -> Tensor:
    """Return the central differences of mean optical density in x and y, float64 [B, 2 N]."""
    density = optical_density(images).double().mean(1)
    across = density[:, 1:-1, 2:] - density[:, 1:-1, :-2]
    down = density[:, 2:, 1:-1] - density[:, :-2, 1:-1]
    return torch.stack([across, down], 1).flatten(1)
