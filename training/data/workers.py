"""Units of work over processes that may die: each unit is done, or named as failed.

Processes are spawned, not forked (OpenSlide's handles and threads do not survive a fork), and end
with their parent, however that ended. A process that dies or hangs costs its unit one attempt, and
the others nothing. This module knows nothing of what a unit is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")

_ATTEMPTS = 2


class DeadUnit(NamedTuple):
    """What became of a unit whose process died, or was killed for hanging, every time."""

    reason: str


class _Worker(Generic[UnitT]):
    """A process and the unit it is busy with."""

    def __init__(self, function: Callable[[UnitT], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, other), daemon=True)
        self.process.start()
        other.close()
        self.unit: UnitT | None = None
        self.deadline = float("inf")

    def give(self, unit: UnitT, timeout_s: float) -> None:
        self.unit = unit
        self.deadline = time.monotonic() + timeout_s
        with suppress(BrokenPipeError):  # died while idle; its pipe will say so
            self.pipe.send(unit)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_units(
    function: Callable[[UnitT], ResultT],
    units: Sequence[UnitT],
    num_workers: int,
    timeout_s: float = 7200.0,
) -> Iterator[tuple[UnitT, ResultT | DeadUnit]]:
    """Call a function on every unit and yield the results as they come.

    Args:
        function: Importable by name; must be safe to run twice on one unit.
        units: Given out in this order; the largest first keeps processes busy to the end.
        num_workers: Processes; 0 runs in this one, where a death cannot be survived.
        timeout_s: Longest time for a unit; then its process is killed.

    Raises:
        ValueError: `num_workers` is negative.
        Exception: Whatever `function` raised, in this process; the others are ended.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
    if num_workers == 0:
        for unit in units:
            yield unit, function(unit)
        return
    waiting = deque((unit, 1) for unit in units)
    workers: dict[_Worker[UnitT], int] = {}  # and the attempt it is on
    try:
        while waiting or any(worker.unit is not None for worker in workers):
            _give_out(function, waiting, workers, num_workers, timeout_s)
            for worker, answer in _answers(workers):
                unit_done, attempt = worker.unit, workers[worker]
                assert unit_done is not None
                worker.unit, worker.deadline = None, float("inf")
                if not isinstance(answer, DeadUnit):
                    is_ok, result = answer
                    if not is_ok:
                        raise result
                    yield unit_done, result
                    continue
                worker.end()
                del workers[worker]
                if attempt < _ATTEMPTS:
                    waiting.append((unit_done, attempt + 1))
                else:
                    yield unit_done, DeadUnit(f"{answer.reason}, in each of {_ATTEMPTS} attempts")
    finally:
        for worker in workers:
            worker.end()


def _give_out(
    function: Callable[[UnitT], object],
    waiting: deque[tuple[UnitT, int]],
    workers: dict[_Worker[UnitT], int],
    num_workers: int,
    timeout_s: float,
) -> None:
    while len(workers) < num_workers and len(workers) < len(waiting) + _num_busy(workers):
        workers[_Worker(function)] = 0
    for worker in workers:
        if worker.unit is None and waiting:
            unit, workers[worker] = waiting.popleft()
            worker.give(unit, timeout_s)


def _num_busy(workers: dict[_Worker[UnitT], int]) -> int:
    return sum(worker.unit is not None for worker in workers)


def _answers(
    workers: dict[_Worker[UnitT], int],
) -> list[tuple[_Worker[UnitT], tuple[bool, Any] | DeadUnit]]:  # Any: result or exception
    """Wait until units are answered or lost, and return which."""
    busy = [worker for worker in workers if worker.unit is not None]
    patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
    wait([worker.pipe for worker in busy], timeout=min(patience, 3600.0))
    answers: list[tuple[_Worker[UnitT], tuple[bool, Any] | DeadUnit]] = []
    for worker in busy:
        try:
            if worker.pipe.poll():
                answers.append((worker, worker.pipe.recv()))
            elif time.monotonic() >= worker.deadline:
                answers.append((worker, DeadUnit("its process did not answer in time")))
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
            answers.append((worker, DeadUnit(f"its process died ({code}): a crash, or no memory")))
    return answers


def _serve(function: Callable[[UnitT], object], pipe: Connection) -> None:
    """Answer units until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool, object] = (True, function(unit))
        except Exception as error:  # carried to the parent, which raises it
            answer = (False, error)
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
