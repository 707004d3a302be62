"""Reinhard in Lab: scikit-image's numbers, a case by hand, glass left alone."""

import pytest
import torch

from cytosyn_aug import ReinhardNormalize, ReinhardReference
from cytosyn_aug.stain.lab import grey_to_lab, lab_to_grey
from cytosyn_aug.stain.reinhard import lab_moments, pool_lab_moments
from tests.support.synthetic import synthetic_tiles


def test_lab_is_scikit_images():
    color = pytest.importorskip("skimage.color")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=generator)
    images[0, :, :2] = 0  # the linear parts of both curves
    images[0, :, 2:4] = 5
    want = color.rgb2lab(images.permute(0, 2, 3, 1).numpy())
    got = grey_to_lab(images)
    torch.testing.assert_close(
        got.permute(0, 2, 3, 1).double(), torch.from_numpy(want), atol=2e-2, rtol=0
    )
    assert (lab_to_grey(got) - images).abs().max() < 0.1


def test_mean_and_deviation_arrive_at_the_references():
    tiles, other = synthetic_tiles(2), synthetic_tiles(3, seed=5)
    darker = (other.float() * 0.85).round().to(torch.uint8)
    reference = ReinhardReference.fit(darker)
    out = ReinhardNormalize(reference)(tiles)
    weight = torch.ones(2, 1, *tiles.shape[2:])
    weight[..., : tiles.shape[3] // 7 + 2] = 0  # glass, and what the fade holds back beside it
    before, after = (lab_moments(grey_to_lab(x), weight).mean for x in (tiles, out))
    want = torch.tensor(reference.mean)
    assert ((after - want).norm(dim=1) < 0.15 * (before - want).norm(dim=1)).all()


def test_a_case_by_hand():
    """Half of the tile has one colour, half another; the reference shifts and stretches them."""
    tile = torch.empty(1, 3, 8, 8, dtype=torch.uint8)
    tile[..., :4] = torch.tensor([150, 80, 140]).view(3, 1, 1)
    tile[..., 4:] = torch.tensor([190, 120, 170]).view(3, 1, 1)
    lab = grey_to_lab(tile)[0, :, 0].double()
    middle, half = (lab[:, 0] + lab[:, 7]) / 2, (lab[:, 7] - lab[:, 0]).abs() / 2
    moments = lab_moments(grey_to_lab(tile), torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(moments.mean[0], middle, atol=1e-4, rtol=0)
    torch.testing.assert_close(moments.deviation[0], half, atol=1e-4, rtol=0)
    wanted = ReinhardReference(
        mean=tuple((middle + torch.tensor([-3.0, 1.0, 2.0])).tolist()),
        deviation=tuple((1.5 * half).tolist()),
        num_tiles=1,
    )
    out = grey_to_lab(ReinhardNormalize(wanted)(tile / 255) * 255)[0, :, 0].double()
    want = middle + torch.tensor([-3.0, 1.0, 2.0]) + 1.5 * (lab[:, 0] - middle)
    gain_is_bounded = half > 0.5  # a channel that hardly varies is moved, not stretched
    torch.testing.assert_close(out[gain_is_bounded, 0], want[gain_is_bounded], atol=0.05, rtol=0)


def test_pooled_moments_are_those_of_the_union():
    tiles = synthetic_tiles(3)
    weight = torch.ones(3, 1, *tiles.shape[2:])
    image, its_weight = (torch.cat(list(x), 1)[None] for x in (tiles, weight))
    pooled = pool_lab_moments(lab_moments(grey_to_lab(tiles), weight))
    union = lab_moments(grey_to_lab(image), its_weight)
    torch.testing.assert_close(pooled.mean, union.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled.deviation, union.deviation, atol=1e-4, rtol=0)


def test_glass_of_a_tissue_tile_stays():
    tiles = synthetic_tiles(2)
    glass = (tiles > 250).all(1, keepdim=True).expand_as(tiles)
    out = ReinhardNormalize(ReinhardReference.fit(synthetic_tiles(1, seed=5)))(tiles)
    assert torch.equal(out[glass], tiles[glass])
    assert not torch.equal(out, tiles)


def test_a_tile_of_one_colour_is_moved_not_stretched():
    tile = torch.tensor([180, 110, 170], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    noisy = tile.clone()
    noisy[0, 0, 3, 3] += 1
    reference = ReinhardReference.fit(synthetic_tiles(1, seed=5))
    out = ReinhardNormalize(reference)(noisy)
    assert (out.float().std((2, 3)) < 1).all()
