"""Conversions between the forms a tile takes: uint8 images, float images and network pixels.

The only module that knows about value ranges and channel order. Three forms, one name each:

* ``images``: uint8 [B, 3, H, W], RGB, 0 to 255.
* ``pixels``: float [B, 3, H, W] in [-1, 1], what the VAE reads and writes.
* optical density: float [B, 3, H, W], natural logarithm, 0 for glass; see `optical_density`.

It refuses to know what a tile shows, where it comes from and which model will read it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cytosyn_aug.config import TileSpec


def images_to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 images to network pixels.

    Args:
        images: uint8 [..., 3, H, W], RGB, any device.
        dtype: Floating type of the result.

    Returns:
        dtype [..., 3, H, W] in [-1, 1]: value / 127.5 - 1.
    """
    return images.to(torch.float32).div(127.5).sub(1.0).to(dtype)


def pixels_to_images(pixels: Tensor) -> Tensor:
    """Map network pixels to uint8 images, rounding to the nearest grey level.

    Truncating instead would darken every tile by half a grey level, which stain statistics show.

    Args:
        pixels: float [..., 3, H, W], nominally in [-1, 1]; values outside are clipped.

    Returns:
        uint8 [..., 3, H, W].
    """
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def optical_density(images: Tensor) -> Tensor:
    """Return the optical density -ln((value + 1) / 256) of images given in grey levels.

    Args:
        images: uint8 or float [..., 3, H, W] in grey levels 0 to 255.

    Returns:
        float32 [..., 3, H, W]; 0 for white, 5.55 for black. The one added to the value keeps
        black finite (Macenko et al. 2009 do the same).
    """
    return -torch.log((images.to(torch.float32) + 1.0) / 256.0)


def density_to_grey(density: Tensor) -> Tensor:
    """Invert `optical_density`: float32 grey levels, not rounded, clipped to [0, 255]."""
    return (256.0 * torch.exp(-density) - 1.0).clamp(0.0, 255.0)


def tile_key(image: Tensor) -> str:
    """Return the content address of one tile: SHA-256 over shape and decoded RGB bytes.

    Args:
        image: uint8 [3, H, W] on any device.

    Returns:
        64 hexadecimal digits, equal for equal pixels on every machine.
    """
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise TypeError(
            f"tile_key got {image.dtype} {list(image.shape)}, expected uint8 [3, H, W]; "
            "convert the tile before addressing it"
        )
    header = ",".join(str(n) for n in image.shape).encode()
    return hashlib.sha256(header + image.cpu().contiguous().numpy().tobytes()).hexdigest()


def check_images(images: Tensor, tile: TileSpec) -> None:
    """Raise unless `images` are uint8 [B, 3, size, size] of the tile's side.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape, or an empty batch.
    """
    size = tile.size_px
    if images.dtype != torch.uint8:
        raise TypeError(
            f"got images of {images.dtype}, expected uint8 RGB in 0 to 255; convert them first"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"got images of shape {list(images.shape)}, expected [B, 3, {size}, {size}] RGB"
        )
    if images.shape[0] == 0:
        raise ValueError(f"got an empty batch, expected [B, 3, {size}, {size}] with B >= 1")
    if images.shape[2:] != (size, size):
        raise ValueError(
            f"tile is {images.shape[3]}x{images.shape[2]} px, the model expects "
            f"{tile.describe()}; re-tile the slide at that size and scale"
        )
