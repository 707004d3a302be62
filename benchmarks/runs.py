"""Measure how much of the bare generator's throughput a whole run reaches.

usage: python -m benchmarks.runs [--mode resample] [--format webp] [--model DIR] [--ray]
Restains (or resamples) tiles in memory, and the same tiles from files to files with resume and
manifest, in turn, and prints the medians and their ratio. `--pause-ms` puts a pause in place of the
network, as a GPU would leave the processor free: then the ratio says whether reading and writing
keep up with a device of that speed. With `--ray` a whole run begins by starting an actor, which
loads torch and the model: two numbers of tiles tell that time from the rate.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

from cytosyn_aug import StainReference, TileGenerator, offline
from cytosyn_aug.demo import load_laboratories
from cytosyn_aug.runs import plan as plans
from cytosyn_aug.runs.edits import BatchEdit, EditedBatch, augment_edit
from cytosyn_aug.runs.inputs import list_inputs
from cytosyn_aug.runs.ray_actors import RayCluster
from cytosyn_aug.runs.reading import LoadedTile, Reader
from cytosyn_aug.runs.recipes import AugmentRecipe, Work


def main() -> None:
    """Print the medians of all repetitions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", default="stain", choices=["stain", "resample"])
    parser.add_argument("--format", default="png", choices=["png", "webp", "tar", "latents"])
    parser.add_argument("--model", help="folder or Hub id; default: tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiles", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause-ms", type=float, help="of each tile, instead of the network")
    parser.add_argument("--ray", action="store_true", help="do whole runs in one Ray actor")
    args = parser.parse_args()
    generator = TileGenerator.from_pretrained(args.model, device=args.device)
    laboratories = load_laboratories()
    reference = StainReference.fit(generator, laboratories["CMU"])
    recipe = AugmentRecipe(mode=args.mode)
    edit = augment_edit(generator, {"CMU": reference}, recipe)
    if args.ray:  # started before anything is timed
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    work = Work(progress=False, ray=RayCluster(actors=1) if args.ray else None)
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads of torch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiles(folder / "in", torch.cat(list(laboratories.values())), args.tiles)
        batches = load(folder / "in", generator)
        if args.pause_ms is not None:
            edit = paused(edit, batches[0], args.pause_ms / 1000)

        def bare() -> None:
            with generator.batches.fixed():
                for batch in batches:
                    for edited in edit(batch):
                        edited.images.cpu()

        def whole() -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            offline.augment(
                folder / "in",
                folder / "out",
                generator,
                references=[reference],
                mode=args.mode,
                format=args.format,
                work=work,
            )

        with patch.object(plans, "augment_edit", return_value=edit):
            report(bare, whole, args.tiles, args.repeats)


def write_tiles(folder: Path, tiles: torch.Tensor, count: int) -> None:
    """Write tiles, each turned and mirrored differently, as PNG."""
    folder.mkdir()
    for k in range(count):
        tile = torch.rot90(tiles[k % len(tiles)], k // len(tiles) % 4, (1, 2))
        Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{k}.png")


def load(folder: Path, generator: TileGenerator) -> list[list[LoadedTile]]:
    """Return all tiles of a folder in batches."""
    listing = list_inputs(folder, generator.tile)
    reader = Reader(listing, generator.tile, lambda height, width: None)
    tiles = [reader.read(item) for item in listing.items(0, len(listing))]
    size = generator.batch_size
    return [tiles[k : k + size] for k in range(0, len(tiles), size)]


def paused(edit: BatchEdit, batch: list[LoadedTile], pause_s: float) -> BatchEdit:
    """Return an edit that waits for so long per tile and then gives the results of one batch."""
    found = list(edit(batch))

    def wait(tiles: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        time.sleep(pause_s * len(tiles))
        for edited in found:
            rows = slice(len(tiles))
            yield replace(edited, images=edited.images[rows])

    return wait


def report(bare: Callable[[], None], whole: Callable[[], None], count: int, repeats: int) -> None:
    """Time both in turn; print tiles per second and the ratios of wall and of processor time."""
    wall: dict[str, list[float]] = {"bare": [], "whole": []}
    busy: dict[str, list[float]] = {"bare": [], "whole": []}
    bare()  # warms up
    for _ in range(repeats):
        for name, function in (("bare", bare), ("whole", whole)):
            began, began_busy = time.perf_counter(), time.process_time()
            function()
            wall[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - began_busy)
    for name, times in wall.items():
        spread = [round(count / s, 1) for s in sorted(times)]
        print(f"{name}: {count / statistics.median(times):.1f} tiles/s, {spread}")
    for name, seconds in (("wall time", wall), ("processor time", busy)):
        pairs = zip(seconds["bare"], seconds["whole"], strict=True)
        print(f"ratio of {name}: {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
