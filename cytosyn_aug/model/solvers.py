"""Solvers of the flow, as free functions of a velocity; time grids, guidance and noise.

A velocity is `velocity(x, t) -> v` with x [B, ...] and a host float t, 1 = noise and 0 = data.
Because times are known on the host, guidance decides there whether the unconditional pass runs,
and no step waits for the device. Solvers keep the state in the dtype of the noise they are given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
AverageVelocity = Callable[[Tensor, float, float], Tensor]
ConditionalVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
ConditionalAverage = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def linear_grid(num_steps: int, start: float = 1.0) -> list[float]:
    """Return num_steps + 1 equally spaced times from `start` down to 0."""
    return [start * (1 - i / num_steps) for i in range(num_steps + 1)]


def shifted_grid(num_steps: int, start: float = 1.0, shift: float = 8.0) -> list[float]:
    """Return num_steps + 1 times from `start` to 0, dense near `start`, for a student's jumps.

    A student of a mean-flow kind is surest of its long jumps, and many short ones near data smooth
    what it draws; so most of the way is one jump, and those before it settle what is there.

    Args:
        num_steps: Jumps.
        start: First time, 1 = noise.
        shift: s in t = s u / (1 + (s - 1) u) for equally spaced u; 1 leaves them equally spaced.

    Source: Esser et al. (2024), "Scaling rectified flow transformers", equation 23; the usual
    shift by measurement on tiles of training slides (LOG.md, 2026-11-28).
    """
    return [start * shift * u / (1 + (shift - 1) * u) for u in linear_grid(num_steps)]


def polynomial_grid(num_steps: int, start: float = 1.0) -> list[float]:
    """Return num_steps + 1 times from `start` to 0, denser near noise.

    Source: Wang et al. (2025), "Differentiable solver search", the polynomial fitted to their
    optimal rectified-flow grid: tau(u) = -1.96 u^4 + 3.51 u^3 - 0.97 u^2 + 0.43 u.
    """

    def tau(u: float) -> float:
        return -1.96 * u**4 + 3.51 * u**3 - 0.97 * u**2 + 0.43 * u

    return [start * (1 - tau(i / num_steps) / tau(1.0)) for i in range(num_steps)] + [0.0]


def reference_grid(num_steps: int = 250, last_time: float = 0.04) -> list[float]:
    """Return the reference's times: `num_steps` equally spaced from 1 to `last_time`, then 0.

    Source: constants as in REPA-E.
    """
    return [*np.linspace(1.0, last_time, num_steps).tolist(), 0.0]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate dx/dt = v along `times` (either direction) with Euler steps."""
    for now, following in itertools.pairwise(times):
        x = x + (following - now) * velocity(x, now).to(x.dtype)
    return x


def adams_bashforth2(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate dx/dt = v with the variable-step two-step Adams-Bashforth method.

    One velocity per step, second order: x += h ((1 + r/2) v - (r/2) v_previous) with r = h /
    h_previous; the first step is Euler's.

    Args:
        velocity: velocity(x, t) -> dx/dt with a host float t, 1 = noise.
        x: State at `times[0]`.
        times: Monotone times, either direction.

    Returns:
        State at `times[-1]`, dtype of `x`.

    Source: Hairer, Norsett, Wanner (1993), Solving ODEs I, III.5, order 2.
    """
    v_previous, h_previous = None, 0.0
    for now, following in itertools.pairwise(times):
        h, v = following - now, velocity(x, now).to(x.dtype)
        if v_previous is None:
            x = x + h * v
        else:
            r = h / h_previous
            x = x + h * ((1 + r / 2) * v - (r / 2) * v_previous)
        v_previous, h_previous = v, h
    return x


def flow_map(average_velocity: AverageVelocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Jump along `times` with a network that knows the average velocity of a flow.

    x_r = x_t + (r - t) u(x_t, t, r), one forward per jump; exact for an exact u, whatever the grid.

    Args:
        average_velocity: u(x, t, r) with host floats t >= r, 1 = noise.
        x: State at `times[0]`.
        times: Falling times; students are taught jumps towards data only.

    Returns:
        State at `times[-1]`, dtype of `x`.

    Raises:
        ValueError: Times that rise.

    Source: Geng et al. (2025), "Mean Flows", algorithm 2.
    """
    for now, following in itertools.pairwise(times):
        if following > now:
            raise ValueError(f"jump from t = {now} to {following}; times must fall (1 is noise)")
        x = x + (following - now) * average_velocity(x, now, following).to(x.dtype)
    return x


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    noise: Callable[[int], Tensor],
    times: Sequence[float],
) -> Tensor:
    """Sample with the reference stochastic sampler of SiT and REPA-E.

    Drift d = x + (2 - t) v (the linear path with diffusion 2 t); noise sqrt(2 t |dt|); the last
    step has none.

    Args:
        velocity: velocity(x, t) -> dx/dt with a host float t, 1 = noise; called once for all but
            the last of `times`.
        x: Noise at t = 1.
        noise: Gives standard normal noise like `x` for step i, from 0 to the last but one.
        times: Falling times, `reference_grid` for the reference.

    Returns:
        Data, dtype of `x`; the reference keeps float64.

    Source: Ma et al. (2024), SiT, section 2.4 and appendix A; constants as in REPA-E.
    """
    last_time = times[-2]
    for i, (now, following) in enumerate(itertools.pairwise(times[:-1])):
        drift = x + (2 - now) * velocity(x, now).to(x.dtype)
        dt = following - now
        x = x + drift * dt + math.sqrt(2 * now * -dt) * noise(i).to(x, non_blocking=True)
    drift = x + (2 - last_time) * velocity(x, last_time).to(x.dtype)
    return x - last_time * drift


