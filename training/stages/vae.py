"""The autoencoder stage: diffusers' AutoencoderKL on crops of tiles.

Loss: L1 + perceptual (VGG) + KL. The perceptual loss is LPIPS, as REPA-E's, and the amount of
texture as in DISTS, which does here what REPA-E leaves to an adversary (LOG.md, 2026-11-24). The
error of 8x8-pooled colour is only watched: as a loss it keeps a small VAE at mean colours (LOG.md,
2026-11-23). With `train_encoder=False` only the decoder learns; computed latents stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from cytosyn_aug.images import images_to_pixels, pixels_to_images
from training.data.batches import (
    Batches,
    TilesOfSplit,
    change_stain,
    crop_and_turn,
    draw_views,
    spread_evenly,
    stain_maps,
    step_generator,
)
from training.engine.contact_sheets import write_sheet
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.losses import kl_to_standard_normal, pooled_colour
from training.stages.perception import PerceptualNetwork, texture_distance


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeRecipe:
    """An autoencoder run: shape of the network, weights of the losses, the loop.

    Attributes:
        perceptual_weight: Weight of LPIPS.
        perceptual_share: Fraction of each batch that the (costly) perceptual network sees.
        perceptual_stages: Feature maps of VGG that are compared, from the finest.
        texture_weight: Weight of `training.stages.perception.texture_distance`.
        stain_jitter: Size of random changes of stain; 0 for none.
    """

    loop: LoopConfig
    block_channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    has_attention: bool
    train_encoder: bool = True
    batch_size: int
    crop_px: int
    stain_jitter: float
    perceptual_weight: float
    perceptual_share: float
    perceptual_stages: int
    texture_weight: float
    kl_weight: float
    seed: int


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """Return an untrained f8d4 autoencoder of the recipe's shape."""
    num = len(recipe.block_channels)
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * num,
        up_block_types=("UpDecoderBlock2D",) * num,
        block_out_channels=recipe.block_channels,
        layers_per_block=recipe.layers_per_block,
        latent_channels=4,
        norm_num_groups=recipe.norm_groups,
        sample_size=224,
        scaling_factor=1.0,
        mid_block_add_attention=recipe.has_attention,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:  # residual branches start at zero: the start is a shallow network
            nn.init.zeros_(parameter)
    return vae


class VaeStage:
    """Train an autoencoder on tiles; see the module."""

    def __init__(
        self,
        recipe: VaeRecipe,
        tiles: TilesOfSplit,
        validation: TilesOfSplit,
        device: torch.device,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.tiles, self.device = recipe, tiles, device
        self.batches = Batches(len(tiles), recipe.batch_size, recipe.seed, tiles.name)
        self.network = build_vae(recipe).to(device, memory_format=torch.channels_last)
        if not recipe.train_encoder:
            for part in (self.network.encoder, self.network.quant_conv):
                part.requires_grad_(False)
        self.perception = PerceptualNetwork("vgg").to(device)
        self.compute = torch.compile(self._compute) if compiles else self._compute
        self.validation = spread_evenly(validation, 48)

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the tiles of these rows."""
        return self.tiles.take(self.batches.index(step)[rows])

    def losses(self, step: int, rows: slice, samples: Tensor) -> dict[str, Tensor]:
        """Return the losses of crops; the posterior is sampled as in the paper."""
        r = self.recipe
        crops, noise = draw_crops(
            samples,
            self.batches.size,
            rows,
            r.crop_px,
            r.stain_jitter,
            step_generator(r.seed, step),
        )
        pixels = images_to_pixels(crops.to(self.device)).to(memory_format=torch.channels_last)
        return self.compute(pixels, noise.to(self.device))

    def _compute(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        r = self.recipe
        num_perceived = max(1, round(r.perceptual_share * len(pixels)))
        with mixed_precision(self.device):
            posterior = self.network.encode(pixels).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            decoded = self.network.decode(mean + std * noise).sample.float()
            made = self.perception(decoded[:num_perceived], r.perceptual_stages)
            with torch.no_grad():
                real = self.perception(pixels[:num_perceived], r.perceptual_stages)
            perceived = self.perception.map_distance(made, real).mean()
            texture = texture_distance(made, real).mean()
        parts = {
            "l1": (decoded - pixels).abs().mean(),
            "colour": pooled_colour(decoded, pixels),
            "perceptual": perceived,
            "texture": texture,
            "kl": kl_to_standard_normal(mean, std),
        }
        total = parts["l1"] + r.perceptual_weight * parts["perceptual"]
        total = total + r.texture_weight * parts["texture"] + r.kl_weight * parts["kl"]
        return {"loss": total} | parts

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write originals above round trips; return PSNR over whole validation tiles."""
        decoded = torch.cat([round_trip(network, part) for part in self.validation.split(8)])
        show = torch.stack([self.validation[::6], decoded[::6]]).flatten(0, 1)
        write_sheet(folder / f"samples_{step:06d}.png", show, columns=8)
        return reconstruction_numbers(self.validation, decoded)


def draw_crops(
    tiles: Tensor,
    num: int,
    rows: slice,
    crop_px: int,
    stain_jitter: float,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return turned, restained crops of a batch's tiles, and noise for their posterior.

    Args:
        tiles: uint8 [n, 3, H, W], some of a batch.
        num: Tiles of the whole batch; all are drawn for.
        rows: Which of them these are.
        crop_px: Side of the crops.
        stain_jitter: Size of random changes of stain; 0 for none.
        draw: All draws come from it.

    Returns:
        uint8 [n, 3, crop_px, crop_px] and float32 [n, 4, crop_px / 8, crop_px / 8].
    """
    side = crop_px // 8
    views = draw_views(num, tiles.shape[-1], crop_px, draw)
    maps = stain_maps(num, draw, jitter=stain_jitter)
    noise = torch.randn(num, 4, side, side, generator=draw)
    crops = crop_and_turn(tiles, views[rows], crop_px)
    return change_stain(crops, maps[rows]), noise[rows]


@torch.no_grad()
def round_trip(vae: nn.Module, images: Tensor) -> Tensor:
    """Encode to the posterior mean and decode: uint8 [B, 3, H, W] to the same, same device."""
    device = next(vae.parameters()).device
    pixels = images_to_pixels(images.to(device)).to(memory_format=torch.channels_last)
    with mixed_precision(device):
        # Any: diffusers types decode() as a union of tuple and output class.
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample  # type: ignore[operator]
    return pixels_to_images(decoded.float()).to(images.device)


def reconstruction_numbers(images: Tensor, decoded: Tensor) -> dict[str, float]:
    """Return mean per-tile PSNR in dB, at full resolution and on 8x8-pooled colour.

    Args:
        images: uint8 [N, 3, H, W], originals.
        decoded: uint8 [N, 3, H, W], round trips.
    """
    difference = images.double() - decoded.double()
    pooled = nn.functional.avg_pool2d(difference, 8)

    def psnr(error: Tensor) -> float:
        mse = error.square().flatten(1).mean(1).clamp_min(1e-6)
        return float((10 * torch.log10(255.0**2 / mse)).mean())

    return {"psnr_db": psnr(difference), "pooled_psnr_db": psnr(pooled)}
