"""Runs, as functions that return frozen configurations. One name is one run, complete.

`tiny` ships in the package, `xl` is CytoSyn's size, `smoke` touches every line in seconds; each in
the order of its stages.
"""

from __future__ import annotations

from dataclasses import replace

from training.data.cutting import TileRecipe
from training.engine.loop import LoopConfig
from training.stages.decoder import DecoderRecipe
from training.stages.distil import DistilRecipe
from training.stages.encoder import EncoderRecipe
from training.stages.latents import LatentsRecipe
from training.stages.repae import RepaeRecipe
from training.stages.sit import SitRecipe
from training.stages.vae import VaeRecipe

NUM_GPUS = {"xl": 8}
"""GPUs that share a run, by the name before the underscore; one where it is not here."""

_SMOKE_LOOP = LoopConfig(num_steps=2, learning_rate=1e-3, report_every_steps=2)


def tiny_tile() -> TileRecipe:
    """Return the tiles of `tiny`: all there are, nine slides in ten for training."""
    return TileRecipe(split_shares=(("train", 0.9), ("val", 0.1)))


def tiny_vae() -> VaeRecipe:
    """Return the autoencoder of `tiny`: 3.1 M parameters, 3.5 GFLOP to encode a tile.

    Must reach 23 dB per tile and 32 dB on 8x8-pooled colour on slides it has not seen.
    """
    return VaeRecipe(
        loop=LoopConfig(
            num_steps=2000,
            learning_rate=2e-3,
            warmup_steps=50,
            cooldown_steps=1000,
            ema_decay=0.995,
            report_every_steps=200,
        ),
        block_channels=(16, 48, 96, 128),
        layers_per_block=1,
        norm_groups=4,
        has_attention=False,
        batch_size=8,
        crop_px=112,
        stain_jitter=0.25,
        perceptual_weight=0.1,
        perceptual_share=0.5,
        perceptual_stages=4,
        texture_weight=0.3,
        kl_weight=1e-6,
        seed=1,
    )


def tiny_exact_vae() -> VaeRecipe:
    """Return the second part of the autoencoder's run: from texture back towards exact pixels."""
    first = tiny_vae()
    loop = replace(
        first.loop, num_steps=800, learning_rate=1e-3, muon_rate=0.005, cooldown_steps=750
    )
    return replace(first, loop=loop, perceptual_weight=0.03, texture_weight=0.15, seed=5)


def tiny_long_vae() -> VaeRecipe:
    """Return the autoencoder's longest run: 24 dB per tile on slides it has not seen."""
    first = tiny_vae()
    loop = replace(
        first.loop,
        num_steps=8_000,
        cooldown_steps=4_000,
        ema_decay=0.998,
        report_every_steps=400,
    )
    return replace(
        first, loop=loop, perceptual_weight=0.02, perceptual_share=0.25, texture_weight=0.1, seed=6
    )


def tiny_sharp_vae() -> VaeRecipe:
    """Return the last part of the autoencoder's run: the encoder is frozen, latents stay.

    It wins back what the end-to-end run gave for sharpness, without the texture loss, which rules
    fine lattices over smooth areas.
    """
    first = tiny_exact_vae()
    loop = replace(
        first.loop, num_steps=500, learning_rate=5e-4, muon_rate=0.0025, cooldown_steps=450
    )
    return replace(
        first,
        loop=loop,
        train_encoder=False,
        perceptual_weight=0.02,
        texture_weight=0.0,
        seed=4,
    )


def tiny_encoder() -> EncoderRecipe:
    """Return the encoder of `tiny`: ViT/14 of width 192 and depth 5 with H0-mini's layout.

    Must leave less of the teacher's variance unexplained on unseen slides than its mean does.
    """
    return EncoderRecipe(
        loop=LoopConfig(
            num_steps=2500,
            learning_rate=1e-3,
            warmup_steps=50,
            cooldown_steps=1500,
            ema_decay=0.99,
            report_every_steps=250,
        ),
        embed_dim=192,
        depth=5,
        num_heads=3,
        mlp_ratio=4.0,
        batch_size=32,
        num_views=8029,
        num_components=32,
        stain_jitter=1.0,
        cls_weight=1.0,
        seed=2,
    )


def tiny_latents() -> LatentsRecipe:
    """Return what the transformers of `tiny` train on: every tile one and a half times, 1.1 GB."""
    return LatentsRecipe(
        num_views=12_032, shard_size=64, has_patches=True, stain_jitter=1.0, seed=3
    )


def tiny_sit() -> SitRecipe:
    """Return the transformer of `tiny`: SiT of width 192 and depth 7, 1.4 GFLOP a forward.

    Must bring a tile back to median rank 5 of 100 from its features, and the Frechet distance to
    a slide under half of that between slides.
    """
    return SitRecipe(
        loop=LoopConfig(
            num_steps=3800,
            learning_rate=1e-3,
            warmup_steps=50,
            cooldown_steps=3300,
            ema_decay=0.998,
            report_every_steps=500,
        ),
        hidden_size=192,
        depth=7,
        num_heads=3,
        encoder_depth=3,
        projector_dim=512,
        batch_size=32,
        condition_dropout=0.1,
        alignment_weight=0.5,
        seed=3,
    )


