"""The stain of tiles, and the change from it to a reference's."""

import pytest
import torch

from cytosyn_aug import EditRecipe, StainReference
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import apply_density_map, pool_moments, tissue_moments
from cytosyn_aug.stain.estimate import estimate_stain, reference_statistics
from cytosyn_aug.stain.restain import stain_change
from tests.support.synthetic import random_parts, synthetic_tiles

PIXELS_ONLY = EditRecipe(probe_share=0.0)
PROBE_ONLY = EditRecipe(probe_share=1.0)


@pytest.fixture
def other(generator):
    tiles = (255 - (255 - synthetic_tiles(3, seed=9).float()) * 0.8).round().to(torch.uint8)
    return StainReference.fit(generator, tiles)


def change_to(generator, tiles, reference, source, recipe):
    estimate = estimate_stain(generator, tiles, source, recipe)
    return stain_change(estimate, reference_statistics(generator, reference, recipe))


def test_a_tile_that_is_its_own_reference_stays(generator, tiles):
    reference = StainReference.fit(generator, tiles[:1])
    for recipe in (PIXELS_ONLY, PROBE_ONLY, EditRecipe()):
        change = change_to(generator, tiles[:1], reference, None, recipe)
        torch.testing.assert_close(change.matrix[0], torch.eye(3).double(), atol=2e-3, rtol=0)
        assert change.offset.abs().max() < 2e-3


def test_without_the_probe_moments_arrive_at_the_references(generator, tiles, other):
    change = change_to(generator, tiles, other, None, PIXELS_ONLY)
    moved = tissue_moments(apply_density_map(tiles, change))
    want = pool_moments(other.moments).mean
    before = (tissue_moments(tiles).mean - want).norm(dim=1)
    # The fade keeps the palest tissue back, so the mean arrives nearly, not exactly.
    assert ((moved.mean - want).norm(dim=1) < 0.35 * before).all()


def test_a_source_gives_all_tiles_the_same_change(generator, tiles, other):
    source = StainReference.fit(generator, tiles)
    change = change_to(generator, tiles, other, source, EditRecipe())
    assert torch.equal(change.matrix, change.matrix[:1].expand_as(change.matrix))
    own = change_to(generator, tiles, other, None, EditRecipe())
    assert not torch.allclose(own.matrix[0], own.matrix[1])


def test_the_probe_decides_as_much_as_its_share(generator, tiles, other):
    offsets = [
        change_to(generator, tiles, other, None, EditRecipe(probe_share=s)).offset
        for s in (0.0, 0.5, 1.0)
    ]
    assert not torch.allclose(offsets[0], offsets[2])
    assert not torch.allclose(offsets[0], offsets[1])


def test_a_model_without_probe_falls_back_on_pixels(tiles):
    with_probe, without = (
        TileGenerator(random_parts()),
        TileGenerator(random_parts()._replace(stain_probe=None)),
    )
    reference = StainReference.fit(with_probe, synthetic_tiles(2, seed=4))
    a = change_to(with_probe, tiles, reference, None, PIXELS_ONLY)
    b = change_to(without, tiles, reference, None, EditRecipe())
    torch.testing.assert_close(a.offset, b.offset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 0.0}, "noise_level is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"probe_share": 1.2}, "probe_share is 1.2"),
    ],
)
def test_bad_recipes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EditRecipe(**arguments)
