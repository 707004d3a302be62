"""The loop resumes bit for bit, averages with warm-up and refuses another recipe."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from training.data import step_generator
from training.loop import LoopConfig, train
from training.weights import stage_weights

CONFIG = LoopConfig(
    num_steps=8, learning_rate=1e-2, warmup_steps=3, cooldown_steps=2, report_every_steps=4
)


class Regression:
    """Fit a line to seeded noise; stands for any stage."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1)
        )
        self.steps = []

    def losses(self, step):
        self.steps.append(step)
        x = torch.randn(16, 3, generator=step_generator(1, step))
        return {"loss": (self.network(x)[:, 0] - x.sum(1)).square().mean()}

    def report(self, network, folder, step):
        return {"weight": float(network[0].weight.sum())}


def weights(folder):
    return stage_weights(folder, "any")


def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(tmp_path):
    train(Regression(), CONFIG, tmp_path / "whole", recipe={"a": 1})
    first = Regression()
    done = train(first, CONFIG, tmp_path / "parts", recipe={"a": 1}, minutes=0.0)
    assert (done, first.steps) == (1, [0])
    second = Regression()
    train(second, CONFIG, tmp_path / "parts", recipe={"a": 1})
    assert second.steps == list(range(1, 8))
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    ]
    for key in ("network", "average"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name])


def test_a_run_told_to_stop_saves_and_resumes_bit_equal(tmp_path):
    train(Regression(), CONFIG, tmp_path / "whole", recipe={})
    stage = Regression()
    draw = stage.losses

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(step)

    stage.losses = interrupted
    assert train(stage, CONFIG, tmp_path / "parts", recipe={}) == 3
    train(Regression(), CONFIG, tmp_path / "parts", recipe={})
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name])


def test_a_finished_run_does_nothing_more(tmp_path):
    train(Regression(), CONFIG, tmp_path, recipe={})
    again = Regression()
    assert train(again, CONFIG, tmp_path, recipe={}) == 8
    assert again.steps == []


def test_another_recipe_is_refused_and_named(tmp_path):
    train(Regression(), CONFIG, tmp_path, recipe={"rate": 1})
    with pytest.raises(ValueError, match=r"'rate': \(1, 2\)"):
        train(Regression(), CONFIG, tmp_path, recipe={"rate": 2})


def test_the_average_of_the_first_step_follows_the_warmed_up_decay(tmp_path):
    start = [p.detach().clone() for p in Regression().network.parameters()]
    stage = Regression()
    train(stage, CONFIG, tmp_path, recipe={}, minutes=0.0)
    decay = 1 / 10  # min(0.999, (1 + 0) / (10 + 0))
    for a, b, got in zip(
        start, stage.network.parameters(), weights(tmp_path).values(), strict=True
    ):
        torch.testing.assert_close(got, decay * a + (1 - decay) * b.detach())


def test_a_warm_start_takes_the_averaged_weights(tmp_path):
    train(Regression(), CONFIG, tmp_path / "first", recipe={"a": 1})
    stage = Regression()
    train(
        stage,
        LoopConfig(num_steps=1, learning_rate=0.0, muon_rate=0.0),
        tmp_path / "second",
        recipe={"a": 2},
        warm_start=weights(tmp_path / "first"),
    )
    for name, value in weights(tmp_path / "first").items():
        assert torch.equal(value, stage.network.state_dict()[name])


def test_a_warm_start_that_names_other_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \['9.weight'\] to start from"):
        train(Regression(), CONFIG, tmp_path, recipe={}, warm_start={"9.weight": torch.zeros(1)})


def test_curves_and_reports_are_written(tmp_path):
    train(Regression(), CONFIG, tmp_path, recipe={})
    reports = [json.loads(x) for x in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert [r["step"] for r in reports] == [4, 8]
    assert "loss" in json.loads((tmp_path / "curves.jsonl").read_text().splitlines()[0])


def test_a_diverged_step_stops_the_run(tmp_path):
    stage = Regression()
    stage.losses = lambda step: {"loss": stage.network[0].weight.sum() * float("inf")}
    with pytest.raises(RuntimeError, match="non-finite"):
        train(stage, CONFIG, tmp_path, recipe={})
