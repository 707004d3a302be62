"""Numbers that a process and the DataLoader workers it starts see alike.

Workers hold copies of a transform: an epoch set in the training loop would not reach those that
persist, and what they count would be lost. These live in shared memory instead.
"""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

# One slot a worker, so that two never write the same number at once.
_NUM_SLOTS = 256


class SharedEpoch:
    """The number of the current epoch, 0 until it is set."""

    def __init__(self) -> None:
        self._value = torch.full((), -1, dtype=torch.int64, device="cpu").share_memory_()

    def get(self) -> int:
        """Return the epoch."""
        return max(0, int(self._value))

    @property
    def is_set(self) -> bool:
        """Whether any process has set it."""
        return int(self._value) >= 0

    def set(self, epoch: int) -> None:
        """Set the epoch, in all processes.

        Raises:
            ValueError: The epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected 0 or more")
        self._value.fill_(epoch)

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        # An ordinary pickle copies; what is unpickled has workers of its own.
        self._value = state["_value"].share_memory_()


class SharedCount:
    """A count that workers add to and their parent reads."""

    def __init__(self) -> None:
        self._slots = torch.zeros(_NUM_SLOTS, dtype=torch.int64, device="cpu").share_memory_()

    def add(self, number: int) -> None:
        """Add to the count."""
        worker = get_worker_info()
        self._slots[0 if worker is None else 1 + worker.id % (_NUM_SLOTS - 1)] += number

    def total(self) -> int:
        """Return what all processes counted."""
        return int(self._slots.sum())

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self._slots = state["_slots"].share_memory_()
