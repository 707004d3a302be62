"""The transformer stage: velocity loss on cached latents, with alignment to encoder tokens.

Views of the tiles (turned, mirrored, half of them restained) are encoded once by the frozen VAE
and encoder and kept beside the run. Every step draws latents from the posterior, times and noise.

Source: Ma et al. (2024), SiT; Yu et al. (2025), REPA (alignment weight 0.5, cosine).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cytosyn_aug.encoder import TileEncoder
from cytosyn_aug.flow import interpolate, velocity_target
from cytosyn_aug.images import images_to_pixels, pixels_to_images
from cytosyn_aug.sampling import adams_bashforth2, polynomial_grid
from cytosyn_aug.transformer import SiT
from training.data import (
    TileSet,
    batch_indices,
    crop_and_turn,
    draw_views,
    restain,
    stain_maps,
    step_generator,
)
from training.loop import LoopConfig
from training.losses import alignment, velocity_error
from training.sheets import write_sheet

_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SitRecipe:
    """A transformer run: shape, views, losses, the loop.

    Attributes:
        num_views: Augmented views that are encoded, once.
        condition_dropout: Probability that a sample trains under the null condition.
        alignment_weight: Weight of the alignment loss.
        stain_jitter: See `training.data.stain_maps`.
    """

    loop: LoopConfig
    hidden_size: int
    depth: int
    num_heads: int
    encoder_depth: int
    projector_dim: int
    batch_size: int
    num_views: int
    stain_jitter: float
    condition_dropout: float
    alignment_weight: float
    seed: int


def build_transformer(recipe: SitRecipe, conditioning_dim: int) -> SiT:
    """Return an untrained transformer of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    return SiT(
        hidden_size=recipe.hidden_size,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        conditioning_dim=conditioning_dim,
        encoder_depth=recipe.encoder_depth,
        z_dims=(conditioning_dim,),
        projector_dim=recipe.projector_dim,
    )


class _Draws(NamedTuple):
    """Random numbers of a step: posterior and flow noise, times, and whose condition is kept."""

    posterior: Tensor
    eps: Tensor
    t: Tensor
    keep: Tensor


