"""The loop resumes bit for bit, averages with warm-up and refuses another recipe."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from training.data.batches import Batches, step_generator
from training.engine.loop import LoopConfig, train
from training.engine.weights import stage_weights

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

    batches = Batches(num_items=160, size=16, seed=1, name="slide/{}.png".format)

    def read(self, step, rows):
        return torch.randn(16, 3, generator=step_generator(1, step))[rows]

    def losses(self, step, rows, x):
        self.steps.append(step)
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

    def interrupted(step, *given):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(step, *given)

    stage.losses = interrupted
    before = signal.getsignal(signal.SIGTERM)
    assert train(stage, CONFIG, tmp_path / "parts", recipe={}) == 3
    assert signal.getsignal(signal.SIGTERM) is before
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


def spoil(stage, steps):
    """Make the loss of some steps infinite."""
    losses = stage.losses

    def spoilt(step, *given):
        found = losses(step, *given)
        return {"loss": found["loss"] * (float("inf") if step in steps else 1.0)}

    stage.losses = spoilt
    return stage


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_named(tmp_path, capsys):
    stage = spoil(Regression(), {0})
    before = {k: v.clone() for k, v in stage.network.state_dict().items()}
    train(stage, CONFIG, tmp_path, recipe={}, minutes=0.0)
    for name, value in stage.network.state_dict().items():
        assert torch.equal(value, before[name])
    samples = stage.batches.index(0).tolist()
    names = [f"slide/{k}.png" for k in samples]
    said = f"step 1 skipped (1 in a row): its gradient is not finite; samples {names[0]}, "
    assert said in capsys.readouterr().err
    noted = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert noted == {"step": 1, "samples": samples, "names": names}


def test_single_bad_steps_are_survived_but_not_many_in_a_row(tmp_path):
    config = replace(CONFIG, max_skipped=3)
    train(spoil(Regression(), {1, 2, 5, 6}), config, tmp_path / "some", recipe={})
    stage = spoil(Regression(), {3, 4, 5})
    first = stage.batches.index(5).tolist()[:4]
    named = ", ".join(f"slide/{k}\\.png" for k in first) + " and 12 more"
    with pytest.raises(FloatingPointError, match=f"3 steps in a row up to 6 .*{named}"):
        train(stage, config, tmp_path / "many", recipe={})
    for value in weights(tmp_path / "many").values():
        assert value.isfinite().all()


def unreadable(stage, first):
    """Make the samples from a row of step 5 on unreadable, as those of a damaged shard are."""
    read = stage.read

    def failing(step, rows):
        if step == 5 and rows.start >= first:
            raise ValueError("train/a.tar tile 3_4 differs from what was written")
        return read(step, rows)

    stage.read = failing
    return stage


@pytest.mark.parametrize("first", [0, 12])
def test_a_sample_that_cannot_be_read_is_named_and_costs_nothing(tmp_path, first):
    config = replace(CONFIG, num_micro_batches=4)
    train(Regression(), config, tmp_path / "whole", recipe={})
    stage = unreadable(Regression(), first)
    for _ in range(2):  # unmended, it is found again
        with pytest.raises(OSError, match=r"a\.tar tile 3_4 differs.*sample of step 6\..*mend it"):
            train(stage, config, tmp_path / "parts", recipe={})
        assert torch.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 5
    assert not (tmp_path / "parts" / "checkpoint.previous.pt").exists()
    mended = Regression()
    train(mended, config, tmp_path / "parts", recipe={})
    assert mended.steps == [5] * 4 + [6] * 4 + [7] * 4
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name])


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    train(Regression(), CONFIG, tmp_path / "whole", recipe={})
    train(Regression(), replace(CONFIG, num_micro_batches=4), tmp_path / "parts", recipe={})
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(value, weights(tmp_path / "parts")[name], rtol=1e-3, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch of 16 cannot be shared by 1 processes with 3"):
        train(Regression(), replace(CONFIG, num_micro_batches=3), tmp_path, recipe={})


def test_parts_are_clipped_by_themselves(tmp_path):
    """A part with a huge gradient does not shrink the step of another."""

    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.network = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})

        def losses(self, step, rows, samples):
            a, b = self.network["a"], self.network["b"]
            return {"loss": 1e6 * a.weight.sum() + b.weight.sum()}

        def report(self, network, folder, step):
            return {}

    stage = Two()
    train(stage, replace(CONFIG, num_steps=1, cooldown_steps=0), tmp_path, recipe={})
    assert float(stage.network["b"].weight.grad) == pytest.approx(1.0, rel=1e-3)
    assert float(stage.network["a"].weight.grad) == pytest.approx(1.0, rel=1e-3)


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(tmp_path, capsys):
    saves_always = replace(CONFIG, save_every_s=-1.0)
    train(Regression(), saves_always, tmp_path, recipe={})
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:500])
    leftover = tmp_path / "checkpoint.99999999.tmp"  # of a process that was killed
    leftover.write_bytes(b"half")
    stage = Regression()
    train(stage, CONFIG, tmp_path, recipe={})
    assert "checkpoint.pt was cut short" in capsys.readouterr().err
    assert stage.steps == []  # the last step was saved twice: in its turn and at the end
    assert not leftover.exists()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        train(Regression(), CONFIG, tmp_path, recipe={})


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    train(Regression(), CONFIG, tmp_path, recipe={}, minutes=0.0)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 8 could not be saved .*No space left"):
        train(Regression(), CONFIG, tmp_path, recipe={})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
