"""Runs, as functions that return frozen configurations. One name is one run, complete."""

from __future__ import annotations

from training.encoder import EncoderRecipe
from training.loop import LoopConfig
from training.vae import VaeRecipe


def tiny_vae() -> VaeRecipe:
    """Return the autoencoder of `tiny`: 3.1 M parameters, 3.5 GFLOP to encode a tile.

    Must reach 23 dB per tile and 32 dB on 8x8-pooled colour on slides it has not seen.
    """
    return VaeRecipe(
        loop=LoopConfig(
            num_steps=100_000,
            learning_rate=8e-4,
            warmup_steps=100,
            ema_decay=0.998,
            report_every_steps=250,
        ),
        block_channels=(16, 48, 96, 128),
        layers_per_block=1,
        norm_groups=4,
        has_attention=False,
        batch_size=8,
        crop_px=112,
        stain_jitter=1.0,
        colour_weight=1.0,
        perceptual_weight=0.1,
        perceptual_share=0.25,
        kl_weight=1e-6,
        seed=1,
    )


def tiny_encoder() -> EncoderRecipe:
    """Return the encoder of `tiny`: ViT/14 of width 192 and depth 5 with H0-mini's layout.

    Must leave less of the teacher's variance unexplained on unseen slides than its mean does.
    """
    return EncoderRecipe(
        loop=LoopConfig(
            num_steps=100_000,
            learning_rate=1e-3,
            warmup_steps=300,
            weight_decay=0.02,
            ema_decay=0.998,
            report_every_steps=250,
        ),
        embed_dim=192,
        depth=5,
        num_heads=3,
        mlp_ratio=4.0,
        batch_size=32,
        num_views=5000,
        num_components=32,
        stain_jitter=1.0,
        cls_weight=1.0,
        seed=2,
    )
