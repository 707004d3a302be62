"""Two processes share a run, are killed, and end where undisturbed ones end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.parallel import row_shares
from training.weights import stage_weights

# A run of two gloo processes; the second kills itself at a step, once.
PROGRAM = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_loop import CONFIG, Regression
from training.loop import train
from training.parallel import average_gradients, is_true_anywhere, join_world

place, device = join_world()
layer = torch.nn.Linear(2, 1)
layer.weight.grad = torch.full((1, 2), place.rank + 1.0)
layer.bias.grad = torch.full((1,), 4.0) if place.rank else None
average_gradients(layer.parameters())
assert layer.weight.grad.tolist() == [[1.5, 1.5]] and layer.bias.grad.tolist() == [2.0]
assert is_true_anywhere(place.rank == 1, device) and not is_true_anywhere(False, device)
folder, killed_at = Path(sys.argv[1]), int(sys.argv[2])
is_first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
stage = Regression()
losses = stage.losses

def mortal(step, rows):
    if is_first_life and place.rank == 1 and step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    assert rows == slice(8 * place.rank, 8 * place.rank + 8)
    return losses(step, rows)

stage.losses = mortal
train(stage, replace(CONFIG, save_every_s=-1.0), folder, recipe={{}})
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


@pytest.mark.slow
def test_two_killed_processes_resume_to_bit_equal_weights(tmp_path):
    program = tmp_path / "run.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    step = int.from_bytes(os.urandom(1)) % 7 + 1
    torchrun(program, tmp_path / "whole", -1)
    killed = torchrun(program, tmp_path / "killed", step)
    assert "exitcode: -9" in killed.stderr
    whole, resumed = (stage_weights(tmp_path / name, "any") for name in ("whole", "killed"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), f"{name} differs, killed at step {step}"

    from test_loop import CONFIG, Regression

    from training.loop import train

    train(Regression(), CONFIG, tmp_path / "alone", recipe={})
    for name, value in stage_weights(tmp_path / "alone", "any").items():
        # One process sums the batch in another order, no more.
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)


def test_the_rows_of_one_process_are_the_whole_batch_in_order():
    assert row_shares(12, 3) == [slice(0, 4), slice(4, 8), slice(8, 12)]
