"""Rows of a batch through a network, as many at a time as fit.

The same rows give the same result however they are cut, up to rounding. Where a device runs out of
memory the rows at hand are tried again in halves, and later batches stay that small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Pad in this block, so that a row's bits do not depend on how many are left."""
        before, self.is_static = self.is_static, True
        try:
            yield
        finally:
            self.is_static = before

    def map(
        self, function: Callable[..., tuple[Tensor, ...]], *columns: Tensor | Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Apply a function to all rows, in parts, and put its results together.

        Args:
            function: Takes parts of the columns, tensors on the device; returns tensors with as
                many rows.
            columns: Tensors [B, ...] on any device, all of the same B >= 1, and numbers that are
                to stay on the host, such as seeds.

        Raises:
            torch.OutOfMemoryError: One row does not fit.
        """
        parts: list[tuple[Tensor, ...]] = []
        start, num_rows = 0, len(columns[0])
        while start < num_rows:
            end = min(start + self.size, num_rows)
            results: tuple[Tensor, ...] | None = None
            try:
                results = function(*(self._part(x, start, end) for x in columns))
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            if results is None:  # after the exception, whose traceback keeps all that was computed
                self._shrink()
                continue
            parts.append(tuple(x[: end - start] for x in results))
            start = end
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _part(self, column: Tensor | Sequence[int], start: int, end: int) -> Tensor | Sequence[int]:
        missing = self.size - (end - start) if self.is_static else 0
        if not isinstance(column, Tensor):
            return [*column[start:end], *[column[end - 1]] * missing]
        rows = column[start:end].to(self.device, non_blocking=True)
        if not missing:
            return rows
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])

    def _shrink(self) -> None:
        smaller = -(-self.size // 2)
        warnings.warn(
            f"{self.device} ran out of memory with {self.size} tiles at a time; going on with "
            f"{smaller}. Load the model with batch_size={smaller} to start there",
            stacklevel=5,  # who called the generator
        )
        self.size = smaller
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
