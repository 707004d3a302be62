"""Rows of a batch through a network, as many at a time as fit.

The same rows give the same result however they are cut, up to rounding. Where a device runs out of
memory the rows at hand are tried again in halves, and later batches stay that small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class MicroBatches:
    """Cuts batches for one device.

    Attributes:
        device: Where the function runs; rows are moved there.
        size: Most rows at a time; falls when memory runs out.
        is_static: Pad every part to `size` rows, by its last one, so that a compiled function
            sees one shape. Costs whole parts where few rows are given.
    """

    def __init__(self, device: torch.device, size: int, is_static: bool = False) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}, expected at least 1")
        self.device, self.size, self.is_static = device, size, is_static

    def map(
        self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply a function to all rows, in parts, and put its results together.

        Args:
            function: Takes parts of the tensors on the device; returns tensors with as many rows.
            tensors: [B, ...], all of the same B >= 1, on any device.

        Raises:
            torch.OutOfMemoryError: One row does not fit.
        """
        parts: list[tuple[Tensor, ...]] = []
        start, num_rows = 0, len(tensors[0])
        while start < num_rows:
            end = min(start + self.size, num_rows)
            rows = [self._part(x, start, end) for x in tensors]
            try:
                found = function(*rows)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self._shrink()
                continue
            parts.append(tuple(x[: end - start] for x in found))
            start = end
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _part(self, tensor: Tensor, start: int, end: int) -> Tensor:
        rows = tensor[start:end].to(self.device, non_blocking=True)
        missing = self.size - (end - start)
        if not self.is_static or not missing:
            return rows
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])

    def _shrink(self) -> None:
        smaller = -(-self.size // 2)
        warnings.warn(
            f"{self.device} ran out of memory with {self.size} tiles at a time; going on with "
            f"{smaller}. Load the model with batch_size={smaller} to start there",
            stacklevel=4,
        )
        self.size = smaller
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def seed_rows(seeds: Sequence[int]) -> Tensor:
    """Return seeds as int64 rows [B], to be cut beside other tensors; they stay on the CPU."""
    return torch.tensor(list(seeds), dtype=torch.int64)


def check_device(given: torch.device | str) -> None:
    """Fail before weights are read, not after.

    Raises:
        ValueError: This torch knows or finds no such device.
    """
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device is {given!r}, expected one like 'cuda:0' or 'cpu'") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ValueError(
            f"device is {device}, which this torch ({torch.__version__}) does not find here; "
            "install the build for it, or use device='cpu'"
        )
