import pytest
import torch

from cytosyn_aug.model.decoder import SmallDecoder


def test_latents_become_pixels_of_eight_times_their_side_for_any_grid():
    decoder = SmallDecoder(widths=(16, 16, 16), num_blocks=(1, 1, 1))
    assert decoder(torch.randn(2, 4, 28, 28)).shape == (2, 3, 224, 224)
    assert decoder(torch.randn(1, 4, 5, 7)).shape == (1, 3, 40, 56)


def test_a_latent_reaches_its_own_neighbourhood_only():
    """Shifted latents give shifted pixels, so a crop teaches what a tile needs."""
    torch.manual_seed(0)
    decoder = SmallDecoder(widths=(16, 16, 16), num_blocks=(1, 1, 1))
    for parameter in decoder.parameters():  # the blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    latents = torch.randn(1, 4, 24, 24)
    whole = decoder(latents)
    moved = decoder(latents.roll((2, 2), (2, 3)))
    inner = slice(80, 112)
    torch.testing.assert_close(
        moved[..., inner, inner], whole.roll((16, 16), (2, 3))[..., inner, inner]
    )


@pytest.mark.slow
def test_a_tile_costs_a_third_of_what_tinys_own_decoder_does():
    from torch.utils.flop_counter import FlopCounterMode

    from cytosyn_aug.model.generator import TileGenerator
    from training.recipes import tiny_decoder
    from training.stages.decoder import build_decoder

    flop = []
    generator = TileGenerator.from_pretrained()
    for decoder in (build_decoder(tiny_decoder(), 4), generator.vae.decoder):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(torch.zeros(1, 4, 28, 28))
        flop.append(counter.get_total_flops())
    assert 3 * flop[0] < flop[1]