class SitStage:
    """Train a transformer on views of the tiles; see the module."""

    def __init__(
        self,
        recipe: SitRecipe,
        tiles: TileSet,
        validation: TileSet,
        vae: AutoencoderKL,
        encoder: TileEncoder,
        device: torch.device,
        cache: Path,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.vae, self.encoder = vae.to(device).eval(), encoder.to(device).eval()
        self.views = _views(self, tiles, recipe.num_views, cache)
        self.usual_patch = mean_token(self.views["patches"]).to(device)
        shown = validation.images[:: max(1, len(validation) // 16)][:16]
        self.shown = shown
        self.held_out = _encode(self, validation.images[:: max(1, len(validation) // 160)])
        network = build_transformer(recipe, encoder.config["embed_dim"])
        _set_latent_statistics(network, self.views)
        self.network = network.to(device)
        self.compute = torch.compile(self._compute) if compiles else self._compute

    @property
    def batch_size(self) -> int:
        """Views a step."""
        return self.recipe.batch_size

    def samples(self, step: int) -> list[int]:
        """Return the views of a step."""
        return self._index(step).tolist()

    def _index(self, step: int) -> Tensor:
        return batch_indices(len(self.views["cls"]), self.batch_size, self.recipe.seed, step)

    def losses(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Return velocity and alignment losses of views."""
        index = self._index(step)
        draws = self._draws(len(index), step_generator(self.recipe.seed, step))
        batch = {k: v[index[rows]].to(self.device).float() for k, v in self.views.items()}
        return self.compute(self.network, batch, _Draws(*(x[rows] for x in draws)))

    def _draws(self, num: int, draw: torch.Generator) -> _Draws:
        shape = (num, *self.views["mean"].shape[1:])
        posterior = torch.randn(shape, generator=draw)
        eps = torch.randn(shape, generator=draw)
        # Stratified over the batch: the same uniform distribution, less variance a step.
        t = (torch.randperm(num, generator=draw) + torch.rand(num, generator=draw)) / num
        keep = torch.rand(num, generator=draw) >= self.recipe.condition_dropout
        return _Draws(*(x.to(self.device) for x in (posterior, eps, t, keep.float())))

    def _compute(self, network: SiT, batch: dict[str, Tensor], draws: _Draws) -> dict[str, Tensor]:
        x = network.whiten(batch["mean"] + batch["std"] * draws.posterior)
        x_t = interpolate(x, draws.eps, draws.t[:, None, None, None])
        with torch.autocast(x.device.type, torch.bfloat16):
            condition = batch["cls"] * draws.keep[:, None]
            v, tokens = network.forward_tokens(x_t, draws.t, condition)
            projected = network.projectors[0](tokens)
        parts = {
            "velocity": velocity_error(v, velocity_target(x, draws.eps)),
            "alignment": alignment(projected, batch["patches"] - self.usual_patch),
        }
        return {
            "loss": parts["velocity"] + self.recipe.alignment_weight * parts["alignment"]
        } | parts

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write real tiles above tiles sampled from their features; return validation losses."""
        assert isinstance(network, SiT)
        batch = {k: v.to(self.device).float() for k, v in self.held_out.items()}
        draws = self._draws(len(batch["cls"]), step_generator(self.recipe.seed, 0, stream=3))
        found = self._compute(network, batch, draws)
        cls = self.encoder(self.shown.to(self.device)).cls
        noise = torch.randn(
            (len(cls), 4, 28, 28), generator=step_generator(self.recipe.seed, 0, stream=4)
        ).to(self.device)

        def velocity(x: Tensor, t: float) -> Tensor:
            return network(x, torch.full((len(x),), t, device=x.device), cls)

        with torch.autocast(self.device.type, torch.bfloat16):
            latents = adams_bashforth2(velocity, noise, polynomial_grid(12))
            decoded = self.vae.decode(network.unwhiten(latents)).sample
        images = torch.stack([self.shown, pixels_to_images(decoded.float()).cpu()])
        rows = images.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 2)
        write_sheet(folder / f"samples_{step:06d}.png", rows, columns=8)
        return {f"val_{k}": float(v) for k, v in found.items()}


@torch.no_grad()
def _encode(stage: SitStage, images: Tensor) -> dict[str, Tensor]:
    """Return fp16 posterior mean and std, CLS and patch tokens on the transformer's grid."""
    rows = []
    for part in images.split(16):
        part = part.to(stage.device)
        pixels = images_to_pixels(part).to(memory_format=torch.channels_last)
        with torch.autocast(stage.device.type, torch.bfloat16):
            posterior = stage.vae.encode(pixels).latent_dist
            features = stage.encoder(part)
        grid = features.patches.float().transpose(1, 2).unflatten(2, (16, 16))
        patches = F.interpolate(grid, size=(14, 14), mode="bilinear", antialias=True)
        row = {
            "mean": posterior.mean,
            "std": posterior.std,
            "cls": features.cls,
            "patches": patches.flatten(2).transpose(1, 2),
        }
        rows.append({k: v.half().cpu().contiguous() for k, v in row.items()})
    return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}


def _views(stage: SitStage, tiles: TileSet, num_views: int, cache: Path) -> dict[str, Tensor]:
    """Encode augmented views of the training tiles, or read the chunks that are done."""
    cache.mkdir(parents=True, exist_ok=True)
    chunks = []
    size = min(_CHUNK, num_views, len(tiles))
    for k in range(-(-num_views // size)):
        file = cache / f"{k:05d}.safetensors"
        if not file.exists():
            index = batch_indices(len(tiles), size, stage.recipe.seed, k)
            draw = step_generator(stage.recipe.seed, k, stream=2)
            side = tiles.images.shape[-1]
            turns = draw_views(len(index), side, side, draw)
            images = crop_and_turn(tiles.images[index], turns, side)
            images = restain(
                images, stain_maps(len(index), draw, share=0.5, jitter=stage.recipe.stain_jitter)
            )
            temporary = file.with_suffix(".tmp")
            save_file(_encode(stage, images), temporary)
            temporary.replace(file)
        chunks.append(load_file(file))
    return {key: torch.cat([c[key] for c in chunks])[:num_views] for key in chunks[0]}


def mean_token(patches: Tensor) -> Tensor:
    """Return the mean [D] of all tokens [N, P, D].

    Alignment is to what distinguishes a token: all tokens share so large a part that the cosine
    to the tokens themselves is 0.97 for a transformer that knows nothing (LOG.md, 2026-11-24).
    """
    total = torch.stack([part.double().sum((0, 1)) for part in patches.split(_CHUNK)]).sum(0)
    return (total / (patches.shape[0] * patches.shape[1])).float()


def _set_latent_statistics(network: SiT, views: dict[str, Tensor]) -> None:
    """Set the whitening buffers: mean and total variance (within and between) per channel."""
    mean = views["mean"].double().transpose(0, 1).flatten(1)
    within = views["std"].double().square().transpose(0, 1).flatten(1).mean(1)
    assert network.bn.running_mean is not None
    assert network.bn.running_var is not None
    network.bn.running_mean.copy_(mean.mean(1))
    network.bn.running_var.copy_(mean.var(1) + within)
