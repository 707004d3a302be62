"""Targets of the distillation against a flow whose jumps are known in closed form.

Data are N(mean, std^2) in every coordinate, so that the flow scales: with s(t)^2 = (1 - t)^2 std^2
+ t^2, x_r - (1 - r) mean = (x_t - (1 - t) mean) s(r) / s(t).
"""

import pytest
import torch
from torch import nn

from training.data.batches import step_generator
from training.stages.losses import cauchy_error
from training.stages.mean_flow import (
    RULES,
    from_derivative,
    from_difference,
    from_midpoint,
    logit_normal,
    ordered_times,
)

MEAN, STD = 1.5, 0.4
F64 = torch.float64


def spread(t):
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def velocity(x, t):
    t = t[:, None]
    return (t - (1 - t) * STD**2) / spread(t) ** 2 * (x - (1 - t) * MEAN) - MEAN


def jumped(x, t, r):
    t, r = t[:, None], r[:, None]
    return (1 - r) * MEAN + (x - (1 - t) * MEAN) * spread(r) / spread(t)


def average_velocity(x, t, r):
    return (jumped(x, t, r) - x) / (r - t)[:, None]


def states(num=64, dtype=F64):
    draw = torch.Generator().manual_seed(0)
    t, r = torch.rand(2, num, generator=draw, dtype=dtype).sort(0, descending=True).values
    return torch.randn(num, 3, generator=draw, dtype=dtype), t, r - 0.01


def test_the_closed_form_is_the_integral_of_its_velocity():
    x, t, r = states()
    h = 1e-5
    slope = (jumped(x, t, r + h) - jumped(x, t, r - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity(jumped(x, t, r), r), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_the_exact_average_velocity_is_the_fixed_point_of_every_target(name):
    x, t, r = states()
    value, target = RULES[name](average_velocity, velocity, x, t, r)
    torch.testing.assert_close(value, average_velocity(x, t, r))
    # The central difference errs in the square of its step of 0.001, most where s(t) is small.
    tolerance = 1e-4 if name == "difference" else 1e-10
    torch.testing.assert_close(target, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", [from_derivative, from_difference])
def test_a_wrong_network_is_sent_to_velocity_plus_its_own_derivative(rule):
    """With u = x t^2 - r the derivative along the flow is v t^2 + 2 x t."""
    x, t, r = states()

    def u(x, t, r):
        return x * t[:, None] ** 2 - r[:, None]

    v = velocity(x, t)
    derivative = v * t[:, None] ** 2 + 2 * x * t[:, None]
    target = rule(u, velocity, x, t, r)[1]
    torch.testing.assert_close(target, v + (r - t)[:, None] * derivative, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES.values())
def test_targets_carry_no_gradient_and_values_do(rule):
    x, t, r = states(dtype=torch.float32)
    weight = torch.ones((), requires_grad=True)
    value, target = rule(lambda x, t, r: weight * average_velocity(x, t, r), velocity, x, t, r)
    assert not target.requires_grad
    value.sum().backward()
    assert weight.grad is not None


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3)
        )

    def forward(self, x, t, r):
        return self.layers(torch.cat([x, t[:, None], r[:, None]], 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_one_jump_of_a_distilled_network_beats_one_step_of_euler(name):
    """A small network, taught half velocities and half jumps as in the distil stage."""
    network = Mlp()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(300):
        draw = step_generator(0, step)
        x0 = MEAN + STD * torch.randn(256, 3, generator=draw)
        eps = torch.randn(256, 3, generator=draw)
        t, r = torch.rand(2, 256, generator=draw).sort(0, descending=True).values
        x = (1 - t[:, None]) * x0 + t[:, None] * eps
        value, target = RULES[name](network, velocity, x, t, r)
        at_once = network(x, t, t) - velocity(x, t)
        loss = (value - target).square().mean() + at_once.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noise = torch.randn(2000, 3, generator=step_generator(1, 0))
    one, zero = torch.ones(2000), torch.zeros(2000)
    exact = jumped(noise, one, zero)
    euler = (noise - velocity(noise, one) - exact).square().mean().sqrt()
    student = (noise - network(noise, one, zero) - exact).square().mean().sqrt()
    # Measured: 0.2 to 0.3 of Euler's error with a derivative, 0.56 with midpoints.
    assert student < 0.7 * euler


def test_times_are_ordered_and_follow_their_law():
    uniform = torch.linspace(0.0005, 0.9995, 1000)
    t, r = ordered_times(uniform, uniform.flip(0), (0.4, -1.2), 1.0)
    assert bool((t >= r).all())
    logits = torch.logit(logit_normal(uniform, 0.4, 1.3).double())
    assert logits.mean().item() == pytest.approx(0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.3, abs=0.01)


def test_the_cauchy_scale_settles_where_error_and_scale_are_equal():
    """For errors all alike, d/ds [log(1 + e / s) + log(s) / 2] = 0 at s = e."""
    log_scale = torch.zeros(1, dtype=F64, requires_grad=True)
    predicted = torch.full((1, 4), 0.3, dtype=F64)
    optimiser = torch.optim.LBFGS([log_scale], max_iter=100)

    def closure():
        optimiser.zero_grad()
        loss = cauchy_error(predicted, torch.zeros(1, 4), log_scale)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert log_scale.exp().item() == pytest.approx(0.09, rel=1e-4)


def test_a_row_far_off_weighs_no_more_than_its_scale():
    predicted = torch.tensor([[1e-3], [1e3]], requires_grad=True)
    cauchy_error(predicted, torch.zeros(2, 1), torch.zeros(2)).backward()
    assert predicted.grad.abs().max() < 2e-3


def test_the_midpoint_target_is_two_jumps_one_after_the_other():
    x, t, r = states()
    target = from_midpoint(average_velocity, velocity, x, t, r)[1]
    s = (t + r) / 2
    twice = jumped(jumped(x, t, s), s, r)
    torch.testing.assert_close(x + (r - t)[:, None] * target, twice)
