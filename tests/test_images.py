import numpy as np
import pytest
import torch

from cytosyn_aug.images import (
    density_to_grey,
    images_to_pixels,
    optical_density,
    pixels_to_images,
    tile_key,
)

ALL_GREYS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)


def test_every_grey_level_survives_pixels_and_back():
    assert torch.equal(pixels_to_images(images_to_pixels(ALL_GREYS)), ALL_GREYS)


def test_every_grey_level_survives_optical_density_and_back():
    back = density_to_grey(optical_density(ALL_GREYS)).round().to(torch.uint8)
    assert torch.equal(back, ALL_GREYS)


def test_pixels_are_rounded_not_truncated():
    assert pixels_to_images(torch.tensor([[[[100.6 / 127.5 - 1]]]])).item() == 101


def test_density_of_white_is_zero_and_grey_is_the_written_formula():
    assert optical_density(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).abs().max() == 0
    got = optical_density(torch.full((1, 3, 1, 1), 127, dtype=torch.uint8))
    np.testing.assert_allclose(got.numpy(), -np.log(128 / 256), rtol=1e-6)


def test_tile_key_depends_on_pixels_and_shape_only():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    strided = torch.stack([image, image], -1)[..., 0]
    assert tile_key(image) == tile_key(strided)
    changed = image.clone()
    changed[0, 0, 0] ^= 1
    assert tile_key(image) != tile_key(changed)
    assert tile_key(image.reshape(3, 4, 16)) != tile_key(image)


def test_tile_key_refuses_floats():
    with pytest.raises(TypeError, match="uint8"):
        tile_key(torch.zeros(3, 8, 8))
