"""Trial of a run of tiles: results, bytes, rate and hours, from two batches on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cytosyn_aug.runs.folder import Unit
from cytosyn_aug.runs.pipeline import TileWork, num_tiles
from cytosyn_aug.runs.reading import LoadedTile


def estimate_tiles(work: TileWork, units: Sequence[Unit]) -> dict[str, Any]:  # Any: JSON
    """Return what units would be; reading and writing is not counted."""
    total = num_tiles(units)
    rate, result_bytes = _try_batch(work, units)
    return {
        "tiles_to_do": total,
        "results": total * work.num_variants,
        "output_bytes": round(total * work.num_variants * result_bytes),
        "tiles_per_s": None if rate is None else round(rate, 2),
        "hours": None if rate is None else round(total / rate / 3600, 3),
    }


def _try_batch(work: TileWork, units: Sequence[Unit]) -> tuple[float | None, float]:
    """Return tiles per second of the device, and bytes per result."""
    batch: list[LoadedTile] = []
    for tile in work.readable(units):
        if not batch or tile.pixels.shape == batch[0].pixels.shape:
            batch.append(tile)
        if len(batch) == work.generator.batch_size:
            break
    if not batch:
        return None, 0.0
    with work.generator.batches.fixed():
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            results = [edited.images.cpu() for edited in work.edit(batch)]
            seconds = time.perf_counter() - began
    pixels = results[-1].permute(0, 2, 3, 1).contiguous().numpy()
    if work.destination.encode is None:
        result_bytes = work.destination.bytes_per_pixel * math.prod(pixels.shape[1:3])
    else:
        result_bytes = float(np.mean([len(work.destination.encode(image)) for image in pixels]))
    return work.generator.batch_size / seconds, result_bytes
