"""Measure the tile stage beside OpenSlide's own read and PIL's resize: tiles/s and the ratio.

    python examples/benchmark_tiling.py SLIDE [--repeats 7] [--copies 4]

1. One process: the same tiles of the same slide, read and reduced by three lines of OpenSlide and
   PIL, and by ours (alpha, retry, tile checks; encoding excluded). The two take turns, tile row by
   tile row, and processor time is counted, so that other work on the machine touches both alike.
2. Processes: copies of the slide are cut to shards (read, check, encode, checksum, write) by one
   process and by two, in turns. On a busy machine wall time says little; processor time still
   tells whether two processes hinder each other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import openslide
import PIL
from PIL import Image

from cytosyn_aug.image_files import encode_tile
from cytosyn_aug.slide_tiles import slide_mask
from cytosyn_aug.slides import Reading, Slide, grid_positions
from cytosyn_aug.tissue import TissueConfig, TissueMask, reason_to_reject, tile_quality
from training.cutting import CutUnit, ScanUnit, TileRecipe, cut, scan
from training.sources import list_slides
from training.workers import Death, run_units

Corners = list[tuple[int, int]]


def main() -> None:
    """Print both measurements for one slide."""
    parser = argparse.ArgumentParser(description="Measure the tile stage on one slide.")
    parser.add_argument("slide", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--copies", type=int, default=4, help="slides of the second part")
    args = parser.parse_args()
    print(f"{args.slide.name}, OpenSlide {openslide.__library_version__}, PIL {PIL.__version__}")
    compare_with_openslide(args.slide, args.repeats)
    compare_processes(args.slide, args.copies)


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
    print(f"  encoding          {1000 * statistics.median(encoding):6.2f} ms a tile on top")


def compare_processes(file: Path, copies: int) -> None:
    """Print tiles per second of wall time of the whole stage with one process and with two."""
    recipe = TileRecipe()
    with tempfile.TemporaryDirectory() as temporary:
        slides, out = Path(temporary, "slides"), Path(temporary, "out")
        slides.mkdir()
        for name in ("work/scans", "work/parts", "work/receipts", "masks", "train"):
            (out / name).mkdir(parents=True)
        for k in range(copies):
            (slides / f"copy{k}{file.suffix}").symlink_to(file.resolve())
        sources = list_slides(slides).sources
        scans = {s.slide: scan(ScanUnit(s, recipe, out, False)) for s in sources}
        units = [
            CutUnit(s, recipe, out, scans[s.slide], "train", scans[s.slide].num_candidates)
            for s in sources
        ]
        rates: dict[int, list[np.ndarray]] = {1: [], 2: []}
        for _ in range(3):
            for num_workers in rates:
                rates[num_workers].append(rate(units, num_workers))
    print(f"cut to shards, {copies} copies of the slide: tiles/s of wall and of processor time")
    one, two = (np.median(rates[n], axis=0) for n in (1, 2))
    print(f"  1 process   {one[0]:6.1f} {one[1]:6.1f}")
    print(f"  2 processes {two[0]:6.1f} {two[1]:6.1f}")
    print(f"  ratio       {two[0] / one[0]:6.2f} {two[1] / one[1]:6.2f}   (ideal: 2 and 1)")


def rate(units: list[CutUnit], num_workers: int) -> np.ndarray:
    """Return tiles per second of wall time, once all processes run, and of processor time."""
    warm = [unit._replace(quota=1) for unit in units[:num_workers]]
    began, seconds, done = 0.0, 0.0, 0
    for count, (unit, answer) in enumerate(run_units(timed_cut, [*warm, *units], num_workers), 1):
        if count == len(warm):
            began = time.monotonic()
        if unit.quota > 1:
            assert not isinstance(answer, Death)
            done += unit.quota
            seconds += answer
    return done / np.array([time.monotonic() - began, seconds])


def timed_cut(unit: CutUnit) -> float:
    """Cut a slide and return the processor time that took."""
    return processor_time(cut, unit)


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
