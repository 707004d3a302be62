"""Throughput of a run, from the times of the files it wrote.

A run records no times: its bytes would then differ from one day to the next. File systems do, until
files are copied without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PAUSE_S = 60.0
_PAUSE_FACTOR = 10.0


class Throughput(NamedTuple):
    """How fast a run was.

    Attributes:
        seconds: Of results in the order they were written, since the run began, pauses left out.
        num_results: That all of them stand for.
        active_s: Time at work.
        num_pauses: Times that nothing was written for long: the run was stopped, or waited.
        paused_s: Time in them.
    """

    seconds: list[float]
    num_results: int
    active_s: float
    num_pauses: int
    paused_s: float

    @property
    def results_per_s(self) -> float:
        """Results per second, over the time at work."""
        return self.num_results / self.active_s


def measure_throughput(
    began: float, written: Sequence[float], num_results: int
) -> Throughput | None:
    """Return how fast a run was.

    A pause is a gap of more than a minute and ten times the median gap.

    Args:
        began: When, in seconds.
        written: When results were, in any order: all of them, or a fair sample.
        num_results: How many there are in all.

    Returns:
        None where the times tell nothing: fewer than two, or all the same.
    """
    times = np.sort(np.asarray(written, np.float64))
    if len(times) < 2 or times[0] == times[-1]:
        return None
    gaps = np.diff(times, prepend=min(began, times[0]))
    usual = np.median(gaps[gaps > 0])
    is_pause = gaps > _PAUSE_S + _PAUSE_FACTOR * usual
    seconds = np.where(is_pause, 0.0, gaps).cumsum()
    if not seconds[-1]:
        return None
    return Throughput(
        seconds=seconds.tolist(),
        num_results=num_results,
        active_s=float(seconds[-1]),
        num_pauses=int(is_pause.sum()),
        paused_s=float(gaps[is_pause].sum()),
    )
