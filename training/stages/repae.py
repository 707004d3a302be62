"""REPA-E: autoencoder and transformer learn together, end to end through the alignment.

One step, on the same tiles, posterior noise, times and flow noise:

1. The autoencoder learns from reconstruction, perception, KL, the judge, and from how well the
   transformer's tokens align with the encoder's; the transformer only passes that gradient on.
2. The judge learns to tell real from reconstructed windows.
3. The transformer learns velocity and alignment on latents that carry no gradient, whitened by
   the statistics of the batch, which also move the running ones.

No loss depends on the update that another makes in the same step, so the three are one sum and
one backward pass. Who receives which gradient is decided by what is frozen while a term is
computed. The velocity never reaches the autoencoder: it would make latents trivial to predict.

Differences from the published code: the autoencoder is averaged over steps like the transformer,
perception is this package's VGG, and may be joined by the amount of texture; `decode_px` may
reconstruct only a window.

Source: Leng et al. (2025), "REPA-E", section 3 and train_repae.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from cytosyn_aug.images import images_to_pixels
from cytosyn_aug.model.encoder import TileEncoder
from cytosyn_aug.model.solvers import interpolate, velocity_target
from cytosyn_aug.model.transformer import SiT
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
from training.engine.contact_sheets import write_comparison
from training.engine.distributed import mean_over_processes
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.discriminator import PatchDiscriminator, deceive_loss, judge_loss
from training.stages.latent_space import LatentSpace, align_grid, mean_token, stratified
from training.stages.losses import alignment, kl_to_standard_normal, velocity_error
from training.stages.perception import PerceptualNetwork, texture_distance
from training.stages.vae import reconstruction_numbers, round_trip


@dataclass(frozen=True, kw_only=True, slots=True)
class RepaeRecipe:
    """An end-to-end run; the networks' shapes come with their weights.

    Attributes:
        decode_px: Side of the window that is reconstructed and judged; the tile's for all.
        perceptual_weight: Weight of LPIPS.
        perceptual_stages: Feature maps of VGG that are compared, from the finest.
        texture_weight: Weight of `training.stages.perception.texture_distance`; 0 as published.
        adversarial_weight: Weight of the judge's verdict on reconstructions.
        adversarial_from: Step from which it counts; the judge learns from the first.
        judge_width: Channels of the judge's first layer.
        vae_alignment_weight: Weight of the alignment in the autoencoder's loss.
        alignment_weight: Weight of the alignment in the transformer's loss.
        is_centred: Align to tokens without their common part; see
        `training.stages.latent_space.mean_token`.
        condition_dropout: Probability that a sample trains under the null condition.
        stain_jitter: Size of random changes of stain; 0 for none.
    """

    loop: LoopConfig
    batch_size: int
    decode_px: int
    perceptual_weight: float
    perceptual_stages: int
    texture_weight: float
    kl_weight: float
    adversarial_weight: float
    adversarial_from: int
    judge_width: int
    vae_alignment_weight: float
    alignment_weight: float
    is_centred: bool
    condition_dropout: float
    stain_jitter: float
    seed: int


class _RepaeDraws(NamedTuple):
    """Random numbers of a step, one row a sample."""

    views: Tensor
    maps: Tensor
    window: Tensor
    posterior: Tensor
    eps: Tensor
    t: Tensor
    keep: Tensor


class _Batch(NamedTuple):
    """What the networks see: pixels, conditions and alignment targets."""

    pixels: Tensor
    cls: Tensor
    patches: Tensor


class RepaeStage:
    """Train an autoencoder and a transformer end to end; see the module."""

    def __init__(
        self,
        recipe: RepaeRecipe,
        tiles: TilesOfSplit,
        validation: TilesOfSplit,
        vae: AutoencoderKL,
        transformer: SiT,
        encoder: TileEncoder,
        device: torch.device,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.tiles, self.device = recipe, tiles, device
        self.batches = Batches(len(tiles), recipe.batch_size, recipe.seed, tiles.name)
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.perception = PerceptualNetwork("vgg").to(device)
        torch.manual_seed(recipe.seed)
        judge = PatchDiscriminator(recipe.judge_width)
        self.vae, self.transformer, self.judge = vae, transformer, judge
        self.network: nn.Module = nn.ModuleDict(
            {"vae": vae, "transformer": transformer, "judge": judge}
        )
        self.network.to(device).requires_grad_(True)
        transformer.pos_embed.requires_grad_(False)
        for part in (vae, judge):
            nn.Module.to(part, memory_format=torch.channels_last)
        self.shown = spread_evenly(validation, 16)
        self.held_out = spread_evenly(validation, 48)
        self.usual_patch = torch.zeros(1, device=device)
        if recipe.is_centred:
            encoded = LatentSpace(vae, self.encoder).encode(spread_evenly(tiles, 256))
            self.usual_patch = mean_token(encoded["patches"]).to(device)
        self.compute = torch.compile(self._compute) if compiles else self._compute

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the tiles of these rows."""
        return self.tiles.take(self.batches.index(step)[rows])

    def losses(self, step: int, rows: slice, samples: Tensor) -> dict[str, Tensor]:
        """Return all losses of tiles; "loss" is their sum, each part in its own gradient."""
        draws = self._draws(step_generator(self.recipe.seed, step))
        draws = _RepaeDraws(*(x[rows] for x in draws))
        images = crop_and_turn(samples, draws.views, samples.shape[-1])
        batch = self._batch(change_stain(images, draws.maps).to(self.device))
        draws = _RepaeDraws(*(x.to(self.device) for x in draws))
        found, moments = self.compute(batch, draws)
        move_statistics(self.transformer.bn, moments)
        return {"loss": self._weigh(found, step)} | found

    def _draws(self, draw: torch.Generator) -> _RepaeDraws:
        recipe, num = self.recipe, self.batches.size
        side_px = self.tiles.side_px
        shape = (num, 4, side_px // 8, side_px // 8)
        return _RepaeDraws(
            views=draw_views(num, side_px, side_px, draw),
            maps=stain_maps(num, draw, jitter=recipe.stain_jitter),
            window=draw_views(num, side_px // 8, recipe.decode_px // 8, draw)[:, :2],
            posterior=torch.randn(shape, generator=draw),
            eps=torch.randn(shape, generator=draw),
            t=stratified(num, draw),
            keep=(torch.rand(num, generator=draw) >= recipe.condition_dropout).float(),
        )

    @torch.no_grad()
    def _batch(self, images: Tensor) -> _Batch:
        pixels = images_to_pixels(images).to(memory_format=torch.channels_last)
        with mixed_precision(self.device):
            features = self.encoder(images)
        patches = align_grid(features.patches, self.transformer.grid_size)
        return _Batch(pixels, features.cls.float(), patches - self.usual_patch)

    def _compute(self, batch: _Batch, draws: _RepaeDraws) -> tuple[dict[str, Tensor], Tensor]:
        """Return all losses, and the moments of the latents in the batch."""
        with mixed_precision(self.device):
            posterior = self.vae.encode(batch.pixels).latent_dist  # type: ignore[union-attr]
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * draws.posterior
        moments = batch_moments(latents)
        found = (
            {"kl": kl_to_standard_normal(mean, std)}
            | self._reconstruction(latents, batch, draws)
            | self._alignment_of_latents(latents, batch, draws)
            | self._flow(latents.detach(), moments, batch, draws)
        )
        return found, moments

    def _reconstruction(
        self, latents: Tensor, batch: _Batch, draws: _RepaeDraws
    ) -> dict[str, Tensor]:
        """Return losses of a decoded window: the autoencoder's, and the judge's own."""
        side = self.recipe.decode_px
        corners = draws.window
        inside = _windows(latents, corners, side // 8)
        real = _windows(batch.pixels, corners * 8, side)
        judge, stages = self.judge, self.recipe.perceptual_stages
        with mixed_precision(self.device):
            made = self.vae.decode(inside).sample.float()
            maps = self.perception(made, stages)
            with torch.no_grad():
                real_maps = self.perception(real, stages)
            with frozen(judge):
                verdict = judge(made)
            scores = judge(real), judge(made.detach())
        return {
            "l1": (made - real).abs().mean(),
            "perceptual": self.perception.map_distance(maps, real_maps).mean(),
            "texture": texture_distance(maps, real_maps).mean(),
            "adversarial": deceive_loss(verdict),
            "judge": judge_loss(*scores),
        }

    def _alignment_of_latents(
        self, latents: Tensor, batch: _Batch, draws: _RepaeDraws
    ) -> dict[str, Tensor]:
        """Return the alignment as the autoencoder's loss: the transformer passes it on."""
        transformer = self.transformer
        with frozen(transformer), mixed_precision(self.device):
            x_t = interpolate(transformer.whiten(latents), draws.eps, _as_images(draws.t))
            tokens = transformer.aligned_tokens(x_t, draws.t, batch.cls)
            projected = transformer.projectors[0](tokens)
        return {"vae_alignment": alignment(projected, batch.patches)}

    def _flow(
        self, latents: Tensor, moments: Tensor, batch: _Batch, draws: _RepaeDraws
    ) -> dict[str, Tensor]:
        """Return velocity and alignment as the transformer's losses."""
        transformer = self.transformer
        x = whiten_batch(latents, moments, transformer.bn.eps)
        x_t = interpolate(x, draws.eps, _as_images(draws.t))
        with mixed_precision(self.device):
            condition = batch.cls * draws.keep[:, None]
            v, tokens = transformer.forward_tokens(x_t, draws.t, condition)
            projected = transformer.projectors[0](tokens)
        return {
            "velocity": velocity_error(v, velocity_target(x, draws.eps)),
            "alignment": alignment(projected, batch.patches),
        }

    def _weigh(self, found: dict[str, Tensor], step: int) -> Tensor:
        r = self.recipe
        adversarial = r.adversarial_weight if step >= r.adversarial_from else 0.0
        weights = {
            "l1": 1.0,
            "perceptual": r.perceptual_weight,
            "texture": r.texture_weight,
            "kl": r.kl_weight,
            "adversarial": adversarial,
            "vae_alignment": r.vae_alignment_weight,
            "judge": 1.0,
            "velocity": 1.0,
            "alignment": r.alignment_weight,
        }
        return torch.stack([weights[k] * v for k, v in found.items()]).sum()

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write real tiles, round trips and samples; return numbers on validation tiles."""
        assert isinstance(network, nn.ModuleDict)
        vae, transformer = network["vae"], network["transformer"]
        assert isinstance(vae, AutoencoderKL)
        assert isinstance(transformer, SiT)
        space = LatentSpace(vae, self.encoder)
        decoded = torch.cat([round_trip(vae, part) for part in self.held_out.split(8)])
        drawn = space.sample(transformer, self.shown, step_generator(self.recipe.seed, 0, 4))
        rows = [self.shown, round_trip(vae, self.shown), drawn]
        write_comparison(folder / f"samples_{step:06d}.png", rows)
        return reconstruction_numbers(self.held_out, decoded) | {
            "val_velocity": self._held_out_velocity(space, transformer)
        }

    def _held_out_velocity(self, space: LatentSpace, transformer: SiT) -> float:
        """Return the velocity error of the averaged networks on held-out tiles."""
        encoded = {k: v.to(self.device).float() for k, v in space.encode(self.held_out).items()}
        draw = step_generator(self.recipe.seed, 0, stream=3)
        eps = torch.randn(encoded["mean"].shape, generator=draw).to(self.device)
        t = stratified(len(eps), draw).to(self.device)
        x = transformer.whiten(encoded["mean"])
        with mixed_precision(self.device):
            v = transformer(interpolate(x, eps, _as_images(t)), t, encoded["cls"])
        return float(velocity_error(v, velocity_target(x, eps)))


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules, computed inside, without reaching their weights."""
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@torch.no_grad()
def batch_moments(latents: Tensor) -> Tensor:
    """Return mean and variance of each channel over the batches of all processes, float64 [2, C].

    Args:
        latents: [B, C, h, w].
    """
    x = latents.double()
    axes = (0, 2, 3)
    mean, square = mean_over_processes(torch.stack([x.mean(axes), x.square().mean(axes)]))
    return torch.stack([mean, square - mean.square()])


def whiten_batch(latents: Tensor, moments: Tensor, eps: float) -> Tensor:
    """Return latents [B, C, h, w] whitened by the moments of their batch.

    Source: Ioffe and Szegedy (2015), algorithm 1; torch's BatchNorm2d in training mode, which
    cannot be shared by processes on a CPU.
    """
    mean, scale = moments[0], (moments[1] + eps).rsqrt()
    return ((latents - mean[:, None, None]) * scale[:, None, None]).to(latents.dtype)


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, moments: Tensor) -> None:
    """Move the running statistics towards those of a batch, unless these are not finite.

    The buffers are replaced, not written to: the backward pass still needs the old ones.

    Args:
        norm: Holds the running statistics and their momentum.
        moments: Mean and variance of each channel, float64 [2, C].
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    is_finite = moments.isfinite().all()
    mean, variance = (
        torch.where(is_finite, old.lerp(new.to(old), norm.momentum or 0.1), old)
        for old, new in zip((norm.running_mean, norm.running_var), moments, strict=True)
    )
    norm.running_mean, norm.running_var = mean, variance


def _windows(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Return one square window of each image [B, C, H, W], by top and left corners [B, 2]."""
    steps = torch.arange(side, device=images.device)
    rows = (corners[:, :1] + steps)[:, None, :, None]
    columns = (corners[:, 1:] + steps)[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[batch, channels, rows, columns]


def _as_images(t: Tensor) -> Tensor:
    return t[:, None, None, None]
