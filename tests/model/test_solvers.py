"""Solvers against closed forms and against their written-out formulas."""

import itertools
import math

import numpy as np
import pytest
import torch

from cytosyn_aug.model.solvers import (
    adams_bashforth2,
    bind_student,
    denoised,
    euler,
    euler_maruyama,
    flow_map,
    guide,
    interpolate,
    linear_grid,
    noised,
    polynomial_grid,
    reference_grid,
    sample_noise,
    shifted_grid,
    velocity_target,
)

F64 = torch.float64


@pytest.mark.parametrize("grid", [linear_grid, polynomial_grid])
@pytest.mark.parametrize("solver", [euler, adams_bashforth2])
def test_a_constant_field_is_integrated_exactly(solver, grid):
    x, v = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    got = solver(lambda x_t, t: v, x, grid(5))
    torch.testing.assert_close(got, x - v)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (adams_bashforth2, 2)])
@pytest.mark.parametrize("grid", [linear_grid, polynomial_grid])
def test_a_linear_field_shows_the_order_of_the_solver(solver, order, grid):
    # dx/dt = a x + t from t = 1 to 0, solved in closed form.
    a, start = 1.7, 0.8
    constant = (start + 1 / a + 1 / a**2) * math.exp(-a)
    exact = constant - 1 / a**2
    errors = []
    for steps in (40, 80, 160):
        got = solver(lambda x, t: a * x + t, torch.tensor([start], dtype=F64), grid(steps))
        errors.append(abs(got.item() - exact))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_adams_bashforth_equals_the_written_out_steps():
    times = [1.0, 0.7, 0.45, 0.0]

    def field(x, t):
        return torch.sin(3 * x) + t**2

    x = torch.randn(4, dtype=F64)
    v0 = field(x, 1.0)
    x1 = x - 0.3 * v0
    v1 = field(x1, 0.7)
    # Quadratic interpolation through v0 and v1, integrated over the step.
    x2 = x1 + (-0.25) * v1 + 0.5 * (-0.25) ** 2 * (v1 - v0) / (0.7 - 1.0)
    v2 = field(x2, 0.45)
    x3 = x2 + (-0.45) * v2 + 0.5 * (-0.45) ** 2 * (v2 - v1) / (0.45 - 0.7)
    torch.testing.assert_close(adams_bashforth2(field, x, times), x3, rtol=1e-12, atol=1e-12)


def test_euler_maruyama_equals_the_reference_in_its_own_terms():
    """REPA-E writes drift through the score; ours through the velocity. Same numbers."""
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((2, 3))
    eps = rng.standard_normal((9, 2, 3))

    def field(x, t):
        return 0.3 * x - t * np.cos(x)

    x = x0.copy()
    grid = [*np.linspace(1.0, 0.04, 10), 0.0]
    for i in range(10):
        t, dt = grid[i], grid[i + 1] - grid[i]
        v = field(x, t)
        score = -(x + (1 - t) * v) / t
        drift = v - 0.5 * (2 * t) * score
        x = x + drift * dt
        if i < 9:
            x = x + math.sqrt(2 * t) * math.sqrt(abs(dt)) * eps[i]
    got = euler_maruyama(
        lambda y, t: torch.from_numpy(field(y.numpy(), t)),
        torch.from_numpy(x0),
        lambda i: torch.from_numpy(eps[i]),
        reference_grid(10),
    )
    np.testing.assert_allclose(got.numpy(), x, rtol=1e-12)


def growth(x, t, r):
    """Average velocity of dx/dt = 2 x, whose flow is x_r = x_t exp(2 (r - t))."""
    return x * (math.exp(2 * (r - t)) - 1) / (r - t)


@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.3, 0.0], linear_grid(7), shifted_grid(5)])
def test_an_exact_average_velocity_lands_on_the_flow_whatever_the_jumps(times):
    x = torch.randn(5, dtype=F64)
    torch.testing.assert_close(flow_map(growth, x, times), x * math.exp(-2))


def test_jumps_compose():
    x = torch.randn(5, dtype=F64)
    whole = flow_map(growth, x, [0.9, 0.5, 0.2])
    parts = flow_map(growth, flow_map(growth, x, [0.9, 0.5]), [0.5, 0.2])
    assert torch.equal(whole, parts)


def test_a_jump_of_a_constant_velocity_is_exact():
    x, v = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(flow_map(lambda x_t, t, r: v, x, [1.0, 0.25]), x - 0.75 * v)


def test_jumps_towards_noise_are_refused():
    with pytest.raises(ValueError, match=r"jump from t = 0.2 to 0.5; times must fall"):
        flow_map(growth, torch.zeros(1), [1.0, 0.2, 0.5])


def test_a_bound_student_gets_times_condition_and_scale_for_every_row():
    seen = []

    def student(x, t, condition, r, scale):
        seen.append([y.tolist() for y in (t, condition, r, scale)])
        return x

    average = bind_student(student, torch.tensor([[3.0], [4.0]]), 2.5)
    flow_map(average, torch.zeros(2, 1), [1.0, 0.5])
    assert seen == [[[1.0, 1.0], [[3.0], [4.0]], [0.5, 0.5], [2.5, 2.5]]]


