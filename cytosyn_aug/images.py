"""Conversions between the forms a tile takes: uint8 images, float images and network pixels.

The only module that knows about value ranges and channel order. Three forms, one name each:

* ``images``: uint8 [B, 3, H, W], RGB, 0 to 255.
* ``pixels``: float [B, 3, H, W] in [-1, 1], what the VAE reads and writes.
* optical density: float [B, 3, H, W], natural logarithm, 0 for glass.

And the forms users hold tiles in, which `open_image` opens and its `restore` gives back: PIL
images, uint8 and float tensors, tv_tensors, with any leading dimensions.

It refuses to know what a tile shows, where it comes from and which model will read it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

from cytosyn_aug.config import TileSpec

# To be said where an image is too small or too large: it may be a map of features.
WHICH_IS_THE_IMAGE = (
    "The first plain tensor of a sample is taken as its image: if that is another one, wrap the "
    "image in tv_tensors.Image"
)


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


class FiniteImages(NamedTuple):
    """Images uint8 [B, 3, H, W], and bool [B]: False where a network failed."""

    images: Tensor
    is_finite: Tensor


def finite_images(pixels: Tensor) -> FiniteImages:
    """Map network pixels [B, 3, H, W] to images without raising for tiles that are not finite.

    One tile that fails must not cost the others of its batch.
    """
    is_finite = pixels.isfinite().all(3).all(2).all(1)
    return FiniteImages(pixels_to_images(pixels.nan_to_num()), is_finite)


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
        raise ValueError(_describe_sides(images.shape[2], images.shape[3], tile))


def check_sides(height_px: int, width_px: int, tile: TileSpec) -> None:
    """Raise ValueError for an image of a sample of other sides than the tile's."""
    if (height_px, width_px) != (tile.size_px, tile.size_px):
        raise ValueError(f"{_describe_sides(height_px, width_px, tile)}. {WHICH_IS_THE_IMAGE}")


def _describe_sides(height_px: int, width_px: int, tile: TileSpec) -> str:
    return (
        f"tile is {width_px}x{height_px} px, the model expects {tile.describe()}; re-tile the "
        "slide at that size and scale"
    )


class OpenImage(NamedTuple):
    """A user's image as grey levels, and the way back.

    Attributes:
        grey: float32 [B, 3, H, W] in 0 to 255, on the image's device; B = 1 without leading
            dimensions. A copy, which may be written to.
        restore: Takes edited grey levels [B, 3, H, W] and bool [B], which tiles were edited, and
            returns what the user gave, in type, shape, dtype and device. The other tiles keep
            their very bits; without any edited one the user's object itself comes back.
    """

    grey: Tensor
    restore: Callable[[Tensor, Tensor], Any]


def is_image_tensor(x: object) -> bool:
    """Return whether a plain tensor can be an image; labels and features have fewer dimensions."""
    return isinstance(x, Tensor) and not isinstance(x, tv_tensors.TVTensor) and x.ndim >= 3


def is_image(x: object) -> bool:
    """Return whether `open_image` is meant for this object."""
    return isinstance(x, PIL.Image.Image | tv_tensors.Image) or is_image_tensor(x)


def num_tiles(image: PIL.Image.Image | Tensor) -> int:
    """Return the number of tiles in an image: the product of its leading dimensions."""
    return math.prod(image.shape[:-3]) if isinstance(image, Tensor) else 1


def sides_of(image: PIL.Image.Image | Tensor) -> tuple[int, int]:
    """Return height and width in pixels.

    Raises:
        ValueError: A tensor that is not [..., 3, H, W], whose sides nobody can tell.
    """
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    _check_shape(image)
    return image.shape[-2], image.shape[-1]


def check_image(image: PIL.Image.Image | Tensor) -> None:
    """Raise what `open_image` raises, without opening."""
    if isinstance(image, PIL.Image.Image):
        if image.mode != "RGB":
            raise ValueError(
                f"got a PIL image of mode {image.mode}, expected RGB; use image.convert('RGB'), or "
                "wrap a mask in tv_tensors.Mask"
            )
        return
    _check_shape(image)
    if image.dtype.is_floating_point:
        low, high = image.as_subclass(Tensor).aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"got a float image in [{_shown(low)}, {_shown(high)}], expected [0, 1]; divide "
                "by 255 if it is in 0 to 255, clamp(0, 1) what an interpolation overshot, and "
                "normalise after this transform"
            )
    elif image.dtype != torch.uint8:
        raise TypeError(f"got an image of {image.dtype}, expected uint8 or float in [0, 1]")


