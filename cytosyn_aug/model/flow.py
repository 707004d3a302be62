"""The linear path between data and noise: one definition for the loss and for the samplers.

Time t runs from 0 (data) to 1 (noise): x_t = (1 - t) x + t eps, velocity v = eps - x. Released
CytoSyn, REPA-E and diffusers' flow schedulers use this direction; the original SiT the other one.
"""

from __future__ import annotations

from torch import Tensor


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
