"""The decoder stage: a small decoder learns to do what the autoencoder's own does.

Latents are drawn from the posterior of crops. The small decoder is compared with the pixels, as
the autoencoder was, and with what its decoder makes of the same latents, which is also what it
should make of latents that belong to no tile.

Source: Boer Bohan (2023), TAESD; losses as in `training.stages.vae`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.model.decoder import SmallDecoder
from training.data.batches import Batches, TilesOfSplit, spread_evenly, step_generator
from training.engine.contact_sheets import write_comparison
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.perception import PerceptualNetwork, texture_distance
from training.stages.vae import draw_crops, reconstruction_numbers, round_trip


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderRecipe:
    """A small decoder's run: its shape, weights of the losses, the loop.

    Attributes:
        widths: Channels at 1/8, 1/4 and 1/2 of the resolution.
        num_blocks: Residual blocks at each.
        teacher_weight: Weight of the distance to the autoencoder's decoder; the pixels' is 1.
        perceptual_weight: Weight of LPIPS to what the autoencoder's decoder makes.
        perceptual_stages: Feature maps of VGG that are compared, from the finest.
        texture_weight: Weight of `training.stages.perception.texture_distance` to the same.
        stain_jitter: Size of random changes of stain; 0 for none.
    """

    loop: LoopConfig
    widths: tuple[int, int, int]
    num_blocks: tuple[int, int, int]
    batch_size: int
    crop_px: int
    teacher_weight: float
    perceptual_weight: float
    perceptual_stages: int
    texture_weight: float
    stain_jitter: float
    seed: int


def build_decoder(recipe: DecoderRecipe, latent_channels: int) -> SmallDecoder:
    """Return an untrained decoder of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    return SmallDecoder(
        latent_channels=latent_channels, widths=recipe.widths, num_blocks=recipe.num_blocks
    )


class DecoderStage:
    """Teach a small decoder on crops of tiles; see the module."""

    def __init__(
        self,
        recipe: DecoderRecipe,
        tiles: TilesOfSplit,
        validation: TilesOfSplit,
        vae: AutoencoderKL,
        device: torch.device,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.tiles, self.device = recipe, tiles, device
        self.batches = Batches(len(tiles), recipe.batch_size, recipe.seed, tiles.name)
        self.vae = vae.to(device, memory_format=torch.channels_last).eval()
        self.perception = PerceptualNetwork("vgg").to(device)
        network = build_decoder(recipe, vae.config["latent_channels"])
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)
        self.held_out = spread_evenly(validation, 48)
        self.floor = torch.cat([round_trip(vae, part) for part in self.held_out.split(8)])
        self.compute = torch.compile(self._compute) if compiles else self._compute

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the tiles of these rows."""
        return self.tiles.take(self.batches.index(step)[rows])

    def losses(self, step: int, rows: slice, samples: Tensor) -> dict[str, Tensor]:
        """Return the losses of crops."""
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
        with mixed_precision(self.device):
            with torch.no_grad():
                posterior = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
                latents = posterior.mean + posterior.std * noise
                taught = self.vae.decode(latents).sample.float()  # type: ignore[union-attr]
                # Not of the pixels: what the latents do not tell would come back as a lattice.
                aims = self.perception(taught, r.perceptual_stages)
            decoded = self.network(latents).float()
            maps = self.perception(decoded, r.perceptual_stages)
        parts = {
            "l1": (decoded - pixels).abs().mean(),
            "teacher": (decoded - taught).abs().mean(),
            "perceptual": self.perception.map_distance(maps, aims).mean(),
            "texture": texture_distance(maps, aims).mean(),
        }
        total = parts["l1"] + r.teacher_weight * parts["teacher"]
        total = total + r.perceptual_weight * parts["perceptual"]
        return {"loss": total + r.texture_weight * parts["texture"]} | parts

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write tiles above both decoders' round trips; return their numbers and the difference."""
        decoded = torch.cat([self._round_trip(network, part) for part in self.held_out.split(8)])
        rows = [x[::6] for x in (self.held_out, self.floor, decoded)]
        write_comparison(folder / f"samples_{step:06d}.png", rows)
        numbers = reconstruction_numbers(self.held_out, decoded)
        floor = reconstruction_numbers(self.held_out, self.floor)
        return numbers | {"psnr_lost_db": floor["psnr_db"] - numbers["psnr_db"]}

    def _round_trip(self, network: nn.Module, images: Tensor) -> Tensor:
        pixels = images_to_pixels(images.to(self.device)).to(memory_format=torch.channels_last)
        with mixed_precision(self.device):
            latents = self.vae.encode(pixels).latent_dist.mean  # type: ignore[union-attr]
            return pixels_to_images(network(latents).float()).to(images.device)
