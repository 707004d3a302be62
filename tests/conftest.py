"""A small random model of the same classes, and synthetic H&E tiles; no data, no network."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from cytosyn_aug.checkpoint import ModelParts, load_model, save_model
from cytosyn_aug.config import TileSpec
from cytosyn_aug.encoder import StainProbe, TileEncoder
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.transformer import SiT

SIZE = 112


def synthetic_tiles(num, seed=0, size=SIZE):
    """Purple blobs on a pink ground with a band of glass: uint8 [num, 3, size, size]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    tiles = []
    for _ in range(num):
        haematoxylin = np.zeros((size, size))
        for cy, cx in rng.uniform(8, size - 8, (12, 2)):
            haematoxylin += 0.9 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 12)
        eosin = 0.8 + 0.2 * np.sin(x / 5 + rng.uniform(0, 6))
        density = haematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [
            0.07,
            0.99,
            0.11,
        ]
        density[:, : size // 7] = 0
        noise = rng.normal(0, 0.01, density.shape)
        tiles.append(np.clip(256 * np.exp(-(density + noise)) - 1, 0, 255).round())
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).to(torch.uint8)


def random_parts(seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    encoder = TileEncoder(
        input_px=SIZE, embed_dim=24, depth=2, num_heads=2, mlp_ratio=4.0, init_values=None
    )
    transformer = SiT(
        input_size=SIZE // 8,
        hidden_size=32,
        depth=2,
        num_heads=2,
        conditioning_dim=24,
        encoder_depth=1,
        z_dims=(),
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    probe = StainProbe(conditioning_dim=24)
    probe.shift.copy_(torch.tensor([0.4, 0.9, 0.3, 0.2, 0.1, 0.0, 0.3, 0.1, 0.1]))
    probe.scale.fill_(0.05)
    return ModelParts(vae, transformer, encoder, probe, TileSpec(size_px=SIZE), digest="")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, random_parts(), torch.float32)
    return folder


@pytest.fixture(scope="session")
def generator(model_folder):
    return TileGenerator(load_model(model_folder))


@pytest.fixture
def tiles():
    return synthetic_tiles(4)
