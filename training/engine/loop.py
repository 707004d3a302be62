"""The training loop: optimiser, moving average, checkpoints, curves. It knows no model.

A stage gives the network and the loss of one step; the loop does the rest. Everything random is
drawn from generators that depend on (seed, step), so that a run that was stopped and resumed
reaches the same weights, bit for bit, as one that was not. Several processes may share a run; see
`training.engine.distributed`.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.data.batches import Batches
from training.engine.checkpoints import resume, save_checkpoint
from training.engine.distributed import (
    average_gradients,
    is_true_anywhere,
    mean_over_processes,
    meet,
    row_shares,
    world,
)
from training.engine.muon import Muon, split_parameters

Optimisers = list[torch.optim.Optimizer]
_Shares = list[tuple[slice, Any]]  # rows of a batch, and their samples
_NUM_SHOWN = 4  # names in a message; skipped.jsonl has all


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What the loop needs to know of a run.

    Attributes:
        num_steps: Optimiser steps of the whole run.
        learning_rate: Peak of AdamW's rate, after a linear warm-up of `warmup_steps`.
        muon_rate: The same for Muon, which takes the hidden weights.
        None
            leaves all weights to AdamW, as published recipes do.
        cooldown_steps: The last steps, over which the rate falls linearly to a twentieth.
        ema_decay: Decay of the moving average, itself warmed up as min(decay, (1+n)/(10+n)).
        grad_clip: Largest L2 norm of the gradient, of each part of a `ModuleDict` by itself.
        num_micro_batches: Passes that each process splits its rows of a batch into; their
            gradients add up.
        max_skipped: Steps in a row with a non-finite gradient that are skipped before the run
            gives up.
        log_every_steps: Steps between rows of `curves.jsonl`.
        report_every_steps: Steps between validation reports (samples and numbers).
        save_every_s: Seconds between checkpoints.
    """

    num_steps: int
    learning_rate: float
    muon_rate: float | None = 0.01
    warmup_steps: int = 100
    cooldown_steps: int = 0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    num_micro_batches: int = 1
    max_skipped: int = 10
    log_every_steps: int = 20
    report_every_steps: int = 500
    save_every_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected 0 <= decay < 1")
        if self.num_steps < 1 or self.cooldown_steps > self.num_steps:
            raise ValueError(
                f"num_steps {self.num_steps} with cooldown_steps {self.cooldown_steps}; "
                "expected 1 <= num_steps and cooldown_steps <= num_steps"
            )


