"""Sampler: draws latents with one network along a grid of times that is known beforehand.

All that depends on times, conditions and guidance alone is computed before the steps, in a few
large products instead of many small ones: a step is then one pass of the network over tensors,
with no host number in it and nothing to wait for. It refuses to know of tiles and weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.model.solvers import (
    AverageVelocity,
    Velocity,
    adams_bashforth2,
    euler_maruyama,
    flow_map,
    polynomial_grid,
    reference_grid,
    shifted_grid,
)
from cytosyn_aug.model.transformer import Modulation, SiT

Sampler = Literal["student", "ab2", "euler_maruyama"]
Forward = Callable[[Tensor, Modulation], Tensor]
DEFAULT_STEPS: dict[Sampler, int] = {"student": 4, "ab2": 16, "euler_maruyama": 250}
# Rows modulated at once, over steps: 100 MB for SiT-XL in bfloat16.
MAX_ROWS = 256


class Guidance(NamedTuple):
    """Classifier-free guidance.

    Attributes:
        scale: 1 for none.
        low: Lower end of the interval in t, 1 = noise.
        high: Upper end; 0.75 means none in the noisiest quarter.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 0.75

    def acts_at(self, t: float) -> bool:
        """Return whether the unconditional pass runs at a time."""
        return self.scale != 1.0 and self.low <= t <= self.high


