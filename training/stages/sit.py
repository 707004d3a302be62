"""The transformer stage: velocity loss on cached latents, with alignment to encoder tokens.

What it trains on is in `training.stages.latents`; every step draws latents, times and noise.

Source: Ma et al. (2024), SiT; Yu et al. (2025), REPA (alignment weight 0.5, cosine).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cytosyn_aug.model.solvers import interpolate, velocity_target
from cytosyn_aug.model.transformer import SiT
from training.data.batches import Batches, TilesOfSplit, spread_evenly, step_generator
from training.engine.contact_sheets import write_comparison
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.latent_space import LatentSpace, Views, set_latent_statistics, stratified
from training.stages.latents import StoredViews
from training.stages.losses import alignment, velocity_error


@dataclass(frozen=True, kw_only=True, slots=True)
class SitRecipe:
    """A transformer run: shape, views, losses, the loop.

    Attributes:
        condition_dropout: Probability that a sample trains under the null condition.
        alignment_weight: Weight of the alignment loss.
    """

    loop: LoopConfig
    hidden_size: int
    depth: int
    num_heads: int
    encoder_depth: int
    projector_dim: int
    batch_size: int
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


class _SitDraws(NamedTuple):
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
        views: StoredViews,
        validation: TilesOfSplit,
        space: LatentSpace,
        compiles: bool = False,
    ) -> None:
        if views.mean_patch is None:
            raise ValueError(
                f"{views.folder} holds no patch tokens to align to; run the latents stage with a "
                "recipe that has_patches"
            )
        self.recipe, self.views, self.space, self.device = recipe, views, space, space.device
        self.usual_patch = views.mean_patch.to(self.device)
        self.batches = Batches(len(views), recipe.batch_size, recipe.seed, views.name)
        self.shown = spread_evenly(validation, 16)
        self.held_out = space.encode(spread_evenly(validation, 160))
        network = build_transformer(recipe, space.encoder.config["embed_dim"])
        set_latent_statistics(network, views.latent_mean, views.latent_variance)
        self.network = network.to(self.device)
        self.compute = torch.compile(self._compute) if compiles else self._compute

    def read(self, step: int, rows: slice) -> Views:
        """Return the views of these rows."""
        return self.views.take(self.batches.index(step)[rows])

    def losses(self, step: int, rows: slice, samples: Views) -> dict[str, Tensor]:
        """Return velocity and alignment losses of views."""
        draws = self._draws(self.batches.size, step_generator(self.recipe.seed, step))
        batch = {k: v.to(self.device).float() for k, v in samples.items()}
        return self.compute(self.network, batch, _SitDraws(*(x[rows] for x in draws)))

    def _draws(self, num: int, draw: torch.Generator) -> _SitDraws:
        shape = (num, *self.held_out["mean"].shape[1:])
        posterior = torch.randn(shape, generator=draw)
        eps = torch.randn(shape, generator=draw)
        t = stratified(num, draw)
        keep = torch.rand(num, generator=draw) >= self.recipe.condition_dropout
        return _SitDraws(*(x.to(self.device) for x in (posterior, eps, t, keep.float())))

    def _compute(
        self, network: SiT, batch: dict[str, Tensor], draws: _SitDraws
    ) -> dict[str, Tensor]:
        x = network.whiten(batch["mean"] + batch["std"] * draws.posterior)
        x_t = interpolate(x, draws.eps, draws.t[:, None, None, None])
        with mixed_precision(x.device):
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
        drawn = self.space.sample(network, self.shown, step_generator(self.recipe.seed, 0, 4))
        write_comparison(folder / f"samples_{step:06d}.png", [self.shown, drawn])
        return {f"val_{k}": float(v) for k, v in found.items()}
