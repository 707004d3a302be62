"""Views of tiles, encoded once: what the transformer's stages train on instead of pixels.

Views (turned, mirrored, half of them restained) go through the frozen VAE and encoder before the
first step and stay beside the run, in chunks, so that an interrupted encoding resumes. Moments are
kept rather than latents: every step draws its own latents from the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.transformer import SiT
from training.data import (
    TileSet,
    batch_indices,
    crop_and_turn,
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
                grid = features.patches.float().transpose(1, 2).unflatten(2, (16, 16))
                patches = F.interpolate(grid, size=(14, 14), mode="bilinear", antialias=True)
                row["patches"] = patches.flatten(2).transpose(1, 2)
            rows.append({k: v.half().cpu().contiguous() for k, v in row.items()})
        return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}

    @torch.no_grad()
    def decode(self, network: SiT, latents: Tensor) -> Tensor:
        """Return uint8 images on the CPU of latents that `network` has whitened."""
        with torch.autocast(self.device.type, torch.bfloat16):
            pixels = self.vae.decode(network.unwhiten(latents)).sample  # type: ignore[union-attr]
        return pixels_to_images(pixels.float()).cpu()


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
        tiles: What the views are of, in the order of `training.data.batch_indices`.
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
            index = batch_indices(len(tiles), size, seed, k)
            draw = step_generator(seed, k, stream=2)
            images = crop_and_turn(tiles.images[index], draw, tiles.images.shape[-1])
            images = restain(images, stain_maps(len(index), draw, share=0.5, jitter=stain_jitter))
            temporary = file.with_suffix(".tmp")
            save_file(space.encode(images, with_patches), temporary)
            temporary.replace(file)
        chunks.append(load_file(file))
    return {key: torch.cat([c[key] for c in chunks])[:num_views] for key in chunks[0]}


def view_batch(
    views: Views, batch_size: int, seed: int, step: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the views of one step, float32 on the device."""
    index = batch_indices(len(views["cls"]), batch_size, seed, step)
    return {k: v[index].to(device).float() for k, v in views.items()}


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
