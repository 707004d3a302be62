"""Two processes share a run, are killed, and end where undisturbed ones end."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.engine.distributed import row_shares
from training.engine.weights import stage_weights

NUM_STEPS = 5
# Runs of two gloo processes, one of which kills itself in the last, once.
PROGRAM = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import training.engine.loop
from tests.training.engine.test_loop import CONFIG, Regression, unreadable
from tests.training.stages.test_repae import make_stage
from training.engine.loop import LoopConfig, save_checkpoint, train
from training.engine.distributed import average_gradients, is_true_anywhere, join_world

place, device = join_world()
layer = torch.nn.Linear(2, 1)
layer.weight.grad = torch.full((1, 2), place.rank + 1.0)
layer.bias.grad = torch.full((1,), 4.0) if place.rank else None
average_gradients(layer.parameters())
assert layer.weight.grad.tolist() == [[1.5, 1.5]] and layer.bias.grad.tolist() == [2.0]
assert is_true_anywhere(place.rank == 1, device) and not is_true_anywhere(False, device)

folder, (killed_at, victim) = Path(sys.argv[1]), map(int, sys.argv[2:])
is_first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
config = LoopConfig(num_steps={num_steps}, learning_rate=1e-3, save_every_s=-1.0)
if is_first_life:
    train(Regression(), CONFIG, folder / "regression", recipe={{}})
    train(make_stage(), config, folder / "whole", recipe={{}})
    stage = Regression()
    if place.rank:
        unreadable(stage, 0)
    else:  # slower than the other process
        training.engine.loop.save_checkpoint = lambda *x: (time.sleep(1), save_checkpoint(*x))
    try:
        train(stage, CONFIG, folder / "unread", recipe={{}})
    except OSError as error:
        assert (folder / "unread" / "checkpoint.pt").exists()
        (folder / f"fault_{{place.rank}}").write_text(str(error))
    training.engine.loop.save_checkpoint = save_checkpoint
stage = make_stage()
losses = stage.losses

def mortal(step, rows, samples):
    assert rows == slice(place.rank, place.rank + 1)
    if is_first_life and place.rank == victim and step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if not is_first_life:
        (folder / f"again_{{step}}").touch()
    return losses(step, rows, samples)

stage.losses = mortal
train(stage, config, folder / "killed", recipe={{}})
"""


def torchrun(program, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--max-restarts=1", str(program), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with a run of two processes, an end-to-end one, and the same killed at a step."""
    folder = tmp_path_factory.mktemp("runs")
    program = folder / "run.py"
    root = str(Path(__file__).parents[3])
    program.write_text(PROGRAM.format(root=root, num_steps=NUM_STEPS))
    seed = int.from_bytes(os.urandom(4))
    draw = random.Random(seed)
    killed_at, victim = draw.randrange(1, NUM_STEPS), draw.randrange(2)
    print(f"seed {seed}: process {victim} kills itself at step {killed_at}")
    assert "exitcode: -9" in torchrun(program, folder, killed_at, victim).stderr
    again = {int(f.name.removeprefix("again_")) for f in folder.glob("again_*")}
    assert again == set(range(killed_at, NUM_STEPS))
    return folder


@pytest.mark.slow
def test_an_end_to_end_run_that_was_killed_is_bit_equal_to_an_undisturbed_one(runs):
    """In all that is kept: networks, averages, statistics of latents, states of optimisers."""
    whole, killed = (
        torch.load(runs / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert {"transformer.bn.running_mean", "judge.0.weight"} <= whole["network"].keys()
    assert killed.pop("recipe") == whole.pop("recipe")  # text, which assert_close refuses
    torch.testing.assert_close(killed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_where_one_process_cannot_read_all_end_when_the_first_has_saved(runs):
    assert torch.load(runs / "unread" / "checkpoint.pt", weights_only=True)["step"] == 5
    assert "another process, which names it" in (runs / "fault_0").read_text()
    assert "a.tar tile 3_4" in (runs / "fault_1").read_text()


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(runs, tmp_path):
    from tests.training.engine.test_loop import CONFIG, Regression
    from training.engine.loop import train

    train(Regression(), CONFIG, tmp_path, recipe={})
    shared = stage_weights(runs / "regression", "any")
    for name, value in stage_weights(tmp_path, "any").items():
        # One process sums the batch in another order, no more.
        torch.testing.assert_close(value, shared[name], rtol=1e-3, atol=1e-5)


def test_the_rows_of_one_process_are_the_whole_batch_in_order():
    assert row_shares(12, 3) == [slice(0, 4), slice(4, 8), slice(8, 12)]
