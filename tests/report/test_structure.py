"""Structure scores: 1 for a change of stain, far less for anything that moves."""

import pytest
import torch

from cytosyn_aug.images import density_to_grey, optical_density
from cytosyn_aug.report.structure import gradient_correlation
from tests.support.synthetic import synthetic_tiles

TILES = synthetic_tiles(3)


def test_a_tile_has_its_own_structure():
    assert torch.allclose(gradient_correlation(TILES, TILES), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("gain", [0.5, 0.8, 1.3])
def test_stronger_and_weaker_stain_keep_structure(gain):
    stained = density_to_grey(gain * optical_density(TILES)).round().to(torch.uint8)
    # Linear in optical density, so exactly 1 but for rounding to grey levels.
    assert gradient_correlation(TILES, stained).min() > 0.998


def test_moved_by_two_pixels_structure_is_lost():
    assert gradient_correlation(TILES, TILES.roll(2, 3)).max() < 0.6


def test_other_tissue_is_unrelated_and_a_negative_is_opposite():
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    noise = noise.to(torch.uint8)
    assert gradient_correlation(noise[:1], noise[1:]).abs().max() < 0.05
    turned = density_to_grey(4.0 - optical_density(TILES)).round().to(torch.uint8)
    assert gradient_correlation(TILES, turned).max() < -0.9


def test_a_flat_tile_tells_nothing_and_another_shape_is_refused():
    flat = torch.full_like(TILES, 200)
    assert gradient_correlation(TILES, flat).isnan().all()
    with pytest.raises(ValueError, match="expected one"):
        gradient_correlation(TILES, TILES[..., :-1])


def test_gradients_down_count_as_those_across():
    wave = 0.3 * torch.sin(torch.arange(64) / 3)
    rows, columns = wave[:, None].expand(64, 64), wave.expand(64, 64)

    def stained(density):
        grey = 256 * torch.exp(-(density + 1)) - 1
        return grey.round().to(torch.uint8).expand(1, 3, 64, 64)

    both = stained(rows + columns)
    for one in (rows, columns):
        assert gradient_correlation(stained(one), both).item() == pytest.approx(0.5**0.5, abs=0.01)