def guide(
    velocity: ConditionalVelocity,
    condition: Tensor,
    null_condition: Tensor,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """Bind a condition and classifier-free guidance inside an interval of time.

    Inside [low, high], v = v_null + scale (v_condition - v_null), both halves in one batch;
    outside it, and for scale 1, only the conditional pass runs. Time is 1 for noise, so CytoSyn's
    interval (0, 0.75) means no guidance in the noisiest quarter.

    Args:
        velocity: velocity(x [B, ...], t [B], condition [B, F]).
        condition: [B, F].
        null_condition: [F] or [B, F], the zero vector for CytoSyn.
        scale: Guidance scale; 1 for none.
        low: Lower end of the interval.
        high: Upper end of the interval.

    Source: Ho and Salimans (2022); Kynkaanniemi et al. (2024) for the interval.
    """
    both = torch.cat([condition, null_condition.expand_as(condition)])

    def guided(x: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not low <= t <= high:
            return velocity(x, _times(t, len(x), x.device), condition)
        times = _times(t, 2 * len(x), x.device)
        v_condition, v_null = velocity(torch.cat([x, x]), times, both).chunk(2)
        return v_null + scale * (v_condition - v_null)

    return guided


def bind_student(
    student: ConditionalAverage, condition: Tensor, scale: float = 1.0
) -> AverageVelocity:
    """Bind a condition and a guidance scale to a student, for `flow_map`.

    Guidance costs nothing here: the student has learned it.

    Args:
        student: student(x [B, ...], t [B], condition [B, F], r [B], scale [B]).
        condition: [B, F].
        scale: Guidance scale; 1 for none.
    """

    def average_velocity(x: Tensor, t: float, r: float) -> Tensor:
        start, end, scales = (_times(value, len(x), x.device) for value in (t, r, scale))
        return student(x, start, condition, end, scales)

    return average_velocity


def _times(value: float, num: int, device: torch.device) -> Tensor:
    return torch.full((num,), value, dtype=torch.float32, device=device)


def sample_noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Return standard normal noise [B, *shape], float32 on the CPU, row i from seeds[i] alone.

    A tile's noise is therefore bit-equal in any batch, order and on any device it is moved to.

    Args:
        seeds: One non-negative seed per tile.
        shape: Shape of one tile's noise.
        stream: Which draw of that tile; 0 is the start, 1 + i the i-th step of a stochastic
            sampler.
    """
    rows = []
    for seed in seeds:
        state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1]))
        rows.append(torch.randn(tuple(shape), dtype=torch.float32, generator=generator))
    return torch.stack(rows)


def interpolate(x: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """Return x_t = (1 - t) x + t eps; a tensor t must broadcast against x."""
    return (1 - t) * x + t * eps


def velocity_target(x: Tensor, eps: Tensor) -> Tensor:
    """Return the velocity dx_t/dt = eps - x of the path, what the transformer learns."""
    return eps - x


def denoised(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return the data end x = x_t - t v of the straight line through x_t with velocity v."""
    return x_t - t * v


def noised(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return the noise end eps = x_t + (1 - t) v of the straight line through x_t."""
    return x_t + (1 - t) * v