def tiny_repae() -> RepaeRecipe:
    """Return the end-to-end run of `tiny`: its autoencoder and transformer learn together.

    Must keep 24 dB per tile and leave a lower velocity loss than it found.
    """
    return RepaeRecipe(
        loop=LoopConfig(
            num_steps=1000,
            learning_rate=5e-4,
            muon_rate=0.004,
            warmup_steps=50,
            cooldown_steps=850,
            ema_decay=0.995,
            report_every_steps=250,
        ),
        batch_size=8,
        decode_px=112,
        perceptual_weight=0.02,
        perceptual_stages=4,
        texture_weight=0.1,
        kl_weight=1e-6,
        adversarial_weight=0.002,
        adversarial_from=100,
        judge_width=32,
        vae_alignment_weight=0.1,
        alignment_weight=0.5,
        is_centred=True,
        condition_dropout=0.1,
        stain_jitter=0.25,
        seed=11,
    )


def tiny_distil() -> DistilRecipe:
    """Return the student of `tiny`: as many parameters, 4 forwards instead of 250 to 500.

    Must come, in 4 forwards, as close to real tiles as the 250-step reference sampler does: its
    Frechet distance above that between real tiles at most 1.1 times the reference's.
    """
    return DistilRecipe(
        loop=LoopConfig(
            num_steps=650,
            learning_rate=1e-3,
            muon_rate=0.003,
            warmup_steps=50,
            cooldown_steps=580,
            ema_decay=0.995,
            report_every_steps=325,
        ),
        decoupled_depth=5,
        target="derivative",
        guidance_max=3.0,
        guidance_low=0.0,
        guidance_high=0.75,
        plain_share=0.25,
        time_locations=(0.4, -1.2),
        time_scale=1.0,
        batch_size=32,
        condition_dropout=0.1,
        seed=7,
    )


def tiny_decoder() -> DecoderRecipe:
    """Return the small decoder of `tiny`: 3.8 GFLOP per tile where the autoencoder's takes 13.5.

    Must lose no more than 1 dB to it.
    """
    return DecoderRecipe(
        loop=LoopConfig(
            num_steps=1100,
            learning_rate=2e-3,
            warmup_steps=50,
            cooldown_steps=900,
            ema_decay=0.995,
            report_every_steps=200,
        ),
        widths=(128, 64, 32),
        num_blocks=(3, 2, 1),
        batch_size=8,
        crop_px=112,
        teacher_weight=1.0,
        perceptual_weight=0.1,
        perceptual_stages=3,
        texture_weight=0.03,
        stain_jitter=0.25,
        seed=7,
    )


def xl_tile() -> TileRecipe:
    """Return the tiles of an XL model: 40 M of TCGA's 11,766 diagnostic slides, about 3.2 TB.

    Sites contribute by their number of slides and stay in one split where their project has
    enough of them. At 100 tiles/s per process, 64 processes need about two hours, if reading 13 TB
    does not take longer. One training tile in a thousand is kept apart for `evaluate --unseen`.
    """
    return TileRecipe(num_tiles=40_000_000, unseen_share=0.001)


def xl_vae() -> VaeRecipe:
    """Return SD-VAE's shape, f8d4 with 84 M parameters, tuned to tiles from its own weights.

    `--warm-start` takes a model folder that `cytosyn-aug convert` made of it.
    """
    return VaeRecipe(
        loop=LoopConfig(
            num_steps=100_000,
            learning_rate=1e-4,
            muon_rate=None,
            cooldown_steps=50_000,
            ema_decay=0.9999,
            report_every_steps=5000,
        ),
        block_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_groups=32,
        has_attention=True,
        batch_size=64,
        crop_px=224,
        stain_jitter=0.0,
        perceptual_weight=1.0,
        perceptual_share=1.0,
        perceptual_stages=5,
        texture_weight=0.0,
        kl_weight=1e-6,
        seed=0,
    )


def xl_repae() -> RepaeRecipe:
    """Return REPA-E as published: SiT-XL/2 and SD-VAE, 400,000 steps of 256 tiles, 8 GPUs.

    Two passes per step, 16 tiles per GPU in each: 32 at once would not fit 80 GB (`--dry-run`). So
    latents are whitened by the moments of 128 tiles.
    """
    return RepaeRecipe(
        loop=LoopConfig(
            num_steps=400_000,
            learning_rate=1e-4,
            muon_rate=None,
            warmup_steps=0,
            ema_decay=0.9999,
            num_micro_batches=2,
            log_every_steps=100,
            report_every_steps=10_000,
            save_every_s=900.0,
        ),
        batch_size=256,
        decode_px=224,
        perceptual_weight=1.0,
        perceptual_stages=5,
        texture_weight=0.0,
        kl_weight=1e-6,
        adversarial_weight=0.1,
        adversarial_from=0,
        judge_width=64,
        vae_alignment_weight=1.5,
        alignment_weight=0.5,
        is_centred=False,
        condition_dropout=0.1,
        stain_jitter=0.0,
        seed=0,
    )


