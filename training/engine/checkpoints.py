"""Checkpoints of a run: the newest and the one before, each complete or absent.

A run that was killed goes on from the newest that can be read, and only with the recipe it began
with. It refuses to know what the tensors mean.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("checkpoint.pt", "checkpoint.previous.pt")


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint, the newest or the one before."""
    return any((folder / name).is_file() for name in NAMES)


def resume(
    run_folder: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    recipe: dict[str, object],
    warm_start: dict[str, Tensor] | None,
) -> int:
    """Load the newest checkpoint, or what a new run starts from; return the steps that are done.

    Args:
        run_folder: Folder of the run.
        network: Receives the weights.
        average: Receives the averaged ones.
        optimisers: Receive their states.
        recipe: The run's; a checkpoint of another is refused.
        warm_start: Weights of a new run; those it lacks stay as they are.

    Raises:
        ValueError: Another recipe, weights that the network does not have, or no checkpoint that
            can be read although there are some.
    """
    state = read_newest(run_folder)
    if state is None:
        for target in (network, average):
            mismatch = target.load_state_dict(warm_start or {}, strict=False)
            if mismatch.unexpected_keys:
                raise ValueError(f"this network has no {mismatch.unexpected_keys} to start from")
        return 0
    was = json.loads(state["recipe"])
    now = json.loads(json.dumps(recipe))
    if was != now:
        changed = {k: (was.get(k), now.get(k)) for k in was | now if was.get(k) != now.get(k)}
        raise ValueError(
            f"{run_folder} holds a run of another recipe (was, now): {changed}; "
            "choose another --out, and --warm-start from this one"
        )
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return int(state["step"])


def read_newest(run_folder: Path) -> Any:  # Any: tensors, numbers and text, or None
    """Return the newest checkpoint that can be read, or None for a new run.

    Raises:
        ValueError: There are checkpoints, and none can be read.
    """
    files = [f for name in NAMES if (f := run_folder / name).exists()]
    for file in files:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{file} was cut short ({reason}); trying the one before", file=sys.stderr)
    if files:
        raise ValueError(
            f"no checkpoint in {run_folder} can be read; restore one from a backup, or start "
            "again in another folder"
        )
    return None


def save_checkpoint(
    run_folder: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    recipe: dict[str, object],
    step: int,
) -> None:
    """Write a checkpoint beside the last one, and only then let it take its place.

    Raises:
        OSError: It could not be written; the one before is kept.
    """
    newest, before = (run_folder / name for name in NAMES)
    temporary = run_folder / f"checkpoint.{os.getpid()}.tmp"
    for leftover in run_folder.glob("checkpoint.*.tmp"):  # of a process killed while it wrote
        leftover.unlink()
    state = {
        "step": step,
        "recipe": json.dumps(recipe),
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    try:
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"step {step} could not be saved in {run_folder} ({error}); the checkpoint before it "
            "is kept. Make room and run the same command to resume from there"
        ) from error
    if newest.exists():
        newest.replace(before)
    temporary.replace(newest)
