"""The distil stage: a teacher into a student that jumps along its flow in a few forwards.

The student is a Decoupled MeanFlow network that starts as the teacher (`SiT` with
`decoupled_depth`). Half of each batch is taught the teacher's guided velocity at r = t, the other
half average velocities from t to r by a rule of `training.stages.mean_flow`. The guidance scale is
an input, drawn anew for every sample, so one student serves all scales up to the largest.

Source: Lee et al. (2025), "Decoupled MeanFlow", arXiv 2510.24474. Deviations: the teacher's
velocity is the target at r = t too, which has less variance than eps - x; the scale as an input is
from Geng et al. (2025), "Improved Mean Flows".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cytosyn_aug.model.solvers import (
    adams_bashforth2,
    bind_student,
    flow_map,
    guide,
    interpolate,
    linear_grid,
    polynomial_grid,
)
from cytosyn_aug.model.transformer import SiT
from training.data.batches import Batches, TilesOfSplit, spread_evenly, step_generator
from training.engine.contact_sheets import write_sheet
from training.engine.loop import LoopConfig
from training.engine.precision import mixed_precision
from training.stages.latent_space import LatentSpace, Views, stratified
from training.stages.latents import StoredViews
from training.stages.losses import cauchy_error
from training.stages.mean_flow import RULES, Target, logit_normal, ordered_times

_REPORTED_FORWARDS = (1, 2, 4)
_REFERENCE_STEPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilRecipe:
    """A distillation: the student's split, what it is taught, the loop.

    Attributes:
        decoupled_depth: Blocks of the student that see t; the others see r.
        target: What teaches average velocities.
        guidance_max: Largest guidance scale taught.
        guidance_low: Lower end of the guidance interval in t (1 = noise).
        guidance_high: Upper end; 0.75 means none in the noisiest quarter.
        plain_share: Fraction of samples at scale 1, that is without guidance.
        time_locations: Means of the logits of the two times t and r are the larger and smaller of.
        time_scale: Standard deviation of these logits.
        condition_dropout: Probability that a sample is taught under the null condition.
        batch_size: Even.
    """

    loop: LoopConfig
    decoupled_depth: int
    target: Target
    guidance_max: float
    guidance_low: float
    guidance_high: float
    plain_share: float
    time_locations: tuple[float, float]
    time_scale: float
    batch_size: int
    condition_dropout: float
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}, expected an even number")
        if self.target not in RULES:
            raise ValueError(f"target is {self.target!r}, expected one of {sorted(RULES)}")
        if self.guidance_max < 1 or not 0 <= self.guidance_low < self.guidance_high <= 1:
            raise ValueError(
                f"guidance up to {self.guidance_max} in t from {self.guidance_low} to "
                f"{self.guidance_high}; expected at least 1 and 0 <= low < high <= 1"
            )


def build_student(recipe: DistilRecipe, teacher: SiT) -> SiT:
    """Return a student that equals its teacher at r = t, under every guidance scale.

    Args:
        recipe: Split and guidance.
        teacher: A plain trunk; its projector, if any, is left behind.
    """
    torch.manual_seed(recipe.seed)
    settings = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    student = SiT(
        **settings
        | {
            "z_dims": (),
            "decoupled_depth": recipe.decoupled_depth,
            "taught_guidance": (recipe.guidance_max, recipe.guidance_low, recipe.guidance_high),
        }
    )
    taught = {k: v for k, v in teacher.state_dict().items() if not k.startswith("projectors.")}
    embeddings = {
        k: v for k, v in student.state_dict().items() if k.startswith("guidance_embedder.")
    }
    student.load_state_dict(taught | embeddings)
    return student


class Distillation(nn.Module):
    """What is trained: the student, and the usual size of its error between any two times."""

    def __init__(self, student: SiT) -> None:
        super().__init__()
        self.student = student
        self.error_scale = _ErrorScale()


class _ErrorScale(nn.Module):
    """Logarithm of a squared error as a smooth function of (t, r)."""

    def __init__(self, num_waves: int = 8) -> None:
        super().__init__()
        self.num_waves = num_waves
        self.linear = nn.Linear(2 * num_waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -3.0)

    def forward(self, t: Tensor, r: Tensor) -> Tensor:
        """Return [B] of times [B]."""
        waves = torch.arange(1, self.num_waves + 1, device=t.device) * torch.pi
        return self.linear(torch.cat([(x[:, None] * waves).cos() for x in (t, r)], 1))[:, 0]


# Velocities and jumps alternate, so that every share of a batch holds as many of both.
_NOW, _LATER = slice(0, None, 2), slice(1, None, 2)


class _DistilDraws(NamedTuple):
    """Random numbers of a step; every second sample, from the first, has r = t."""

    posterior: Tensor
    eps: Tensor
    t: Tensor
    r: Tensor
    guidance: Tensor
    keep: Tensor


class DistilStage:
    """Teach a student on views of the tiles; see the module."""

    def __init__(
        self,
        recipe: DistilRecipe,
        views: StoredViews,
        validation: TilesOfSplit,
        space: LatentSpace,
        teacher: SiT,
        compiles: bool = False,
    ) -> None:
        self.recipe, self.views, self.space, self.device = recipe, views, space, space.device
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.batches = Batches(len(views), recipe.batch_size, recipe.seed, views.name)
        self.shown = spread_evenly(validation, 16)
        self.held_out = space.encode(spread_evenly(validation, 160), with_patches=False)
        self.network = Distillation(build_student(recipe, teacher)).to(self.device)
        self.compute = torch.compile(self._compute) if compiles else self._compute

    def read(self, step: int, rows: slice) -> Views:
        """Return the views of these rows."""
        return self.views.take(self.batches.index(step)[rows], with_patches=False)

    def losses(self, step: int, rows: slice, samples: Views) -> dict[str, Tensor]:
        """Return the losses of views.

        Raises:
            ValueError: `rows` start with a jump; a share of the batch must be of even size.
        """
        if (rows.start or 0) % 2:
            raise ValueError(
                f"rows {rows.start} to {rows.stop} split a pair; choose a batch_size that gives "
                "each process and micro-batch an even share"
            )
        draws = self._draws(self.batches.size, step_generator(self.recipe.seed, step))
        batch = {k: v.to(self.device).float() for k, v in samples.items()}
        return self.compute(self.network, batch, _DistilDraws(*(x[rows] for x in draws)))

    def _draws(self, num: int, draw: torch.Generator) -> _DistilDraws:
        recipe, shape = self.recipe, (num, *self.held_out["mean"].shape[1:])
        posterior = torch.randn(shape, generator=draw)
        eps = torch.randn(shape, generator=draw)
        now = logit_normal(stratified(num - num // 2, draw), 0.0, 1.0)
        first, second = (stratified(num // 2, draw) for _ in range(2))
        start, end = ordered_times(first, second, recipe.time_locations, recipe.time_scale)
        t, r = torch.empty(num), torch.empty(num)
        t[_NOW], r[_NOW], t[_LATER], r[_LATER] = now, now, start, end
        guidance = 1 + (recipe.guidance_max - 1) * torch.rand(num, generator=draw)
        is_plain = torch.rand(num, generator=draw) < recipe.plain_share
        guidance = guidance.masked_fill(is_plain, 1.0)
        keep = torch.rand(num, generator=draw) >= recipe.condition_dropout
        drawn = (posterior, eps, t, r, guidance, keep.float())
        return _DistilDraws(*(x.to(self.device) for x in drawn))

    def _compute(
        self, network: Distillation, batch: dict[str, Tensor], draws: _DistilDraws
    ) -> dict[str, Tensor]:
        x = self.teacher.whiten(batch["mean"] + batch["std"] * draws.posterior)
        x_t = interpolate(x, draws.eps, draws.t[:, None, None, None])
        condition = batch["cls"] * draws.keep[:, None]
        t, r, w = draws.t, draws.r, draws.guidance

        def velocity(x: Tensor, t: Tensor, part: slice) -> Tensor:
            return guided_velocity(self.teacher, x, t, condition[part], w[part], self.recipe)

        def u(x: Tensor, t: Tensor, r: Tensor, part: slice) -> Tensor:
            return network.student(x, t, condition[part], r, w[part])

        is_exact = self.recipe.target == "difference"  # which bfloat16 would drown
        with mixed_precision(x.device, enabled=not is_exact):
            v = velocity(x_t[_NOW], t[_NOW], _NOW)
            at_once = u(x_t[_NOW], t[_NOW], r[_NOW], _NOW)
            jump, target = RULES[self.recipe.target](
                partial(u, part=_LATER),
                partial(velocity, part=_LATER),
                x_t[_LATER],
                t[_LATER],
                r[_LATER],
            )
        log_scale = network.error_scale(t, r)
        parts = {
            "velocity": cauchy_error(at_once, v, log_scale[_NOW]),
            "jump": cauchy_error(jump, target, log_scale[_LATER]),
        }
        errors = {
            "velocity_mse": (at_once.float() - v).square().mean(),
            "jump_mse": (jump.float() - target).square().mean(),
        }
        return {"loss": (parts["velocity"] + parts["jump"]) / 2} | parts | errors

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write real tiles above the student's in 1, 2 and 4 forwards and the teacher's.

        Returns:
            Losses on validation tiles, and the root mean square distance of latents jumped to, and
            of those of Adams-Bashforth-2 with as many forwards, from the end of the teacher's flow.
        """
        assert isinstance(network, Distillation)
        batch = {k: v.to(self.device).float() for k, v in self.held_out.items()}
        draws = self._draws(len(batch["cls"]), step_generator(self.recipe.seed, 0, stream=3))
        scores = {f"val_{k}": float(v) for k, v in self._compute(network, batch, draws).items()}
        cls = self.space.encoder(self.shown.to(self.device)).cls
        draw = step_generator(self.recipe.seed, 0, stream=4)
        side, channels = (self.teacher.config[k] for k in ("input_size", "in_channels"))
        noise = torch.randn((len(cls), channels, side, side), generator=draw).to(self.device)
        rows = [self.shown]
        for scale in sorted({1.0, (1 + self.recipe.guidance_max) / 2}):
            end, made, distances = self._distances(network.student, noise, cls, scale)
            scores |= {f"{k}_at_{scale:g}": v for k, v in distances.items()}
            if scale == 1.0:
                rows += [self.space.decode(self.teacher, latents) for latents in (*made, end)]
        sheet = torch.stack(rows).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        write_sheet(
            folder / f"samples_{step:06d}.png", sheet, columns=sheet.shape[0] // len(rows) // 2
        )
        return scores

    def _distances(
        self, student: SiT, noise: Tensor, cls: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor], dict[str, float]]:
        """Return the teacher's end of the flow, the student's, and how far each lies from it."""
        recipe = self.recipe
        velocity = guide(
            self.teacher, cls, torch.zeros_like(cls[0]), scale, recipe.guidance_low,
            recipe.guidance_high,
        )  # fmt: skip
        u = bind_student(student, cls, scale)
        with mixed_precision(self.device):
            end = adams_bashforth2(velocity, noise, polynomial_grid(_REFERENCE_STEPS))
            generated = [flow_map(u, noise, linear_grid(n)) for n in _REPORTED_FORWARDS]
            solved = [
                adams_bashforth2(velocity, noise, polynomial_grid(n)) for n in _REPORTED_FORWARDS
            ]
        distances = {
            f"{name}_{n}": float((latents - end).square().mean().sqrt())
            for name, group in (("student", generated), ("ab2", solved))
            for n, latents in zip(_REPORTED_FORWARDS, group, strict=True)
        }
        return end, generated, distances


def guided_velocity(
    teacher: SiT, x_t: Tensor, t: Tensor, condition: Tensor, scale: Tensor, recipe: DistilRecipe
) -> Tensor:
    """Return the teacher's velocity [B, C, h, w] under a guidance scale for every sample.

    As `cytosyn_aug.model.solvers.guide`, which has one scale and one time for all.

    Args:
        teacher: The frozen teacher.
        x_t: Latents [B, C, h, w] at t.
        t: Times [B].
        condition: [B, D].
        scale: Guidance scales [B].
        recipe: Its guidance interval.
    """
    both = torch.cat([condition, torch.zeros_like(condition)])
    with torch.no_grad():
        v, v_null = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    is_inside = (t >= recipe.guidance_low) & (t <= recipe.guidance_high)
    effective = torch.where(is_inside, scale, torch.ones_like(scale))
    return torch.lerp(v_null, v, effective[:, None, None, None])
