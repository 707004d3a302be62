"""The decoder stage: features are compared with the autoencoder's decoder, not with the pixels."""

from dataclasses import replace

import torch
from conftest import random_parts, synthetic_tiles

from training.data import TileSet
from training.decoder import DecoderStage
from training.recipes import smoke_decoder


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