def _shown(value: Tensor) -> str:
    """Return as many digits as tell a number from its neighbours: 1.0000002 is not 1."""
    return str(value.cpu().to(torch.promote_types(value.dtype, torch.float32)).numpy())


def open_image(image: PIL.Image.Image | Tensor) -> OpenImage:
    """Return a user's image as grey levels, and the way back.

    Args:
        image: PIL image of mode RGB, or uint8 in 0 to 255 or float in [0, 1] [..., 3, H, W].

    Raises:
        TypeError: Not 8-bit and not float.
        ValueError: Not RGB, a float image outside [0, 1] or not finite, or an empty batch.
    """
    check_image(image)
    if isinstance(image, PIL.Image.Image):
        return _open_pil(image)
    # Tensors of a TVTensor class would dispatch every operation below.
    plain = image.as_subclass(Tensor)
    shape, dtype = plain.shape, plain.dtype
    grey = plain.reshape(-1, *shape[-3:]).float()
    if dtype.is_floating_point:
        grey = grey * 255.0

    def restore(edited: Tensor, is_edited: Tensor) -> Any:
        if not is_edited.any():
            return image
        edited = (edited / 255.0 if dtype.is_floating_point else edited.round()).to(dtype)
        return _mixed(image, edited, is_edited)

    return OpenImage(grey, restore)


class OpenTiles(NamedTuple):
    """A user's image as bytes, and the way back.

    Attributes:
        tiles: uint8 [B, 3, H, W], on the image's device; must not be written to.
        restore: As that of `OpenImage`, but takes bytes, and at least one tile was edited.
    """

    tiles: Tensor
    restore: Callable[[Tensor, Tensor], Any]


def open_tiles(image: PIL.Image.Image | Tensor) -> OpenTiles:
    """Return a user's image as bytes, which for look-ups are faster than `open_image`'s floats.

    Args:
        image: PIL image of mode RGB, or uint8 in 0 to 255 or float in [0, 1] [..., 3, H, W]. Float
            images are rounded: of any type, bfloat16 too, they come back to the bytes that they
            were divided by 255 from.

    Raises:
        TypeError: Not 8-bit and not float.
        ValueError: Not RGB, a float image outside [0, 1] or not finite, or an empty batch.
    """
    if isinstance(image, PIL.Image.Image) and image.mode == "RGB":
        # By bands, because Pillow turns channels about faster than torch and numpy do.
        bands = np.stack([np.asarray(band) for band in image.split()])
        return OpenTiles(torch.from_numpy(bands)[None], lambda x, _: _merged(x))
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        _check_shape(image)
        flat = image.as_subclass(Tensor).reshape(-1, *image.shape[-3:])
        return OpenTiles(flat, lambda x, is_edited: _mixed(image, x, is_edited))
    grey, restore = open_image(image)
    return OpenTiles(
        grey.round().to(torch.uint8), lambda x, is_edited: restore(x.float(), is_edited)
    )


def _merged(tiles: Tensor) -> PIL.Image.Image:
    return PIL.Image.merge("RGB", [PIL.Image.fromarray(band) for band in tiles[0].cpu().numpy()])


def _check_shape(image: Tensor) -> None:
    if image.ndim >= 3 and image.shape[-3] != 3 and image.shape[-1] == 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [..., 3, H, W]: its channels "
            "come last; permute them to the front, as image.movedim(-1, -3)"
        )
    if image.ndim < 3 or image.shape[-3] != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [..., 3, H, W] RGB; "
            "repeat grey-scale channels, drop alpha, wrap a mask in tv_tensors.Mask"
        )
    if 0 in image.shape:
        raise ValueError(
            f"got an empty batch or image, {list(image.shape)}; expected at least one tile"
        )


def _mixed(image: Tensor, edited: Tensor, is_edited: Tensor) -> Tensor:
    """Return tiles [B, 3, H, W] where they were edited, else the image's own; as it is shaped."""
    plain = image.as_subclass(Tensor)
    if not is_edited.all():  # choosing takes longer than looking a tile up
        flat = plain.reshape(-1, *plain.shape[-3:])
        edited = torch.where(is_edited.to(flat.device)[:, None, None, None], edited, flat)
    edited = edited.reshape(plain.shape)
    if isinstance(image, tv_tensors.TVTensor):
        return tv_tensors.wrap(edited, like=image)
    return edited


def _open_pil(image: PIL.Image.Image) -> OpenImage:
    grey = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()

    def restore(edited: Tensor, is_edited: Tensor) -> Any:
        if not is_edited.any():
            return image
        array = edited[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        return PIL.Image.fromarray(array)

    return OpenImage(grey, restore)