def gaussian_velocity(mean, std):
    """Velocity E[eps - x | x_t] when data are N(mean, std^2)."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = x - (1 - t) * mean
        return (t * centred - (1 - t) * std**2 * centred) / variance - mean

    return velocity


def test_the_reference_sampler_reproduces_a_gaussian():
    torch.manual_seed(0)
    x = torch.randn(20_000, dtype=F64)
    got = euler_maruyama(
        gaussian_velocity(1.5, 0.4), x, lambda i: torch.randn(20_000, dtype=F64), reference_grid()
    )
    # 20,000 draws: standard error 0.003 of the mean and 0.002 of the deviation; discretisation
    # adds about 0.01.
    assert got.mean().item() == pytest.approx(1.5, abs=0.015)
    assert got.std().item() == pytest.approx(0.4, abs=0.015)


def mixture_velocity(means, weights, std):
    means, weights = torch.tensor(means, dtype=F64), torch.tensor(weights, dtype=F64)

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = x[:, None] - (1 - t) * means
        log = -0.5 * centred.square() / variance + weights.log()
        share = log.softmax(1)
        data = means + (1 - t) * std**2 * centred / variance
        noise = t * centred / variance
        return (share * (noise - data)).sum(1)

    return velocity


@pytest.mark.parametrize("name", ["ab2", "euler_maruyama"])
def test_a_gaussian_mixture_with_known_velocity_is_reproduced(name):
    torch.manual_seed(1)
    velocity = mixture_velocity([-2.0, 1.0], [0.3, 0.7], 0.3)
    x = torch.randn(20_000, dtype=F64)
    if name == "ab2":
        got = adams_bashforth2(velocity, x, polynomial_grid(64))
    else:
        got = euler_maruyama(
            velocity, x, lambda i: torch.randn(20_000, dtype=F64), reference_grid()
        )
    low = got < -0.5
    assert low.double().mean().item() == pytest.approx(0.3, abs=0.015)
    assert got[low].mean().item() == pytest.approx(-2.0, abs=0.03)
    assert got[~low].mean().item() == pytest.approx(1.0, abs=0.03)
    assert got[~low].std().item() == pytest.approx(0.3, abs=0.03)


def toy(x, t, condition):
    return x * t[:, None] + condition[:, :1]


def test_guidance_of_one_is_bit_equal_to_none():
    x, c = torch.randn(3, 4), torch.randn(3, 2)
    plain = guide(toy, c, torch.zeros(2), 1.0)(x, 0.5)
    assert torch.equal(plain, toy(x, torch.full((3,), 0.5), c))


def test_guidance_is_the_written_formula_and_extrapolates():
    x, c, null = torch.randn(3, 4), torch.randn(3, 2), torch.zeros(2)
    t = torch.full((3,), 0.5)
    want = toy(x, t, null.expand(3, 2)) + 2.5 * (toy(x, t, c) - toy(x, t, null.expand(3, 2)))
    torch.testing.assert_close(guide(toy, c, null, 2.5)(x, 0.5), want)


def test_the_unconditional_pass_runs_only_inside_the_interval():
    rows = []

    def counting(x, t, condition):
        rows.append((round(t[0].item(), 3), len(x)))
        return toy(x, t, condition)

    velocity = guide(counting, torch.randn(3, 2), torch.zeros(2), 2.5, 0.1, 0.75)
    for t in (1.0, 0.76, 0.75, 0.4, 0.1, 0.05):
        velocity(torch.randn(3, 4), t)
    assert rows == [(1.0, 3), (0.76, 3), (0.75, 6), (0.4, 6), (0.1, 6), (0.05, 3)]


def test_noise_is_bit_equal_whatever_the_batch():
    together = sample_noise([5, 9, 2**62], (4, 3, 3))
    assert torch.equal(together[1:2], sample_noise([9], (4, 3, 3)))
    assert torch.equal(together[2:], sample_noise([2**62], (4, 3, 3)))
    assert not torch.equal(together[1:2], sample_noise([9], (4, 3, 3), stream=1))


def test_grids_start_and_end_where_they_say_and_fall():
    for grid in (linear_grid, polynomial_grid):
        times = grid(7, 0.6)
        assert len(times) == 8
        assert times[0] == pytest.approx(0.6)
        assert times[-1] == 0.0
        assert all(a > b for a, b in itertools.pairwise(times))


def test_the_grid_of_a_students_jumps_is_the_shifted_one():
    """The formula of Esser et al. (2024) for 4 jumps: u = 3/4, 1/2, 1/4 with s = 8."""
    assert shifted_grid(4) == pytest.approx([1, 24 / 25, 8 / 9, 8 / 11, 0])
    assert shifted_grid(4, 0.5) == pytest.approx([t / 2 for t in shifted_grid(4)])
    assert shifted_grid(3, shift=1.0) == pytest.approx(linear_grid(3))
    assert shifted_grid(1) == [1, 0]


def test_the_path_starts_at_data_and_ends_at_noise():
    x, eps = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(interpolate(x, eps, 0.0), x)
    assert torch.equal(interpolate(x, eps, 1.0), eps)


def test_the_target_velocity_leads_back_to_both_ends():
    x, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None]
    x_t, v = interpolate(x, eps, t), velocity_target(x, eps)
    torch.testing.assert_close(denoised(x_t, v, t), x)
    torch.testing.assert_close(noised(x_t, v, t), eps)
