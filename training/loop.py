"""The training loop: optimiser, moving average, checkpoints, curves. It knows no model.

A stage gives the network and the loss of one step; the loop does the rest. Everything random is
drawn from generators that depend on (seed, step), so that a run that was stopped and resumed
reaches the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training.muon import Muon, split_parameters

Optimisers = list[torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What the loop needs to know of a run.

    Attributes:
        num_steps: Optimiser steps of the whole run.
        learning_rate: Peak of AdamW's rate, after a linear warm-up of `warmup_steps`.
        muon_rate: The same for Muon, which takes the hidden weights; see `training.muon`.
        cooldown_steps: The last steps, over which the rate falls linearly to a twentieth.
        ema_decay: Decay of the moving average, itself warmed up as min(decay, (1+n)/(10+n)).
        grad_clip: Largest L2 norm of the gradient.
        log_every_steps: Steps between rows of `curves.jsonl`.
        report_every_steps: Steps between validation reports (samples and numbers).
        save_every_s: Seconds between checkpoints.
    """

    num_steps: int
    learning_rate: float
    muon_rate: float = 0.01
    warmup_steps: int = 100
    cooldown_steps: int = 0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
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

    def losses(self, step: int) -> dict[str, Tensor]:
        """Return scalar losses of this step's batch; "loss" is the one to minimise."""
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

    Args:
        stage: What to train.
        config: The loop's settings.
        run_folder: Receives `checkpoint.pt`, `curves.jsonl`, `reports.jsonl`, `recipe.json`
            and pictures. An existing checkpoint is resumed.
        recipe: The whole resolved recipe; a checkpoint of another recipe is refused.
        minutes: Wall-clock budget; the run saves and returns when it is spent.
        warm_start: Weights that a new run starts from; see `training.weights`.

    Returns:
        The number of steps done so far.

    Raises:
        ValueError: The folder holds a run of another recipe, or the weights do not fit.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    optimisers = _optimisers(stage.network, config)
    average = copy.deepcopy(stage.network).requires_grad_(False).eval()
    start = _resume(run_folder, stage.network, average, optimisers, recipe, warm_start)
    (run_folder / "recipe.json").write_text(json.dumps(recipe, indent=2))
    began, saved = time.monotonic(), time.monotonic()
    step = start
    asked_to_stop = _listen_for_sigterm()
    for step in range(start, config.num_steps):
        row = _step(stage, config, optimisers, step)
        _update_average(average, stage.network, config.ema_decay, step)
        done = step + 1
        if done % config.log_every_steps == 0 or done == 1:
            seconds = (time.monotonic() - began) / (done - start)
            _append(run_folder / "curves.jsonl", {"step": done, "s_per_step": seconds} | row)
        if done % config.report_every_steps == 0 or done == config.num_steps:
            numbers = stage.report(average, run_folder, done)
            _append(run_folder / "reports.jsonl", {"step": done} | numbers)
            print(f"step {done}", json.dumps({k: round(v, 4) for k, v in numbers.items()}))
        if time.monotonic() - saved > config.save_every_s:
            _save(run_folder, stage.network, average, optimisers, recipe, done)
            saved = time.monotonic()
        if time.monotonic() - began > minutes * 60 or asked_to_stop:
            break
    done = min(step + 1, config.num_steps)
    _save(run_folder, stage.network, average, optimisers, recipe, done)
    return done


def _optimisers(network: nn.Module, config: LoopConfig) -> Optimisers:
    hidden, rest = split_parameters(network)
    optimisers: Optimisers = []
    if hidden:
        optimisers.append(Muon(hidden, lr=config.muon_rate))
    if rest:
        optimisers.append(torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=0.0))
    return optimisers


def _listen_for_sigterm() -> list[int]:
    """Return a list that stays empty until the process is asked to stop, as schedulers do."""
    received: list[int] = []
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    return received


def _step(
    stage: Stage,
    config: LoopConfig,
    optimisers: Optimisers,
    step: int,
) -> dict[str, float]:
    stage.network.train()
    losses = stage.losses(step)
    stage.network.zero_grad(set_to_none=True)
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(
        stage.network.parameters(), config.grad_clip, error_if_nonfinite=True
    )
    for optimiser in optimisers:
        peak = config.muon_rate if isinstance(optimiser, Muon) else config.learning_rate
        for group in optimiser.param_groups:
            group["lr"] = peak * _rate(config, step)
        optimiser.step()
    if (step + 1) % config.log_every_steps and step:
        return {}
    return {k: float(v.detach()) for k, v in losses.items()} | {"grad_norm": float(norm)}


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


def _resume(
    run_folder: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: Optimisers,
    recipe: dict[str, object],
    warm_start: dict[str, Tensor] | None,
) -> int:
    file = run_folder / "checkpoint.pt"
    if not file.exists():
        for target in (network, average):
            found = target.load_state_dict(warm_start or {}, strict=False)
            if found.unexpected_keys:
                raise ValueError(f"this network has no {found.unexpected_keys} to start from")
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
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


def _save(
    run_folder: Path,
    network: nn.Module,
    average: nn.Module,
    optimisers: Optimisers,
    recipe: dict[str, object],
    step: int,
) -> None:
    temporary = run_folder / f"checkpoint.{os.getpid()}.tmp"
    state = {
        "step": step,
        "recipe": json.dumps(recipe),
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(run_folder / "checkpoint.pt")


def _append(file: Path, row: dict[str, float]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")


def recipe_dict(recipe: object) -> dict[str, object]:
    """Return a recipe dataclass as plain JSON values, all fields."""
    return asdict(recipe)  # type: ignore[call-overload]