def xl_latents() -> LatentsRecipe:
    """Return what a student of CytoSyn is distilled on: moments and features of every tile.

    Without patch tokens, which only `sit` needs, and which would be 12 TB instead of 0.6.
    """
    return LatentsRecipe(
        num_views=40_000_000, shard_size=4096, has_patches=False, stain_jitter=0.0, seed=0
    )


def xl_sit() -> SitRecipe:
    """Return SiT-XL/2 on latents of a frozen autoencoder, as REPA-E's second stage trains it.

    It aligns to patch tokens: set has_patches in `xl_latents` first, and have 13 TB of disk.
    """
    return SitRecipe(
        loop=replace(xl_repae().loop, num_steps=4_000_000, num_micro_batches=1),
        hidden_size=1152,
        depth=28,
        num_heads=16,
        encoder_depth=8,
        projector_dim=2048,
        batch_size=256,
        condition_dropout=0.1,
        alignment_weight=0.5,
        seed=0,
    )


def xl_distil() -> DistilRecipe:
    """Return a student of CytoSyn itself: SiT-XL/2, split as published.

    One optimiser step of 256 tiles is 256 x 6 forwards of 180 GFLOP; 50,000 steps are 10 to 20
    hours of an H100 by arithmetic, and were never run.
    """
    return replace(
        tiny_distil(),
        loop=LoopConfig(
            num_steps=50_000,
            learning_rate=1e-4,
            muon_rate=0.001,
            warmup_steps=1000,
            cooldown_steps=10_000,
            ema_decay=0.9999,
            log_every_steps=100,
            report_every_steps=5000,
        ),
        decoupled_depth=20,
        batch_size=256,
    )


def xl_decoder() -> DecoderRecipe:
    """Return the small decoder of SD-VAE: 20.5 GFLOP per tile where its own takes 476."""
    return replace(
        tiny_decoder(),
        loop=replace(xl_vae().loop, learning_rate=3e-4),
        widths=(256, 128, 64),
        num_blocks=(4, 3, 2),
        batch_size=64,
        crop_px=224,
        perceptual_weight=0.5,
        perceptual_stages=5,
    )


def smoke_tile() -> TileRecipe:
    """Return some tiles, enough to touch every line of all stages."""
    return replace(tiny_tile(), num_tiles=200, unseen_share=0.2)


def smoke_vae() -> VaeRecipe:
    """Return a run of seconds that touches every line of the autoencoder stage."""
    return replace(
        tiny_vae(),
        loop=_SMOKE_LOOP,
        block_channels=(8, 8, 8, 16),
        batch_size=2,
        crop_px=64,
    )


def smoke_sharp_vae() -> VaeRecipe:
    """Return the second half of `smoke_vae`."""
    return replace(smoke_vae(), train_encoder=False, seed=4)


def smoke_encoder() -> EncoderRecipe:
    """Return a run of seconds that touches every line of the encoder stage."""
    return replace(
        tiny_encoder(),
        loop=_SMOKE_LOOP,
        embed_dim=24,
        depth=1,
        num_heads=2,
        batch_size=2,
        num_views=4,
        num_components=4,
    )


def smoke_latents() -> LatentsRecipe:
    """Return a handful of views, in two shards."""
    return replace(tiny_latents(), num_views=5, shard_size=4)


def smoke_sit() -> SitRecipe:
    """Return a run of seconds that touches every line of the transformer stage."""
    return replace(
        tiny_sit(),
        loop=_SMOKE_LOOP,
        hidden_size=24,
        depth=2,
        num_heads=2,
        encoder_depth=1,
        projector_dim=16,
        batch_size=2,
    )


def smoke_repae() -> RepaeRecipe:
    """Return a run of seconds that touches every line of the end-to-end stage."""
    return replace(
        tiny_repae(),
        loop=_SMOKE_LOOP,
        batch_size=2,
        decode_px=64,
        adversarial_from=1,
        judge_width=8,
    )


def smoke_distil() -> DistilRecipe:
    """Return a run of seconds that touches every line of the distil stage."""
    return replace(
        tiny_distil(),
        loop=_SMOKE_LOOP,
        decoupled_depth=1,
        batch_size=4,
    )


def smoke_decoder() -> DecoderRecipe:
    """Return a run of seconds that touches every line of the decoder stage."""
    return replace(
        tiny_decoder(),
        loop=_SMOKE_LOOP,
        widths=(16, 16, 16),
        num_blocks=(1, 1, 1),
        batch_size=2,
        crop_px=64,
    )
