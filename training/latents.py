"""Views of tiles, encoded once: what the transformer's stages train on instead of pixels.

Views (turned, mirrored, half of them restained) go through the frozen VAE and encoder before the
first step and stay beside the run, in chunks, so that an interrupted encoding resumes. Moments are
kept rather than latents: every step draws its own latents from the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.sampling import adams_bashforth2, polynomial_grid
from cytosyn_aug.transformer import SiT
from training.data import (
    Batches,
    TileSet,
    crop_and_turn,
    draw_views,
    restain,
    stain_maps,
    step_generator,
)

Views = dict[str, Tensor]
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """The frozen networks between pixels and what the transformer sees, on one device.

    Attributes:
        vae: Between pixels and latents.
        encoder: From pixels to conditions.
    """

    vae: AutoencoderKL
    encoder: TileEncoder

    @property
    def device(self) -> torch.device:
        """Device of both networks."""
        return self.vae.device

    @torch.no_grad()
    def encode(self, images: Tensor, with_patches: bool = True) -> Views:
        """Encode uint8 images [N, 3, 224, 224], on any device.

        Returns:
            float16 on the CPU: posterior `mean` and `std` [N, 4, 28, 28], `cls` [N, D] and, if
            asked for, `patches` [N, 196, D] on the transformer's 14 x 14 grid.
        """
        rows = []
        for part in images.split(16):
            part = part.to(self.device)
            pixels = images_to_pixels(part).to(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16):
                posterior = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
                features = self.encoder(part)
            row = {"mean": posterior.mean, "std": posterior.std, "cls": features.cls}
            if with_patches:
                row["patches"] = align_grid(features.patches)
            rows.append({k: v.half().cpu().contiguous() for k, v in row.items()})
        return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}

    @torch.no_grad()
    def decode(self, network: SiT, latents: Tensor) -> Tensor:
        """Return uint8 images on the CPU of latents that `network` has whitened."""
        with torch.autocast(self.device.type, torch.bfloat16):
            pixels = self.vae.decode(network.unwhiten(latents)).sample  # type: ignore[union-attr]
        return pixels_to_images(pixels.float()).cpu()

    @torch.no_grad()
    def sample(self, network: SiT, images: Tensor, draw: torch.Generator) -> Tensor:
        """Return tiles that `network` draws in 12 steps from the features of tiles, on the CPU."""
        cls = self.encoder(images.to(self.device)).cls
        channels, side = network.config["in_channels"], network.config["input_size"]
        noise = torch.randn((len(cls), channels, side, side), generator=draw).to(self.device)

        def velocity(x: Tensor, t: float) -> Tensor:
            return network(x, torch.full((len(x),), t, device=x.device), cls)

        with torch.autocast(self.device.type, torch.bfloat16):
            latents = adams_bashforth2(velocity, noise, polynomial_grid(12))
        return self.decode(network, latents)


def align_grid(patches: Tensor, side: int = 14) -> Tensor:
    """Return patch tokens [B, P, D] on the transformer's grid, float32 [B, side * side, D].

    224 px are 16 x 16 patches of the encoder and 14 x 14 tokens of the transformer.
    """
    own = math.isqrt(patches.shape[1])
    grid = patches.float().transpose(1, 2).unflatten(2, (own, own))
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2)


def encode_views(
    space: LatentSpace,
    tiles: TileSet,
    num_views: int,
    cache: Path,
    *,
    stain_jitter: float,
    seed: int,
    with_patches: bool = True,
) -> Views:
    """Encode augmented views of the training tiles, or read the chunks that are done.

    Args:
        space: See `LatentSpace`.
        tiles: What the views are of, in the order of `training.data.Batches`.
        num_views: Views to encode.
        cache: Folder of the chunks.
        stain_jitter: See `training.data.stain_maps`; half of the views are restained.
        seed: Of the views; a cache belongs to one seed and jitter.
        with_patches: See `LatentSpace.encode`.

    Returns:
        See `LatentSpace.encode`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    chunks = []
    size = min(_CHUNK, num_views, len(tiles))
    for k in range(-(-num_views // size)):
        file = cache / f"{k:05d}.safetensors"
        if not file.exists():
            index = Batches(len(tiles), size, seed).index(k)
            draw = step_generator(seed, k, stream=2)
            side = tiles.images.shape[-1]
            images = crop_and_turn(tiles.images[index], draw_views(size, side, side, draw), side)
            images = restain(images, stain_maps(len(index), draw, share=0.5, jitter=stain_jitter))
            temporary = file.with_suffix(".tmp")
            save_file(space.encode(images, with_patches), temporary)
            temporary.replace(file)
        chunks.append(load_file(file))
    return {key: torch.cat([c[key] for c in chunks])[:num_views] for key in chunks[0]}


def stratified(num: int, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers [num] in [0, 1), one in each of `num` equal parts, in random order.

    The same distribution as independent draws, with less variance over a batch.
    """
    return (torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)) / num


def mean_token(patches: Tensor) -> Tensor:
    """Return the mean [D] of all tokens [N, P, D].

    Alignment is to what distinguishes a token: all tokens share so large a part that the cosine
    to the tokens themselves is 0.97 for a transformer that knows nothing (LOG.md, 2026-11-24).
    """
    total = torch.stack([part.double().sum((0, 1)) for part in patches.split(_CHUNK)]).sum(0)
    return (total / (patches.shape[0] * patches.shape[1])).float()


def set_latent_statistics(network: SiT, views: Views) -> None:
    """Set the whitening buffers: mean and total variance (within and between) per channel."""
    mean = views["mean"].double().transpose(0, 1).flatten(1)
    within = views["std"].double().square().transpose(0, 1).flatten(1).mean(1)
    assert network.bn.running_mean is not None
    assert network.bn.running_var is not None
    network.bn.running_mean.copy_(mean.mean(1))
    network.bn.running_var.copy_(mean.var(1) + within)


def evenly_spaced(images: Tensor, num: int) -> Tensor:
    """Return about `num` of the images, spread evenly over them."""
    return images[:: max(1, len(images) // num)]