class Stage(Protocol):
    """One trainable thing: its network, the loss of a step, and how to look at it."""

    @property
    def network(self) -> nn.Module:
        """What is trained, averaged and saved."""
        ...

    @property
    def batches(self) -> Batches:
        """Which samples of the data set every step holds."""
        ...

    def read(self, step: int, rows: slice) -> Any:  # Any: the loop only hands it on
        """Return the samples of these rows of the step's batch; nothing else reads files."""
        ...

    def losses(self, step: int, rows: slice, samples: Any) -> dict[str, Tensor]:
        """Return scalar losses over what was read for these rows; minimise "loss"."""
        ...

    def report(self, network: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write samples of the averaged network into `folder`; return validation numbers."""
        ...


def train(
    stage: Stage,
    config: LoopConfig,
    run_folder: Path,
    *,
    recipe: dict[str, object],
    minutes: float = math.inf,
    warm_start: dict[str, Tensor] | None = None,
) -> int:
    """Train until `config.num_steps`, for so many minutes, or until SIGTERM, then save.

    A step whose gradient is not finite changes no weight, is counted and named.

    Args:
        stage: What to train.
        config: The loop's settings.
        run_folder: Receives `checkpoint.pt` and the one before it, `curves.jsonl`,
            `reports.jsonl`, `recipe.json`, pictures and, if steps were skipped, `skipped.jsonl`
            with their samples. An existing checkpoint is resumed.
        recipe: The whole resolved recipe; a checkpoint of another recipe is refused.
        minutes: Wall-clock budget; the run saves and returns when it is spent.
        warm_start: Weights that a new run starts from.

    Returns:
        The number of steps done so far.

    Raises:
        ValueError: The folder holds a run of another recipe, the weights do not fit, or the batch
            does not divide among the processes.
        FloatingPointError: `config.max_skipped` steps in a row had no finite gradient.
        OSError: A checkpoint could not be written; the one before it is kept. Or samples could not
            be read: they are named, and all steps before are saved.
    """
    with _noted_sigterm() as asked_to_stop:
        return _train(stage, config, run_folder, recipe, minutes, warm_start, asked_to_stop)


def _train(
    stage: Stage,
    config: LoopConfig,
    run_folder: Path,
    recipe: dict[str, object],
    minutes: float,
    warm_start: dict[str, Tensor] | None,
    asked_to_stop: list[int],
) -> int:
    run_folder.mkdir(parents=True, exist_ok=True)
    shares = row_shares(stage.batches.size, config.num_micro_batches)
    optimisers = _optimisers(stage.network, config)
    average = copy.deepcopy(stage.network).requires_grad_(False).eval()
    start = resume(run_folder, stage.network, average, optimisers, recipe, warm_start)
    is_first = world().rank == 0
    if is_first:
        (run_folder / "recipe.json").write_text(json.dumps(recipe, indent=2))

    def save(done: int) -> None:
        if is_first:
            save_checkpoint(run_folder, stage.network, average, optimisers, recipe, done)

    def save_at_the_end(done: int) -> None:
        save(done)
        meet()  # torchrun kills what still writes half a minute after another process failed

    began, saved = time.monotonic(), time.monotonic()
    step, num_skipped = start, 0
    for step in range(start, config.num_steps):
        batch, fault = _read(stage, step, shares)
        if fault is not None:
            if step > start:  # else nothing is new
                save_at_the_end(step)
            raise fault
        row = _step(stage, config, optimisers, step, batch)
        done = step + 1
        if row["is_finite"]:
            num_skipped = 0
            _update_average(average, stage.network, config.ema_decay, step)
        else:
            num_skipped += 1
            if is_first:
                _note_skipped(stage.batches, run_folder, step, num_skipped)
            if num_skipped >= config.max_skipped:
                save_at_the_end(done)
                raise FloatingPointError(
                    f"{num_skipped} steps in a row up to {done} had no finite gradient; the "
                    f"weights in {run_folder} are those before. Lower the rate and --warm-start "
                    f"from there, or look at the samples {_some(stage.batches.names(step))}"
                )
        if is_first and (done % config.log_every_steps == 0 or done == 1):
            seconds = (time.monotonic() - began) / (done - start)
            _append(run_folder / "curves.jsonl", {"step": done, "s_per_step": seconds} | row)
        if is_first and (done % config.report_every_steps == 0 or done == config.num_steps):
            numbers = stage.report(average, run_folder, done)
            _append(run_folder / "reports.jsonl", {"step": done} | numbers)
            print(f"step {done}", json.dumps({k: round(v, 4) for k, v in numbers.items()}))
        if time.monotonic() - saved > config.save_every_s:
            save(done)
            saved = time.monotonic()
        is_over = time.monotonic() - began > minutes * 60 or bool(asked_to_stop)
        if is_true_anywhere(is_over, _device(stage.network)):
            break
    done = min(step + 1, config.num_steps)
    save_at_the_end(done)
    return done


def _optimisers(network: nn.Module, config: LoopConfig) -> Optimisers:
    if config.muon_rate is None:
        every = [p for p in network.parameters() if p.requires_grad]
        return [torch.optim.AdamW(every, lr=config.learning_rate, weight_decay=0.0)]
    hidden, rest = split_parameters(network)
    optimisers: Optimisers = []
    if hidden:
        optimisers.append(Muon(hidden, lr=config.muon_rate))
    if rest:
        optimisers.append(torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=0.0))
    return optimisers


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


@contextmanager
def _noted_sigterm() -> Iterator[list[int]]:
    """Give a list that stays empty until the process is asked to stop, as schedulers do."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows no handler
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(stage: Stage, step: int, shares: list[slice]) -> tuple[_Shares, OSError | None]:
    """Return this process's micro-batches, and what to raise if any process cannot read its own.

    Processes agree on it before they compute. One that failed alone would leave the others waiting
    for its gradient until they are killed, unsaved.
    """
    batch, fault = [], None
    try:
        batch = [(rows, stage.read(step, rows)) for rows in shares]
    except (OSError, ValueError) as error:
        fault = OSError(
            f"{error}; that is a sample of step {step + 1}. The steps before it are saved: mend "
            "it, and run the same command again"
        )
    if is_true_anywhere(fault is not None, _device(stage.network)) and fault is None:
        fault = OSError(f"another process, which names it, cannot read a sample of step {step + 1}")
    return batch, fault


def _step(
    stage: Stage, config: LoopConfig, optimisers: Optimisers, step: int, batch: _Shares
) -> dict[str, float]:
    """Do one step, unless its gradient is not finite; return the losses if they are to be logged.

    Every process sees the same averaged gradient, so all skip the same steps.
    """
    stage.network.train()
    stage.network.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    for rows, samples in batch:
        losses = {k: v / len(batch) for k, v in stage.losses(step, rows, samples).items()}
        losses["loss"].backward()
        total = {k: total.get(k, 0) + v.detach().float() for k, v in losses.items()}
    average_gradients(stage.network.parameters())
    norms = [
        nn.utils.clip_grad_norm_(part.parameters(), config.grad_clip)
        for part in _parts(stage.network)
    ]
    norm = torch.stack(norms).norm()
    is_finite = bool(norm.isfinite())
    if is_finite:
        for optimiser in optimisers:
            is_muon = isinstance(optimiser, Muon)
            peak = config.muon_rate if is_muon else config.learning_rate
            for group in optimiser.param_groups:
                group["lr"] = (peak or 0.0) * _rate(config, step)
            optimiser.step()
    row = {"is_finite": float(is_finite)}
    if (step + 1) % config.log_every_steps and step:
        return row
    means = mean_over_processes(torch.stack(list(total.values()))).tolist()
    return row | dict(zip(total, means, strict=True)) | {"grad_norm": float(norm)}


def _parts(network: nn.Module) -> list[nn.Module]:
    """Return what is clipped by itself: networks that train side by side do not share a norm."""
    if not isinstance(network, nn.ModuleDict):
        return [network]
    return [p for p in network.values() if any(x.requires_grad for x in p.parameters())]


def _note_skipped(batches: Batches, run_folder: Path, step: int, num_skipped: int) -> None:
    names = batches.names(step)
    print(
        f"step {step + 1} skipped ({num_skipped} in a row): its gradient is not finite; samples "
        f"{_some(names)}",
        file=sys.stderr,
    )
    row = {"step": step + 1, "samples": batches.index(step).tolist(), "names": names}
    with (run_folder / "skipped.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_SHOWN])
    return f"{shown} and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else shown


def _rate(config: LoopConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    left = config.num_steps - step
    cool = 1.0 if left >= config.cooldown_steps else max(0.05, left / config.cooldown_steps)
    return warm * cool


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(b, 1 - decay)
    for old, new in zip(average.buffers(), network.buffers(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _append(file: Path, row: dict[str, float]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")


def recipe_dict(recipe: object) -> dict[str, object]:
    """Return a recipe dataclass as plain JSON values, all fields."""
    return asdict(recipe)  # type: ignore[call-overload]
