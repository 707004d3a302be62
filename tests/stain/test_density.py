import pytest
import torch

from cytosyn_aug.images import optical_density
from cytosyn_aug.stain.density import (
    MAX_GAIN,
    MIN_TISSUE,
    DensityMap,
    DensityMoments,
    apply_density_map,
    blend_with_identity,
    density_moments,
    is_tissue,
    match_moments,
    pool_moments,
    tissue_moments,
    tissue_weight,
)
from tests.support.synthetic import synthetic_tiles

F64 = torch.float64


def moments_of(x, weight=None):
    x = x.T[None, :, None]
    return density_moments(x, torch.ones_like(x[:, :1]) if weight is None else weight)


def test_moments_are_the_weighted_formulas():
    x, w = torch.rand(50, 3, dtype=F64), torch.rand(50, dtype=F64)
    got = moments_of(x, w[None, None, None])
    mean = (w[:, None] * x).sum(0) / w.sum()
    cov = torch.cov(x.T, aweights=w, correction=0)
    torch.testing.assert_close(got.mean[0], mean)
    torch.testing.assert_close(got.covariance[0], cov)


def test_pooled_moments_are_those_of_the_union():
    x = torch.rand(60, 3, dtype=F64)
    parts = [moments_of(x[:20]), moments_of(x[20:])]
    merged = DensityMoments(*(torch.cat(m) for m in zip(*parts, strict=True)))
    merged = merged._replace(tissue=torch.tensor([20.0, 40.0], dtype=F64))
    want = moments_of(x)
    got = pool_moments(merged)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.covariance, want.covariance)


def test_a_known_symmetric_map_is_recovered():
    torch.manual_seed(0)
    x = torch.rand(5000, 3, dtype=F64) + 0.3
    matrix = torch.tensor([[1.3, 0.1, 0.0], [0.1, 0.8, 0.05], [0.0, 0.05, 1.1]], dtype=F64)
    offset = torch.tensor([0.1, -0.05, 0.2], dtype=F64)
    found = match_moments(moments_of(x), moments_of(x @ matrix.T + offset))
    # The ridge of 1e-4 against variances of 0.08 leaves about 0.1 %.
    torch.testing.assert_close(found.matrix[0], matrix, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.offset[0], offset, atol=3e-3, rtol=0)


def test_moments_are_matched_whatever_the_pixels_do():
    """Shuffled pixels, where least squares would collapse to the mean."""
    x = torch.rand(4000, 3, dtype=F64)
    target = x[torch.randperm(4000)] * 0.7 + 0.2
    change = match_moments(moments_of(x), moments_of(target))
    mapped = x @ change.matrix[0].T + change.offset[0]
    torch.testing.assert_close(mapped.mean(0), target.mean(0))
    torch.testing.assert_close(torch.cov(mapped.T), torch.cov(target.T), atol=2e-4, rtol=0)


def test_equal_moments_give_the_identity():
    x = moments_of(torch.rand(100, 3, dtype=F64))
    change = match_moments(x, x)
    torch.testing.assert_close(change.matrix[0], torch.eye(3, dtype=F64))
    torch.testing.assert_close(change.offset[0], torch.zeros(3, dtype=F64))


def test_the_gain_is_bounded():
    x = torch.rand(100, 3, dtype=F64)
    change = match_moments(moments_of(x * 0.01), moments_of(x * 5))
    assert torch.linalg.eigvalsh(change.matrix[0]).max() <= MAX_GAIN + 1e-9


def test_the_weight_is_zero_on_glass_one_on_tissue_and_monotone():
    density = torch.linspace(0, 0.5, 101).view(1, 1, 1, -1).expand(1, 3, 1, 101)
    weight = tissue_weight(density).flatten()
    assert weight[density[0, 0, 0] <= 0.10].max() == 0
    assert weight[density[0, 0, 0] >= 0.25].min() == 1
    assert (weight.diff() >= 0).all()


def test_the_weight_falls_to_zero_from_dark_to_black():
    grey = torch.arange(61.0, -1, -1).view(1, 1, 1, -1).expand(1, 3, 1, 62).clone()
    grey[:, 0] /= 2  # the brightest channel decides
    weight = tissue_weight(optical_density(grey)).flatten()
    assert weight[:30].min() == 1  # 32 grey levels and more
    assert weight[46:].max() == 0  # 15 and less
    assert (weight.diff() <= 0).all()


def test_no_tissue_gives_finite_moments_and_no_weight():
    blank = tissue_moments(torch.full((1, 3, 16, 16), 250, dtype=torch.uint8))
    assert blank.tissue.item() == 0
    assert torch.isfinite(blank.mean).all()


def test_tissue_is_told_from_glass_in_any_number_type(tiles):
    glass = torch.full_like(tiles[:2], 243)
    glass[1] = 0  # beyond the edge of a slide
    mixed = torch.cat([tiles[:1], glass, tiles[1:2]])
    for images in (mixed, mixed.float(), mixed.double()):
        assert is_tissue(images).tolist() == [True, False, False, True]
    assert torch.equal(is_tissue(mixed), tissue_moments(mixed).tissue >= MIN_TISSUE)


def test_the_identity_leaves_every_pixel():
    tiles = synthetic_tiles(2)
    eye = DensityMap(torch.eye(3, dtype=F64).expand(2, 3, 3), torch.zeros(2, 3, dtype=F64))
    assert torch.equal(apply_density_map(tiles, eye).round().to(torch.uint8), tiles)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_blends_linearly(strength):
    change = DensityMap(torch.rand(1, 3, 3, dtype=F64), torch.rand(1, 3, dtype=F64))
    got = blend_with_identity(change, torch.tensor([strength]))
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(got.matrix[0], eye + strength * (change.matrix[0] - eye))
    torch.testing.assert_close(got.offset, strength * change.offset)
