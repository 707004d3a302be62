"""Measure the tile stage beside OpenSlide's own read and PIL's resize: tiles/s and the ratio.

    python -m benchmarks.tiling SLIDE [--repeats 7] [--workers 2] [--copies 4]

1. One process: the same tiles of the same slide, read and reduced by three lines of OpenSlide and
   PIL, and by ours (alpha, retry, tile checks; encoding excluded). The two take turns, tile row by
   tile row, and processor time is counted, so that other work on the machine touches both alike.
2. Processes: copies of the slide are cut to shards (read, check, encode, checksum, write) by one
   process and by several, in turns. Wall time is counted from when all of them run to when the
   last one ends. It says something only on a machine with a free core for each; processor time
   tells even on a busy one whether processes hinder each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
import PIL
from PIL import Image

from cytosyn_aug.io.image_files import encode_tile
from cytosyn_aug.io.slide import Reading, Slide, grid_positions
from cytosyn_aug.io.tissue import (
    TissueConfig,
    TissueMask,
    reason_to_reject,
    slide_mask,
    tile_quality,
)
from training.data.cutting import CutUnit, ScanUnit, TileRecipe, cut, scan
from training.data.sources import list_slide_sources
from training.data.workers import DeadUnit, run_units

Corners = list[tuple[int, int]]


class Meeting(NamedTuple):
    """Something to do for each of several processes: wait until all of them run."""

    folder: Path
    number: int
    num_workers: int


class Rate(NamedTuple):
    """Tiles per second of wall time, and of processor time."""

    wall: float
    processor: float


def main() -> None:
    """Print both measurements for one slide."""
    parser = argparse.ArgumentParser(description="Measure the tile stage on one slide.")
    parser.add_argument("slide", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="processes of the second part")
    parser.add_argument("--copies", type=int, default=4, help="slides a process has to cut")
    args = parser.parse_args()
    print(f"{args.slide.name}, OpenSlide {openslide.__library_version__}, PIL {PIL.__version__}")
    compare_with_openslide(args.slide, args.repeats)
    compare_processes(args.slide, args.repeats, args.workers, args.copies)


def compare_with_openslide(file: Path, repeats: int) -> None:
    """Print tiles per second of processor time of both, and the median ratio."""
    recipe = TileRecipe()
    with Slide(file) as slide:
        reading = slide.plan(recipe.tile)
        mask = slide_mask(slide, None, recipe.tissue)
        rows = tissue_rows(slide, reading, mask, recipe.tissue)
    num_tiles = sum(len(row) for row in rows)
    ours: list[float] = []
    raw: list[float] = []
    encoding: list[float] = []
    for _ in range(repeats):
        handle = openslide.OpenSlide(file)
        with Slide(file) as slide:
            seconds = np.zeros(2)
            for k, row in enumerate(rows):
                turns = [(partial(read_raw, handle), 0), (partial(read_ours, slide), 1)]
                for read, which in turns if k % 2 else turns[::-1]:
                    seconds[which] += processor_time(read, row, reading)
            raw.append(num_tiles / seconds[0])
            ours.append(num_tiles / seconds[1])
            tile = slide.read_tile(*rows[0][0], reading)
            encoding.append(processor_time(encode_tiles, tile, 20) / 20)
        handle.close()
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    print(f"one process, {num_tiles} tiles, {reading}")
    print(f"  OpenSlide + PIL   {statistics.median(raw):6.1f} tiles/s of processor time")
    print(f"  ours, with checks {statistics.median(ours):6.1f}")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"  ratio             {statistics.median(ratios):6.3f}   ({spread} in {repeats} repeats)")
    print(f"  encoding          {1000 * statistics.median(encoding):6.2f} ms per tile on top")


def compare_processes(file: Path, repeats: int, num_workers: int, copies: int) -> None:
    """Print tiles per second of the whole stage with one process and with several."""
    recipe = TileRecipe()
    with tempfile.TemporaryDirectory() as temporary:
        slides, out = Path(temporary, "slides"), Path(temporary, "out")
        slides.mkdir()
        for name in ("work/scans", "work/parts", "work/receipts", "masks", "train"):
            (out / name).mkdir(parents=True)
        for k in range(num_workers * copies):
            (slides / f"copy{k}{file.suffix}").symlink_to(file.resolve())
        sources = list_slide_sources(slides).sources
        scans = {s.slide: scan(ScanUnit(s, recipe, out, False)) for s in sources}
        units = [
            CutUnit(s, recipe, out, scans[s.slide], "train", scans[s.slide].num_candidates)
            for s in sources
        ]
        one: list[Rate] = []
        several: list[Rate] = []
        for k in range(repeats):
            turns = [(one, 1), (several, num_workers)]
            for rates, num in turns if k % 2 else turns[::-1]:
                rates.append(rate(units, num))
    cores = len(os.sched_getaffinity(0))
    print(f"cut to shards, {len(units)} copies of the slide, {cores} cores, {repeats} repeats")
    print("  tiles/s of wall time, of processor time")
    for num, rates in ((1, one), (num_workers, several)):
        wall, processor = np.median(rates, axis=0)
        print(f"  processes: {num}   {wall:6.1f} {processor:6.1f}")
    ratios = np.array(several) / np.array(one)
    wall, processor = np.median(ratios, axis=0)
    print(f"  ratio          {wall:6.2f} {processor:6.2f}   (ideal: {num_workers} and 1)")
    print(f"  of wall time   {ratios[:, 0].min():6.2f} to {ratios[:, 0].max():.2f}")


def rate(units: list[CutUnit], num_workers: int) -> Rate:
    """Return how fast processes cut, all together, once all of them run."""
    with tempfile.TemporaryDirectory() as temporary:
        meetings = [Meeting(Path(temporary), k, num_workers) for k in range(num_workers)]
        began, seconds, done = 0.0, 0.0, 0
        for unit, answer in run_units(meet_or_cut, [*meetings, *units], num_workers):
            assert not isinstance(answer, DeadUnit)
            if isinstance(unit, Meeting):
                began = began or time.monotonic()
            else:
                done += unit.quota
                seconds += answer
        return Rate(done / (time.monotonic() - began), done / seconds)


def meet_or_cut(unit: Meeting | CutUnit) -> float:
    """Wait for the other processes, or cut a slide; return the processor time that took."""
    if isinstance(unit, CutUnit):
        return processor_time(cut, unit)
    (unit.folder / str(unit.number)).touch()
    while len(list(unit.folder.iterdir())) < unit.num_workers:
        time.sleep(0.001)
    return 0.0


def tissue_rows(
    slide: Slide, reading: Reading, mask: TissueMask, config: TissueConfig
) -> list[Corners]:
    """Return the corners of tiles with tissue, row by row."""
    extent = reading.extent_level0
    positions = grid_positions(slide.width_level0, slide.height_level0, extent)
    positions = positions[mask.fractions(positions, extent) >= config.min_tissue]
    rows: dict[int, Corners] = {}
    for x, y in positions.tolist():
        rows.setdefault(y, []).append((x, y))
    return list(rows.values())


def read_raw(handle: openslide.OpenSlide, corners: Corners, reading: Reading) -> None:
    """Read and reduce tiles as a script would."""
    for corner in corners:
        region = handle.read_region(corner, reading.level, (reading.level_px,) * 2)
        region.convert("RGB").resize((reading.size_px,) * 2, Image.Resampling.LANCZOS)


def read_ours(slide: Slide, corners: Corners, reading: Reading) -> None:
    """Read, reduce and judge tiles as the stage does."""
    config = TissueConfig()
    for x, y in corners:
        tile = slide.read_tile(x, y, reading)
        reason_to_reject(tile_quality(np.asarray(tile)), config)


def encode_tiles(tile: Image.Image, times: int) -> None:
    """Encode a tile several times."""
    for _ in range(times):
        encode_tile(tile)


def processor_time(function: Callable[..., object], *arguments: object) -> float:
    """Return the seconds of processor time that a call takes."""
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


if __name__ == "__main__":
    main()
