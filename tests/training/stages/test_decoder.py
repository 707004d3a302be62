"""The decoder stage: features are compared with the autoencoder's decoder, not with the pixels."""

from dataclasses import replace

import pytest
import torch

from tests.support.synthetic import random_parts, synthetic_tiles
from training.costs import count_flop
from training.data.batches import TileSet
from training.recipes import smoke_decoder, xl_decoder, xl_vae
from training.stages.decoder import DecoderStage, build_decoder
from training.stages.vae import build_vae


class Twin(torch.nn.Module):
    """The autoencoder's own decoder in the place of the small one."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents).sample


def test_the_autoencoders_decoder_has_nothing_to_learn_but_pixels():
    tiles = TileSet(synthetic_tiles(4), ("a",), torch.zeros(4, dtype=torch.int64))
    vae = random_parts().vae.eval()
    recipe = replace(smoke_decoder(), batch_size=2, crop_px=64)
    stage = DecoderStage(recipe, tiles, tiles, vae, torch.device("cpu"))
    stage.network = Twin(stage.vae)
    losses = stage.losses(0, slice(0, 2), stage.read(0, slice(0, 2)))
    assert losses["l1"] > 0.05
    for name in ("teacher", "perceptual", "texture"):
        assert losses[name] < 1e-4, name


def test_a_tile_costs_a_tenth_of_what_the_published_decoder_does():
    """Of 28x28 latents; the tiny one is compared with its own in test_small_decoder."""
    with torch.device("meta"):
        latents = torch.zeros(1, 4, 28, 28)
        small, own = build_decoder(xl_decoder(), 4), build_vae(xl_vae()).decoder
        small_flop, own_flop = count_flop(small, latents), count_flop(own, latents)
    assert own_flop == pytest.approx(476e9, rel=0.01)
    assert 10 * small_flop < own_flop
