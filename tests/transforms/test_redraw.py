"""Tiles drawn anew: by seed and noise level, and blank ones never."""

import pytest
import torch

from cytosyn_aug import EditRecipe
from cytosyn_aug.transforms.redraw import redraw, resample


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
