"""Latent space of a model: its frozen autoencoder and encoder, and statistics of their output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.model.encoder import TileEncoder
from cytosyn_aug.model.solvers import adams_bashforth2, polynomial_grid
from cytosyn_aug.model.transformer import SiT
from training.engine.precision import mixed_precision

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
            with mixed_precision(self.device):
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
        with mixed_precision(self.device):
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

        with mixed_precision(self.device):
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
    return (token_sum(patches) / (patches.shape[0] * patches.shape[1])).float()


def token_sum(patches: Tensor) -> Tensor:
    """Return the sum of all tokens [N, P, D], float64 [D], without a copy of all in float64."""
    return torch.stack([part.double().sum((0, 1)) for part in patches.split(_CHUNK)]).sum(0)


def channel_sums(views: Views) -> Tensor:
    """Return the sums over views and pixels of latents and of their squares, float64 [2, C].

    Of latents drawn from posteriors `mean` and `std` [N, C, h, w], in expectation.
    """
    mean, std = (views[k].double().transpose(0, 1).flatten(1) for k in ("mean", "std"))
    return torch.stack([mean.sum(1), (mean.square() + std.square()).sum(1)])


def set_latent_statistics(network: SiT, mean: Tensor, variance: Tensor) -> None:
    """Set the whitening buffers to the mean and total variance [C] of latents by channel."""
    assert network.bn.running_mean is not None
    assert network.bn.running_var is not None
    network.bn.running_mean.copy_(mean)
    network.bn.running_var.copy_(variance)


def measure_latents(views: Views) -> tuple[Tensor, Tensor]:
    """Return mean and total variance (within and between posteriors) by channel, float64 [C]."""
    count = views["mean"].numel() / views["mean"].shape[1]
    mean, square = channel_sums(views) / count
    return mean, square - mean.square()
