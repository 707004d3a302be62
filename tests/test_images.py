import numpy as np
import pytest
import torch

from cytosyn_aug.images import (
    check_image,
    density_to_grey,
    images_to_pixels,
    open_tiles,
    optical_density,
    pixels_to_images,
    sides_of,
    tile_key,
)

ALL_GREYS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)


def test_every_grey_level_survives_pixels_and_back():
    assert torch.equal(pixels_to_images(images_to_pixels(ALL_GREYS)), ALL_GREYS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_grey_level_survives_a_float_image_and_back(dtype):
    """In bfloat16 too: below 1 its steps are at most 1 / 256, and rounding errs by half of that."""
    for image in ((ALL_GREYS / 255).to(dtype), ALL_GREYS.to(dtype) / 255):
        assert torch.equal(open_tiles(image).tiles, ALL_GREYS)


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (torch.float32, 1.0000002, r"\[0\.0, 1\.0000002\]"),
        (torch.float64, 1 + 1e-12, r"\[0\.0, 1\.000000000001\]"),
        (torch.float32, -1e-9, r"\[-1e-09, 0\.0\]"),
        (torch.float16, 255.0, r"\[0\.0, 255\.0\]"),
        (torch.float32, torch.inf, r"\[0\.0, inf\]"),
    ],
)
def test_a_float_image_out_of_range_is_told_its_range_and_what_to_do(dtype, value, shown):
    image = torch.zeros(3, 8, 8, dtype=dtype)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"{shown}, expected \[0, 1\]; divide by 255.*clamp"):
        check_image(image)


@pytest.mark.parametrize("shape", [(8, 9, 3), (2, 8, 9, 3), (2, 2, 8, 9, 3)])
def test_channels_that_come_last_are_recognised(shape):
    for check in (check_image, open_tiles, sides_of):
        with pytest.raises(ValueError, match=r"come last; permute them.*movedim\(-1, -3\)"):
            check(torch.zeros(shape, dtype=torch.uint8))


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
