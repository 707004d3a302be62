"""Seams between neighbouring tiles of a run, before and after.

Only where names or a table say where in a slide a tile lies. A window of neighbours is measured, so
that a slide of any size costs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cytosyn_aug.images import optical_density
from cytosyn_aug.report.pictures import RunPictures
from cytosyn_aug.report.tallies import ManifestRow, Tally
from cytosyn_aug.runs.manifest import Manifest
from cytosyn_aug.slides.seams import SeamMeter, tile_lines
from cytosyn_aug.stain.density import tissue_weight

NUM_SLIDES = 4
_WINDOW = 6  # tiles in each direction from the middle one
_COLUMNS = ("source", "variant", "status", "slide", "x", "y", "mpp", "output", "key")


class SlideSeams(NamedTuple):
    """Seams of one slide.

    Attributes:
        slide: Its name.
        num_tiles: Tiles that were measured.
        before: Mean step of colour at the borders of sources over that inside of them; None where
            too few neighbours show tissue.
        after: Mean step at the borders of results over that inside of them; None as before.
    """

    slide: str
    num_tiles: int
    before: float | None
    after: float | None


def measure_seams(manifest: Manifest, tally: Tally, pictures: RunPictures) -> list[SlideSeams]:
    """Measure the slides with most results, those without places in them left out."""
    slides = sorted(tally.slides, key=lambda name: (-tally.slides[name].num_results, name))
    chosen = pa.array(slides[:NUM_SLIDES], pa.string())
    rows: dict[str, list[ManifestRow]] = {}
    for part in manifest.parts(_COLUMNS):
        is_wanted = pc.and_(pc.is_in(part["slide"], chosen), pc.is_valid(part["x"]))
        is_wanted = pc.and_(is_wanted, pc.equal(part["variant"], 0))
        for row in part.filter(is_wanted).to_pylist():
            rows.setdefault(row["slide"], []).append(row)
    seams = []
    for slide in sorted(rows):
        window = neighbours(rows[slide])
        if len(window) > 1:
            seams.append(_measure(slide, window, pictures))
    return seams


class TilePosition(NamedTuple):
    """A row of a manifest at its place in the grid of its slide."""

    row: int
    column: int
    cells: ManifestRow


def neighbours(rows: Sequence[ManifestRow]) -> list[TilePosition]:
    """Return the tiles around the middle one of a slide, row by row.

    Args:
        rows: Of one slide, with x and y; their least distance is the step of the grid.
    """
    if not rows:
        return []
    across, down = _step(row["x"] for row in rows), _step(row["y"] for row in rows)
    placed = sorted(
        (TilePosition(row["y"] // down, row["x"] // across, row) for row in rows),
        key=lambda tile: tile[:2],
    )
    middle = placed[len(placed) // 2]
    return [
        tile
        for tile in placed
        if abs(tile.row - middle.row) <= _WINDOW and abs(tile.column - middle.column) <= _WINDOW
    ]


def _step(values: Iterable[int]) -> int:
    apart = np.diff(sorted(set(values)))
    return int(apart.min()) if len(apart) else 1


def _measure(slide: str, window: Sequence[TilePosition], pictures: RunPictures) -> SlideSeams:
    before, after, num_tiles = SeamMeter(), SeamMeter(), 0
    for tile in window:
        source, result = pictures.before(tile.cells).pixels, pictures.after(tile.cells).pixels
        if result is None or result.shape[0] != result.shape[1] or result.shape[0] % 4:
            continue
        is_pair = source is not None and source.shape == result.shape
        weight = _weight(source if is_pair and source is not None else result)
        after.add(tile.row, tile.column, tile_lines(result, weight))
        if is_pair and source is not None:
            before.add(tile.row, tile.column, tile_lines(source, weight))
        num_tiles += 1
    return SlideSeams(slide, num_tiles, before.ratio, after.ratio)


def _weight(pixels: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    weight = tissue_weight(optical_density(images))[0, 0]
    return (255 * weight).round().to(torch.uint8).numpy()
