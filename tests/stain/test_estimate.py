import pytest
import torch

from cytosyn_aug import EditRecipe, StainReference
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import apply_density_map, pool_moments, tissue_moments
from cytosyn_aug.transforms.redraw import redraw, resample
from tests.support.synthetic import random_parts, synthetic_tiles
from training.evaluation.restaining import stain_change

PIXELS_ONLY = EditRecipe(probe_share=0.0)
PROBE_ONLY = EditRecipe(probe_share=1.0)


@pytest.fixture
def other(generator):
    tiles = (255 - (255 - synthetic_tiles(3, seed=9).float()) * 0.8).round().to(torch.uint8)
    return StainReference.fit(generator, tiles)


def test_a_tile_that_is_its_own_reference_stays(generator, tiles):
    reference = StainReference.fit(generator, tiles[:1])
    for recipe in (PIXELS_ONLY, PROBE_ONLY, EditRecipe()):
        change = stain_change(generator, tiles[:1], reference, None, recipe)
        torch.testing.assert_close(change.matrix[0], torch.eye(3).double(), atol=2e-3, rtol=0)
        assert change.offset.abs().max() < 2e-3


def test_without_the_probe_moments_arrive_at_the_references(generator, tiles, other):
    change = stain_change(generator, tiles, other, None, PIXELS_ONLY)
    moved = tissue_moments(apply_density_map(tiles, change))
    want = pool_moments(other.moments).mean
    before = (tissue_moments(tiles).mean - want).norm(dim=1)
    # The fade keeps the palest tissue back, so the mean arrives nearly, not exactly.
    assert ((moved.mean - want).norm(dim=1) < 0.35 * before).all()


def test_a_source_gives_all_tiles_the_same_change(generator, tiles, other):
    source = StainReference.fit(generator, tiles)
    change = stain_change(generator, tiles, other, source, EditRecipe())
    assert torch.equal(change.matrix, change.matrix[:1].expand_as(change.matrix))
    own = stain_change(generator, tiles, other, None, EditRecipe())
    assert not torch.allclose(own.matrix[0], own.matrix[1])


def test_the_probe_decides_as_much_as_its_share(generator, tiles, other):
    offsets = [
        stain_change(generator, tiles, other, None, EditRecipe(probe_share=s)).offset
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
    a = stain_change(with_probe, tiles, reference, None, PIXELS_ONLY)
    b = stain_change(without, tiles, reference, None, EditRecipe())
    torch.testing.assert_close(a.offset, b.offset)


def test_redrawing_depends_on_seed_and_noise_level(generator, tiles):
    a, b, c = (
        redraw(generator, tiles, EditRecipe(steps=2), seeds).images
        for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8])
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("function", ["redraw", "resample"])
def test_networks_never_see_blank_tiles(generator, tiles, function, monkeypatch):
    mixed = tiles.clone()
    mixed[[0, 2]] = 243
    seen = []
    for name in ("cls_features", "draw", "decode_pixels"):
        original = getattr(generator, name)
        monkeypatch.setattr(
            generator, name, lambda x, *a, _f=original, **k: seen.append(len(x)) or _f(x, *a, **k)
        )

    def edit(images, seeds):
        if function == "redraw":
            return redraw(generator, images, EditRecipe(steps=2), seeds)
        return resample(generator, images, seeds, steps=2)

    made = edit(mixed, [1, 2, 3, 4])
    assert set(seen) == {2}
    assert torch.equal(made.images[::2], mixed[::2])
    assert made.is_finite.all()
    assert torch.equal(made.images[1::2], edit(mixed[1::2], [2, 4]).images)
    seen.clear()
    blank = torch.full_like(tiles, 255)
    assert torch.equal(edit(blank, [1, 2, 3, 4]).images, blank)
    assert not seen


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
