"""Targets that teach a network the average velocity of a flow, and so its jumps.

With v the velocity of a flow dx/dt = v(x, t), the average velocity from t to r <= t is u(x_t, t, r)
= (x_r - x_t) / (r - t), where x_r lies on the flow through x_t. It solves u = v + (r - t) du/dt,
the derivative along the flow, and it is the mean of its halves. Each becomes a target for u.

Time is 1 for noise and 0 for data. Nothing here knows what the network is.

Sources: Geng et al. (2025), "Mean Flows", eq. 6 (time there runs the same way, jumps are
z_r = z_t - (t - r) u); Frans et al. (2025), "Shortcut models", eq. 4; Lee et al. (2025),
"Decoupled MeanFlow".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BatchAverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(x [B, ...], t [B], r [B]) -> [B, ...]."""

BatchVelocity = Callable[[Tensor, Tensor], Tensor]
"""v(x [B, ...], t [B]) -> [B, ...]."""

Target = Literal["derivative", "difference", "midpoint"]
Rule = Callable[
    [BatchAverageVelocity, BatchVelocity, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]
]

_DIFFERENCE_STEP = 1e-3


def from_derivative(
    u: BatchAverageVelocity, velocity: BatchVelocity, x: Tensor, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u(x, t, r) and its target v + (r - t) du/dt, exact by forward-mode differentiation.

    Attention runs by its written-out formula, because the fused kernels have no forward mode.

    Args:
        u: The network.
        velocity: Of the flow; no gradient flows through it.
        x: State at t, [B, ...].
        t: Times [B].
        r: Earlier times [B], r <= t.

    Returns:
        Value, through which gradients flow, and target, through which none do.
    """
    x, t = x.clone(), t.clone()  # compiled forward mode refuses parts of larger tensors
    v = velocity(x, t).detach()
    along = (v.to(x.dtype), torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):
        value, derivative = torch.func.jvp(  # type: ignore[misc]  # stub: with or without aux
            lambda x, t: u(x, t, r), (x, t), along
        )
    return value, (v + _as_rows(r - t, v) * derivative).detach()


def from_difference(
    u: BatchAverageVelocity, velocity: BatchVelocity, x: Tensor, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as `from_derivative`, with a central difference over +-0.001 in time.

    For kernels without forward mode. The network must compute in float32: bfloat16 rounds by more
    than it changes over such a step.
    """
    h, value = _DIFFERENCE_STEP, u(x, t, r)
    with torch.no_grad():
        v = velocity(x, t)
        derivative = (u(x + h * v, t + h, r) - u(x - h * v, t - h, r)) / (2 * h)
        target = v + _as_rows(r - t, v) * derivative
    return value, target


def from_midpoint(
    u: BatchAverageVelocity, velocity: BatchVelocity, x: Tensor, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u(x, t, r) and, as target, the mean of its two halves, one after the other.

    Needs neither a derivative nor the velocity, which enters where u(x, t, t) is taught; but what
    the halves get wrong adds up.
    """
    del velocity
    s = (t + r) / 2
    value = u(x, t, r)  # first: autocast keeps its casts of weights, with or without gradient
    with torch.no_grad():
        first = u(x, t, s)
        second = u(x + _as_rows(s - t, x) * first, s, r)
    return value, (first + second) / 2


RULES: dict[Target, Rule] = {
    "derivative": from_derivative,
    "difference": from_difference,
    "midpoint": from_midpoint,
}


def ordered_times(
    uniform: Tensor, other: Tensor, locations: tuple[float, float], scale: float
) -> tuple[Tensor, Tensor]:
    """Return times t >= r: the larger and smaller of two logit-normal draws.

    Args:
        uniform: Numbers [B] in (0, 1) that the draw at `locations[0]` comes from.
        other: The same for `locations[1]`.
        locations: Means of the logits.
        scale: Standard deviation of the logits.
    """
    first = logit_normal(uniform, locations[0], scale)
    second = logit_normal(other, locations[1], scale)
    return torch.maximum(first, second), torch.minimum(first, second)


def logit_normal(uniform: Tensor, location: float, scale: float) -> Tensor:
    """Return logit-normal times from uniform numbers in (0, 1). Source: Esser et al. (2024)."""
    return torch.sigmoid(location + scale * torch.special.ndtri(uniform.double())).float()


def _as_rows(factor: Tensor, like: Tensor) -> Tensor:
    return factor.view(-1, *(1,) * (like.ndim - 1))
