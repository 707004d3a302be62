"""Macenko's stains: given back in closed form, equal to torchstain's, safe on blank tiles."""

import numpy as np
import pytest
import torch

from cytosyn_aug import MacenkoNormalize, MacenkoReference
from cytosyn_aug.images import density_to_grey, optical_density
from cytosyn_aug.stain.density import apply_density_map
from cytosyn_aug.stain.macenko import _OFFSET, WHITE, Stains, estimate_stains, normalising_map
from tests.support.synthetic import synthetic_tiles

HAEMATOXYLIN = torch.tensor([0.65, 0.70, 0.29], dtype=torch.float64)
EOSIN = torch.tensor([0.27, 0.91, 0.32], dtype=torch.float64)


def two_stains(first, second, seed=0, side=96, strength=1.0):
    """Optical density of a tile of two stains; pure pixels of both are a fifth of it each."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0.7, 1.6, (2, side * side)) * strength
    kind = rng.integers(0, 5, side * side)
    amounts[0, kind == 0] = 0
    amounts[1, kind == 1] = 0
    vectors = torch.stack([first / first.norm(), second / second.norm()], 1)
    density = vectors @ torch.from_numpy(amounts)
    return density.view(1, 3, side, side), vectors, torch.from_numpy(amounts)


def full_tiles(num):
    """Synthetic tiles without glass, on which all pixels are tissue to Macenko too."""
    made = [
        two_stains(HAEMATOXYLIN, EOSIN, seed=k, side=64, strength=0.6 + 0.1 * k)[0]
        for k in range(num)
    ]
    noise = torch.from_numpy(np.random.default_rng(9).normal(0, 0.01, (num, 3, 64, 64)))
    return density_to_grey(torch.cat(made) + noise + _OFFSET).round().to(torch.uint8)


def test_known_stains_are_given_back():
    density, vectors, amounts = two_stains(HAEMATOXYLIN, EOSIN)
    stains = estimate_stains((density + _OFFSET).float())
    torch.testing.assert_close(stains.vectors[0], vectors, atol=2e-4, rtol=0)
    # Nearest rank, so no interpolation.
    want = torch.stack([torch.quantile(a, 0.99, interpolation="nearest") for a in amounts])
    torch.testing.assert_close(stains.concentrations[0], want, atol=2e-3, rtol=0)
    assert stains.is_sound.all()


def test_the_order_of_the_stains_does_not_matter():
    density, vectors, _ = two_stains(EOSIN, HAEMATOXYLIN)
    stains = estimate_stains((density + _OFFSET).float())
    torch.testing.assert_close(stains.vectors[0], vectors.flip(1), atol=2e-4, rtol=0)


def test_a_tile_arrives_at_the_stains_of_its_reference():
    other = torch.tensor([0.55, 0.78, 0.40], dtype=torch.float64)
    pink = torch.tensor([0.15, 0.80, 0.45], dtype=torch.float64)
    source, _, amounts = two_stains(HAEMATOXYLIN, EOSIN)
    _, vectors, _ = two_stains(other, pink)
    concentrations = torch.tensor([[1.2, 1.0]], dtype=torch.float64)
    target = Stains(vectors[None], concentrations, torch.ones(1, dtype=torch.bool))
    stains = estimate_stains((source + _OFFSET).float())
    out = apply_density_map(density_to_grey(source + _OFFSET), normalising_map(stains, target))
    scaled = amounts * (concentrations[0] / stains.concentrations[0])[:, None]
    want = density_to_grey((vectors @ scaled).view_as(source) + _OFFSET)
    assert (out - want).abs().max() < 0.2


def test_it_gives_what_torchstain_gives():
    macenko = pytest.importorskip("torchstain.torch.normalizers.macenko")
    tiles = full_tiles(6)
    theirs = macenko.TorchMacenkoNormalizer()
    theirs.fit(tiles[5])
    reference = MacenkoReference.fit(tiles[5:])
    torch.testing.assert_close(
        torch.tensor([reference.haematoxylin, reference.eosin]).T, theirs.HERef, atol=2e-4, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor(reference.concentrations), theirs.maxCRef, atol=1e-3, rtol=0
    )
    ours = MacenkoNormalize(reference)(tiles)
    for k, tile in enumerate(tiles):
        want = theirs.normalize(tile, stains=False)[0].permute(2, 0, 1)
        # Theirs is one level brighter (it forgets the one it added) and cut, ours is rounded.
        assert ((ours[k].int() + 1) - want).abs().max() <= 1
        # On average nothing is left of that but the float32 of their statistics.
        assert ((ours[k].float() + 0.5) - want).mean().abs() < 0.25


def test_many_tiles_are_fitted_as_one():
    tiles = full_tiles(4)
    union = torch.cat(list(tiles), 2)[None]
    a, b = MacenkoReference.fit(tiles), MacenkoReference.fit(union)
    for name in ("haematoxylin", "eosin", "concentrations"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-6)


def test_a_source_changes_all_tiles_of_a_slide_alike():
    tiles = full_tiles(4)
    reference = MacenkoReference.fit(synthetic_tiles(3, seed=5))
    normalise = MacenkoNormalize(reference, source=MacenkoReference.fit(tiles))
    together = normalise(tiles)
    assert torch.equal(torch.stack([normalise(t) for t in tiles]), together)
    # The same colour becomes the same colour, whichever tile it stands in.
    colours = {}
    for before, after in zip(tiles.unbind(), together.unbind(), strict=True):
        pairs = zip(before.flatten(1).T.tolist(), after.flatten(1).T.tolist(), strict=True)
        for old, new in pairs:
            assert colours.setdefault(tuple(old), new) == new
    assert not torch.equal(MacenkoNormalize(reference)(tiles), together)


def test_what_tells_no_stain_comes_back_as_it_is():
    """The tiles on which others raise, or paint tissue where there is none."""
    normalise = MacenkoNormalize(MacenkoReference.fit(full_tiles(2)))
    white = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
    sparse = white.clone()
    sparse[..., 100:110, 100:110] = torch.tensor([120, 60, 140], dtype=torch.uint8).view(3, 1, 1)
    one_colour = white.clone()
    one_colour[:] = torch.tensor([180, 110, 170], dtype=torch.uint8).view(3, 1, 1)
    for image in (white, white - 12, white * 0, sparse, one_colour):
        assert normalise(image) is image


def test_one_blank_tile_does_not_cost_the_others():
    tiles = full_tiles(3)
    normalise = MacenkoNormalize(MacenkoReference.fit(tiles[:1]))
    mixed = tiles.clone()
    mixed[1] = 255
    out = normalise(mixed)
    assert torch.equal(out[[0, 2]], normalise(tiles)[[0, 2]])
    assert torch.equal(out[1], mixed[1])


def test_blank_tiles_cannot_be_fitted():
    with pytest.raises(ValueError, match="do not show two stains that differ"):
        MacenkoReference.fit(torch.full((2, 3, 64, 64), 250, dtype=torch.uint8))


def test_optical_density_is_theirs_but_for_white():
    grey = torch.arange(256).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    theirs = -torch.log((grey.float() + 1) / WHITE)
    torch.testing.assert_close(optical_density(grey) - _OFFSET, theirs, atol=1e-6, rtol=0)
