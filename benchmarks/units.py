"""Measure what a run costs beside its tiles: listing, work units, restart and manifest.

No pixels are read: the tiles are empty files, and their receipts are written without them. What is
printed goes into the formulas of docs/pages/how-to/scale.md; those of tiles themselves are
measured by benchmarks/runs.py and by `--dry-run`.

usage: python -m benchmarks.units [--tiles 100000] [--unit-tiles 256]
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cytosyn_aug.config import TileSpec
from cytosyn_aug.runs.execute import cut_units
from cytosyn_aug.runs.folder import RunFolder, Unit, open_run
from cytosyn_aug.runs.inputs import list_inputs
from cytosyn_aug.runs.listing import Listing
from cytosyn_aug.runs.receipts import MANIFEST_NAME

T = TypeVar("T")


def main() -> None:
    """Print one row per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--unit-tiles", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {args.tiles:,} tiles\n")
    print("| step | wall | processor | of each |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_empty(folder / "in", args.tiles)
        listing = timed("list a tree", "tile", args.tiles, lambda: list_tree(folder / "in"))
        units = timed("cut units", "tile", args.tiles, lambda: cut_units(listing, args.unit_tiles))
        with open_run(folder / "out", {}, {}, overwrite=False) as run:
            run.prepare()
            write_empty(folder / "out", args.tiles, "_v0")
            timed("write receipts", "unit", len(units), lambda: write_receipts(run, listing, units))
            left = timed("look what is done", "unit", len(units), lambda: run.to_do(units))
            assert not left
            timed("write the manifest", "tile", args.tiles, lambda: run.finish(units))
        with open_run(folder / "out", {}, {}, overwrite=False) as run:
            left = timed("the same, when all is done", "unit", len(units), lambda: run.to_do(units))
            assert not left
        size = (folder / "out" / MANIFEST_NAME).stat().st_size
        print(f"\nmanifest: {size / args.tiles:.0f} bytes per tile")
        print(f"listing: {listing.table.nbytes / args.tiles:.0f} bytes of memory per tile", end="")
        tracemalloc.start()
        list_tree(folder / "in")
        print(f", {tracemalloc.get_traced_memory()[1] / args.tiles:.0f} of Python's while made")


def write_empty(folder: Path, count: int, end: str = "") -> None:
    """Write empty tiles of 4,000 a slide, whose names end so."""
    for k in range(count):
        file = folder / f"slide{k // 4000:05d}" / f"{k * 448}_{k * 7}{end}.webp"
        if k % 4000 == 0:
            file.parent.mkdir(parents=True)
        file.touch()


def list_tree(folder: Path) -> Listing:
    """Return the listing of a tree."""
    return list_inputs(folder, TileSpec(), kind="tree")


def write_receipts(run: RunFolder, listing: Listing, units: list[Unit]) -> None:
    """Record every unit as done, with rows as long as those of real runs."""
    draw = random.Random(0)
    for unit in units:
        rows = [
            {
                "source": item.name,
                "variant": 0,
                "status": "edited",
                "reason": "",
                "slide": item.slide,
                "x": item.x,
                "y": item.y,
                "output": f"{item.stem}_v0.webp",
                "key": hashlib.sha256(item.name.encode()).hexdigest(),
                "seed": draw.getrandbits(62),
                "reference": "a",
                "strength": 1.0,
                "similarity": draw.random(),
                "colour_distance": draw.random(),
                "recipe": "0123456789abcdef",
                "model": "0123456789abcdef",
                "unit": unit.number,
            }
            for row, item in enumerate(listing.items(unit.start, unit.stop), unit.start)
        ]
        run.write_receipt(unit, rows)


def timed(step: str, thing: str, count: int, function: Callable[[], T]) -> T:
    """Print how long a step takes, and for each thing, of a process's own time."""
    began, began_processor = time.perf_counter(), time.process_time()
    result = function()
    wall, processor = time.perf_counter() - began, time.process_time() - began_processor
    each = f"{processor / count * 1e6:,.0f} us a {thing}"
    print(f"| {step} | {wall:.2f} s | {processor:.2f} s | {each} |", flush=True)
    return result


if __name__ == "__main__":
    main()
