"""Tissue colours: stains come apart as they were mixed, and glass counts as nothing."""

import numpy as np
import pytest
import torch

from cytosyn_aug.images import density_to_grey
from cytosyn_aug.report.tissue_colours import (
    EOSIN,
    HAEMATOXYLIN,
    MAX_SIDE,
    ColourDistribution,
    as_images,
    colour_of_grey,
    rgb_of_lab,
    stain_amounts,
)
from tests.support.synthetic import synthetic_tiles


def mixed(haematoxylin, eosin, size=16):
    """Return a tile of one colour: these amounts of the two stains."""
    vectors = torch.tensor([HAEMATOXYLIN, EOSIN])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    density = haematoxylin * vectors[0] + eosin * vectors[1]
    return density[None, :, None, None].expand(1, 3, size, size)


@pytest.mark.parametrize(("haematoxylin", "eosin"), [(0.8, 0.0), (0.0, 0.7), (1.1, 0.4)])
def test_stains_come_apart_as_they_were_mixed(haematoxylin, eosin):
    amounts = stain_amounts(mixed(haematoxylin, eosin))[0, :, 3, 3]
    assert amounts.tolist() == pytest.approx([haematoxylin, eosin], abs=1e-5)


def test_a_tile_of_one_colour_has_that_mean_and_one_bin():
    pixels = density_to_grey(mixed(1.1, 0.4)).round().to(torch.uint8)
    found = ColourDistribution()
    found.add(pixels[0].permute(1, 2, 0).numpy())
    mean = found.mean()
    # Half a grey level is 0.004 of optical density at this darkness, and amplified by unmixing.
    assert (mean["H"], mean["E"]) == pytest.approx((1.1, 0.4), abs=0.02)
    for histogram in found.histograms.values():
        assert histogram.counts.max() == pytest.approx(1.0)


def test_each_tile_counts_alike_and_blank_ones_as_nothing():
    found = ColourDistribution()
    small, large = (synthetic_tiles(1, size=size)[0].permute(1, 2, 0).numpy() for size in (96, 192))
    for pixels in (small, large, np.full((64, 64, 3), 250, np.uint8)):
        found.add(pixels)
    assert len(found.tiles) == 2
    for histogram in found.histograms.values():
        assert histogram.total == pytest.approx(2.0)


def test_white_and_a_colour_and_back():
    white = colour_of_grey((255.0, 255.0, 255.0))
    assert white["L*"] == pytest.approx(100, abs=0.01)
    assert [white[axis] for axis in ("a*", "b*", "H", "E")] == pytest.approx([0] * 4, abs=0.05)
    assert rgb_of_lab(colour_of_grey((186.0, 112.0, 170.0))) == (186, 112, 170)


def test_of_large_images_the_centre_is_measured():
    pixels = np.zeros((MAX_SIDE + 100, MAX_SIDE + 200, 3), np.uint8)
    pixels[50:-50, 100:-100] = 200
    assert as_images(pixels).shape == (1, 3, MAX_SIDE, MAX_SIDE)
    assert (as_images(pixels) == 200).all()
