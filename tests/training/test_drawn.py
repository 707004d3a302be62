"""Losses on drawn tiles: zero for tiles as they should be, gradients to the student alone."""

from dataclasses import replace

import pytest
import torch
from conftest import random_parts

from cytosyn_aug.small_decoder import SmallDecoder
from training.drawn import DrawnTiles
from training.recipes import smoke_distil, tiny_drawn_distil

RECIPE = replace(tiny_drawn_distil().drawn, forwards=(1,), crop_px=64, perceptual_stages=3)


class KnowsTheEnd(torch.nn.Module):
    """A student that jumps from noise to given latents, whatever it is asked."""

    def __init__(self, noise, end):
        super().__init__()
        self.u = torch.nn.Parameter(noise - end)

    def forward(self, x, t, condition, r, guidance):
        return self.u

    def unwhiten(self, latents):
        return latents


@pytest.fixture(scope="module")
def parts():
    parts = random_parts()
    return parts._replace(decoder=SmallDecoder(widths=(16, 16, 16), num_blocks=(1, 1, 1)))


def measure(parts, made, real):
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    student = KnowsTheEnd(noise, made)
    drawn = DrawnTiles(RECIPE, parts.decoder, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    condition = torch.zeros(len(real), 24)
    return student, drawn, drawn.texture(student, real, noise, condition, torch.ones(2), draw)


def test_tiles_as_they_should_be_have_no_loss_and_others_do(parts):
    latents = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    assert measure(parts, latents, latents)[2].item() == pytest.approx(0, abs=1e-5)
    assert measure(parts, 3 * latents, latents)[2].item() > 1e-3


def test_where_things_are_does_not_matter_as_much_as_how_they_look(parts):
    """Mirrored latents lose less than latents of another contrast."""
    latents = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    mirrored = measure(parts, latents.flip(-1), latents)[2].item()
    assert mirrored < measure(parts, 3 * latents, latents)[2].item() / 4


def test_gradients_reach_the_student_alone(parts):
    latents = torch.randn(2, 4, 14, 14)
    student, drawn, found = measure(parts, latents, 2 * latents)
    found.backward()
    assert student.u.grad.abs().max() > 0
    for part in (drawn.decoder, drawn.perception):
        assert all(p.grad is None for p in part.parameters())


def test_a_recipe_of_no_forwards_is_refused():
    with pytest.raises(ValueError, match="expected 1 or more"):
        replace(RECIPE, forwards=(0,))


def test_only_the_second_part_of_tiny_looks_at_drawn_tiles():
    assert smoke_distil().drawn is None
    first, second = replace(tiny_drawn_distil(), drawn=None), tiny_drawn_distil()
    assert first.decoupled_depth == second.decoupled_depth
    assert second.batch_size % second.drawn.row_stride == 0