def choose_guidance(
    scale: float,
    low: float | None,
    high: float | None,
    taught: tuple[float, float, float] | None,
) -> Guidance:
    """Return guidance with what was not given filled in.

    Args:
        scale: 1 for none.
        low: None for 0, or for what a student was taught.
        high: None for 0.75, or for what a student was taught.
        taught: Largest scale and interval that a student has learned; None for a transformer.

    Raises:
        ValueError: No finite scale, or one that the student was not taught.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale is {scale}, expected a number; 1 is no guidance")
    usual = Guidance(scale) if taught is None else Guidance(scale, *taught[1:])
    chosen = Guidance(
        scale, usual.low if low is None else low, usual.high if high is None else high
    )
    if taught is not None and not (1 <= scale <= taught[0] and chosen == usual):
        raise ValueError(
            f"guidance is {scale} in t from {chosen.low} to {chosen.high}, but the student was "
            f"taught 1 to {taught[0]} in {taught[1]} to {taught[2]}; stay inside or use "
            "sampler='ab2'"
        )
    return chosen


def time_grid(sampler: Sampler, steps: int, start: float = 1.0) -> list[float]:
    """Return the times a sampler goes through from `start` to 0, `steps` evaluations.

    Raises:
        ValueError: No such sampler, too few steps, or a stochastic sampler not from noise.
    """
    if sampler not in DEFAULT_STEPS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {sorted(DEFAULT_STEPS)}")
    least = 1 if sampler == "student" else 2
    if steps < least:
        raise ValueError(f"steps is {steps}, expected at least {least} with {sampler!r}")
    if sampler == "student":
        return shifted_grid(steps, start)
    if sampler == "ab2":
        return polynomial_grid(steps, start)
    if start != 1.0:
        raise ValueError(f"'euler_maruyama' starts at t = 1 (noise), not {start}; use 'ab2'")
    return reference_grid(steps)


def draw_latents(
    network: SiT,
    start: Tensor,
    times: Sequence[float],
    condition: Tensor,
    null_condition: Tensor,
    *,
    sampler: Sampler,
    guidance: Guidance,
    step_noise: Callable[[int], Tensor] | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """Return whitened latents at the last of `times`.

    Args:
        network: The student for "student", else the transformer.
        start: Latents [B, C, h, w] at `times[0]`; their dtype is that of the sampler's state.
        times: From noise to data, as `time_grid` returns them.
        condition: [B, D].
        null_condition: [D].
        sampler: How the steps are made.
        guidance: Scale and interval; a student has learned its interval.
        step_noise: Noise of step i, for "euler_maruyama".
        forward: `network.forward_modulated`, compiled; None for as it is.
    """
    forward = forward or network.forward_modulated
    if sampler == "student":
        jumps = bind_jumps(network, times, condition, guidance.scale, forward)
        return flow_map(jumps, start, times)
    velocity = bind_velocity(network, times, condition, null_condition, guidance, forward)
    if sampler == "ab2":
        return adams_bashforth2(velocity, start, times)
    assert step_noise is not None
    return euler_maruyama(velocity, start, step_noise, times)


def bind_velocity(
    network: SiT,
    times: Sequence[float],
    condition: Tensor,
    null_condition: Tensor,
    guidance: Guidance,
    forward: Forward,
) -> Velocity:
    """Bind condition and guidance to a network, for the times that a solver will ask for.

    As `cytosyn_aug.model.solvers.guide`: inside the interval both halves are one batch, outside it
    only the conditional one runs.
    """
    both = torch.cat([condition, null_condition.expand_as(condition)])
    rows = {t: both if guidance.acts_at(t) else condition for t in times[:-1]}
    steps = _Steps(network, rows)

    def velocity(x: Tensor, t: float) -> Tensor:
        modulation = steps.at(t)
        if not guidance.acts_at(t):
            return forward(x, modulation)
        v, v_null = forward(torch.cat([x, x]), modulation).chunk(2)
        return v_null + guidance.scale * (v - v_null)

    return velocity


def bind_jumps(
    student: SiT, times: Sequence[float], condition: Tensor, scale: float, forward: Forward
) -> AverageVelocity:
    """Bind condition and guidance scale to a student, for jumps along `times`."""
    following = dict(itertools.pairwise(times))
    steps = _Steps(student, dict.fromkeys(following, condition), following, scale)

    def average_velocity(x: Tensor, t: float, r: float) -> Tensor:
        assert following[t] == r
        return forward(x, steps.at(t))

    return average_velocity


class _Steps:
    """Modulations of the steps to come, some steps at a time so that memory is bounded."""

    def __init__(
        self,
        network: SiT,
        rows: Mapping[float, Tensor],
        following: Mapping[float, float] | None = None,
        scale: float | None = None,
    ) -> None:
        self.network, self.rows, self.following, self.scale = network, rows, following, scale
        self.ready: dict[float, Modulation] = {}

    def at(self, t: float) -> Modulation:
        if t not in self.ready:
            self.ready.clear()  # before others take as much again
            self.ready = self._modulate(self._next_times(t))
        return self.ready[t]

    def _next_times(self, t: float) -> list[float]:
        """Return t and the times after it that fit beside it."""
        times = list(self.rows)
        chosen: list[float] = []
        num_rows = 0
        for time in times[times.index(t) :]:
            num_rows += len(self.rows[time])
            if chosen and num_rows > MAX_ROWS:
                break
            chosen.append(time)
        return chosen

    def _modulate(self, times: Sequence[float]) -> dict[float, Modulation]:
        conditions = [self.rows[t] for t in times]
        counts = [len(c) for c in conditions]

        def repeat_for_rows(values: Sequence[float]) -> Tensor:
            host = torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
            return host.to(conditions[0].device, non_blocking=True)

        r = None if self.following is None else repeat_for_rows([self.following[t] for t in times])
        scale = None
        if self.scale is not None and self.network.guidance_embedder is not None:
            scale = repeat_for_rows([self.scale] * len(times))
        whole = self.network.modulate(repeat_for_rows(times), torch.cat(conditions), r, scale)
        ends = torch.tensor(counts).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return {
            t: whole.rows(slice(start, end))
            for t, start, end in zip(times, starts, ends, strict=True)
        }


def compile_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of tensors that is compiled for each length of the first.

    All else about its inputs must be the same in every call.
    """
    graphs: dict[int, Callable[..., Tensor]] = {}

    def run(x: Tensor, *rest: Any) -> Tensor:  # Any: tensors, or named tuples of them
        if len(x) not in graphs:
            graphs[len(x)] = torch.compile(_with_own_code(function), fullgraph=True, dynamic=False)
        return graphs[len(x)](x, *rest)

    return run


def compile_forward(network: SiT) -> Forward:
    """Return `network.forward_modulated`, compiled; one graph for all samplers and steps."""
    compiled = compile_rows(network.forward_modulated)
    dtype = network.x_embedder.proj.weight.dtype

    def forward(x: Tensor, modulation: Modulation) -> Tensor:
        alike = Modulation(
            tuple(_fresh(m, dtype) for m in modulation.blocks), _fresh(modulation.final, dtype)
        )
        return compiled(_fresh(x, dtype), alike).to(x.dtype)

    return forward


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy: no view, in the order of its dimensions."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Any) -> Tensor:
        return function(*inputs)

    call.__code__ = call.__code__.replace()
    return call
