"""One restain: the loop, data sets, slides and training's comparison give the same grey levels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cytosyn_aug import (
    EditRecipe,
    StainNormalize,
    StainReference,
    StainTransfer,
    StainViews,
    offline,
)
from cytosyn_aug.stain.colour_table import ColourTable
from cytosyn_aug.stain.estimate import reference_statistics
from cytosyn_aug.stain.methods import recolour_to
from cytosyn_aug.stain.restain import restain
from tests.support.offline_runs import QUIET, read, rows
from tests.support.synthetic import save_tile, synthetic_tiles
from training.evaluation.restaining import stain_method

RECIPE = EditRecipe()


@pytest.fixture(scope="module")
def reference(small, laboratories):
    return StainReference.fit(small, laboratories[0])


def restained(generator, images, reference, strength=1.0, **changes):
    settings = {"mpp": 0.5, "source": None, "recipe": RECIPE} | changes
    targets = reference_statistics(generator, reference, RECIPE)
    return restain(generator, images, targets, torch.full((len(images),), strength), **settings)


def test_loop_data_set_slide_and_comparison_agree_to_the_grey_level(
    small, reference, laboratories, tmp_path
):
    """With the statistics of the slide, every way gives what the one function gives."""
    tiles = synthetic_tiles(5, seed=3)
    for k, tile in enumerate(tiles):
        save_tile(tmp_path / "in" / f"slide7_{k}_0.png", tile)
    source = StainReference.fit(small, tiles)
    expected = restained(small, tiles, reference, source=source).images.round().to(torch.uint8)
    assert (expected.int() - tiles.int()).abs().max() > 10

    loop = StainNormalize(small, reference, source=source)(tiles)
    assert torch.equal(loop, expected)

    out = tmp_path / "out"
    settings = {"reference": laboratories[0], "stain_source": "slide", "work": QUIET}
    offline.normalize(tmp_path / "in", out, small, **settings)
    written = torch.stack([read(out / row["output"]) for row in rows(out)])
    assert (written.int() - expected.int()).abs().max() <= 1  # batches of another shape round so

    change = recolour_to(reference, source, generator=small, edit=RECIPE, strength=1.0)
    table = ColourTable(change)
    for tile, expect in zip(tiles, expected, strict=True):
        pixels, _ = table.look_up(np.ascontiguousarray(tile.permute(1, 2, 0).numpy()))
        assert np.array_equal(pixels, expect.permute(1, 2, 0).numpy())

    compared = stain_method(small, RECIPE.probe_share, by_slide=True)
    other = torch.stack([read(f) for f in sorted(Path(laboratories[0]).glob("*.png"))])
    assert torch.equal(compared(tiles, other), expected)


def test_loop_views_and_data_set_agree_where_each_tile_stands_alone(
    small, reference, laboratories, tmp_path
):
    tiles = synthetic_tiles(4, seed=5)
    tiles[2] = 250  # blank
    for k, tile in enumerate(tiles):
        save_tile(tmp_path / "in" / f"{k}.png", tile)
    expected = restained(small, tiles, reference, strength=0.5)
    assert expected.is_edited.tolist() == expected.is_tissue.tolist() == [True, True, False, True]
    images = expected.images.round().to(torch.uint8)
    assert torch.equal(images[2], tiles[2])

    transfer = StainTransfer(small, [reference], strength=0.5, p=1.0)
    assert torch.equal(transfer(tiles), images)
    views = StainViews(small, [reference], strength=0.5, has_original=True)
    assert torch.equal(views(tiles)[1], images)

    out, settings = tmp_path / "out", {"strength": (0.5, 0.5), "work": QUIET}
    offline.augment(tmp_path / "in", out, small, references=laboratories[:1], **settings)
    written = torch.stack([read(out / row["output"]) for row in rows(out)])
    assert (written.int() - images.int()).abs().max() <= 1


def test_slides_are_known_for_some_tiles_only(small, reference):
    tiles = synthetic_tiles(3, seed=6)
    source = StainReference.fit(small, synthetic_tiles(4, seed=7))
    mixed = restained(small, tiles, reference, source=[source, None, source]).images
    by_slide = restained(small, tiles, reference, source=source).images
    alone = restained(small, tiles, reference).images
    assert torch.equal(mixed[[0, 2]], by_slide[[0, 2]])
    torch.testing.assert_close(mixed[1], alone[1])
    assert (by_slide[1] - alone[1]).abs().max() > 1


def test_known_features_stand_for_the_encoder(small, reference, monkeypatch):
    tiles = synthetic_tiles(3, seed=8)
    tiles[1] = 250
    cls = small.features(tiles).cls
    expected = restained(small, tiles, reference).images
    monkeypatch.setattr(small, "cls_features", lambda images: pytest.fail("asked the encoder"))
    torch.testing.assert_close(restained(small, tiles, reference, features=cls).images, expected)


def test_a_tile_that_the_encoder_fails_on_keeps_its_values_and_no_other_changes(small, reference):
    tiles = synthetic_tiles(3, seed=9)
    cls = small.features(tiles).cls
    expected = restained(small, tiles, reference, features=cls)
    cls = cls.clone()
    cls[1] = torch.nan
    got = restained(small, tiles, reference, features=cls)
    assert got.is_finite.tolist() == [True, False, True]
    assert torch.equal(got.images[1], tiles[1].float())
    assert torch.equal(got.images[::2], expected.images[::2])


def test_a_run_under_autocast_writes_what_it_writes_without(small, laboratories, tmp_path):
    for k, tile in enumerate(synthetic_tiles(2, seed=11)):
        save_tile(tmp_path / "in" / f"{k}.png", tile)
    written = []
    for name, is_enabled in (("plain", False), ("autocast", True)):
        out, settings = tmp_path / name, {"references": laboratories[:1], "work": QUIET}
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            offline.augment(tmp_path / "in", out, small, **settings)
        written.append([read(out / row["output"]) for row in rows(out)])
    assert len(written[0]) == 2
    for plain, under_autocast in zip(*written, strict=True):
        assert torch.equal(plain, under_autocast)


def test_callers_autocast_and_gradients_change_nothing(small, reference):
    tiles = synthetic_tiles(2, seed=10)
    expected = restained(small, tiles, reference).images
    with torch.autocast("cpu", torch.bfloat16):
        got = restained(small, tiles, reference).images
    assert torch.equal(got, expected)
    assert not got.requires_grad
