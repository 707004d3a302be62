"""Drawing along a known grid: the numbers of step by step, in as few passes, for a compiler."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cytosyn_aug.model import sampler as drawing
from cytosyn_aug.model.sampler import (
    Guidance,
    bind_jumps,
    bind_velocity,
    choose_guidance,
    draw_latents,
    time_grid,
)
from cytosyn_aug.model.solvers import bind_student, guide
from cytosyn_aug.model.transformer import SiT
from tests.support.synthetic import random_parts
from training.recipes import smoke_distil
from training.stages.distil import build_student

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # one large product rounds otherwise than many small ones


@pytest.fixture(scope="module")
def network():
    return randomised(random_parts().transformer)


@pytest.fixture(scope="module")
def student(network):
    return randomised(build_student(smoke_distil(), network))


def randomised(network):
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=draw)
    return network.eval().requires_grad_(False)


def inputs(network, num=3):
    draw = torch.Generator().manual_seed(1)
    side, width = network.config["input_size"], network.config["conditioning_dim"]
    x = torch.randn(num, 4, side, side, generator=draw)
    return x, torch.randn(num, width, generator=draw), torch.randn(width, generator=draw)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0), Guidance(2.5, 0.3, 0.6)])
@pytest.mark.parametrize("max_rows", [1, 7, 256])
def test_a_bound_velocity_is_that_of_step_by_step_guidance(
    network, guidance, max_rows, monkeypatch
):
    monkeypatch.setattr(drawing, "MAX_ROWS", max_rows)
    x, condition, null = inputs(network)
    times = time_grid("ab2", 6)
    bound = bind_velocity(network, times, condition, null, guidance, network.forward_modulated)
    known = guide(network, condition, null, *guidance)
    for t in times[:-1]:
        torch.testing.assert_close(bound(x, t), known(x, t), **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_bound_jumps_are_those_of_the_student(student, scale):
    x, condition, _ = inputs(student)
    times = time_grid("student", 4)
    bound = bind_jumps(student, times, condition, scale, student.forward_modulated)
    known = bind_student(student, condition, scale)
    for t, r in itertools.pairwise(times):
        torch.testing.assert_close(bound(x, t, r), known(x, t, r), **CLOSE)


def test_both_halves_are_one_pass_and_the_unconditional_one_runs_only_inside(network):
    x, condition, null = inputs(network)
    sizes = []

    def forward(x, modulation):
        sizes.append(len(x))
        return network.forward_modulated(x, modulation)

    times = [1.0, 0.8, 0.7, 0.2, 0.0]
    draw_latents(
        network, x, times, condition, null,
        sampler="ab2", guidance=Guidance(2.0, 0.3, 0.75), forward=forward,
    )  # fmt: skip
    assert sizes == [3, 3, 6, 3]


def test_modulations_of_all_steps_take_one_pass_where_they_fit(network, monkeypatch):
    x, condition, null = inputs(network)
    rows = []
    original = SiT.modulate
    monkeypatch.setattr(
        SiT, "modulate", lambda self, t, *rest: rows.append(len(t)) or original(self, t, *rest)
    )
    times = time_grid("euler_maruyama", 100)
    noise = torch.zeros_like(x)
    draw_latents(
        network, x.double(), times, condition, null,
        sampler="euler_maruyama", guidance=Guidance(2.0), step_noise=lambda _: noise,
    )  # fmt: skip
    assert sum(rows) == sum(6 if Guidance(2.0).acts_at(t) else 3 for t in times[:-1])
    assert len(rows) == 3
    assert max(rows) <= 256


@pytest.mark.parametrize("sampler", ["student", "ab2"])
def test_every_step_runs_the_same_compiled_graph(network, student, sampler):
    """One graph without a break, traced once: no step bakes a number in."""
    chosen = student if sampler == "student" else network
    x, condition, null = inputs(chosen)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(chosen.forward_modulated, fullgraph=True, backend=counter)
    times = time_grid(sampler, 5)
    settings = {"sampler": sampler, "guidance": Guidance()}
    found = draw_latents(chosen, x, times, condition, null, forward=compiled, **settings)
    expected = draw_latents(chosen, x, times, condition, null, **settings)
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.WAITS), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["student", "ab2"])
def test_no_step_waits_for_the_device(network, student, sampler):
    chosen = student if sampler == "student" else network
    x, condition, null = inputs(chosen)
    with NoWaiting():
        draw_latents(
            chosen, x, time_grid(sampler, 4), condition, null,
            sampler=sampler, guidance=Guidance(2.0),
        )  # fmt: skip
    with pytest.raises(AssertionError, match="local_scalar"), NoWaiting():
        x.sum().item()


def test_the_state_keeps_its_type_whatever_the_networks(network):
    x, condition, null = inputs(network)
    low = randomised(random_parts().transformer).to(torch.bfloat16)
    for state in (torch.float32, torch.float64):
        drawn = draw_latents(
            low, x.to(state), time_grid("ab2", 3), condition, null,
            sampler="ab2", guidance=Guidance(),
        )  # fmt: skip
        assert drawn.dtype == state


def test_guidance_that_was_not_given_is_filled_in_and_untaught_one_refused():
    assert choose_guidance(2.0, None, None, None) == (2.0, 0.0, 0.75)
    assert choose_guidance(2.0, 0.1, None, None) == (2.0, 0.1, 0.75)
    taught = (3.0, 0.2, 0.6)
    assert choose_guidance(3.0, None, 0.6, taught) == (3.0, 0.2, 0.6)
    for scale, low in ((4.0, None), (2.0, 0.3), (0.5, None)):
        with pytest.raises(ValueError, match=r"taught 1 to 3\.0"):
            choose_guidance(scale, low, None, taught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddim", 4), "expected one of"),
        (("student", 0), "at least 1"),
        (("ab2", 1), "at least 2"),
        (("euler_maruyama", 10, 0.5), "starts at t = 1"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_grid(*arguments)
