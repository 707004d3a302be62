"""Measure what restaining and resampling a tile costs: tiles/s of wall and of processor time.

Rounds of all ways are interleaved, so that other load on the machine hits them alike; medians.

    cold      nothing is known of a tile
    cached    its features come from a `LatentCache` on disk, found by the hash of its pixels
    slide     the stain of its slide was measured once
    redrawn   preserve="none": the diffusion model draws the recoloured tile anew

usage: python -m benchmarks.restain [--model FOLDER] [--rounds 5] [--threads 2]
"""

import argparse
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cytosyn_aug as ca
from cytosyn_aug.demo import load_laboratories


def main() -> None:
    """Print one row a way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder; default: tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = ca.TileGenerator.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    laboratories = load_laboratories()
    target = ca.StainReference.fit(generator, laboratories["CMU"])
    tiles = torch.cat([laboratories["Helsinki"], laboratories["TIAToolbox"]])
    tiles = tiles.repeat(-(-args.batch // len(tiles)), 1, 1, 1)[: args.batch]
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(generator, target, tiles, Path(folder))
        wall, processor = measure(ways, tiles, args.rounds)
    print(f"{generator.digest}, batches of {len(tiles)}, {args.dtype}, {args.threads} threads, "
          f"{platform.machine()}, torch {torch.__version__}, medians of {args.rounds} "
          "interleaved rounds\n\n| | tiles/s | tiles per CPU-second |\n|---|---|---|")  # fmt: skip
    for name in ways:
        print(f"| {name} | {len(tiles) / wall[name]:.1f} | {len(tiles) / processor[name]:.1f} |")


def make_ways(
    generator: ca.TileGenerator, target: ca.StainReference, tiles: Tensor, folder: Path
) -> dict[str, Callable[[Tensor], object]]:
    """Return the transforms by name; the cache is filled with the tiles."""
    cache = ca.LatentCache.open(folder, ca.encodings_spec(generator, ["features"]))
    features = functools.partial(ca.features_cached, generator, cache=cache)
    features(tiles)
    cache.flush()
    source = ca.StainReference.fit(generator, tiles)
    normalize = functools.partial(ca.StainNormalize, generator, target)
    transfer = functools.partial(ca.StainTransfer, generator, [target], p=1.0)
    return {
        "restained, cold": normalize(),
        "restained, cached": normalize(features=features),
        "restained, slide": normalize(source=source),
        "redrawn, cold": transfer(preserve="none"),
        "resampled, cold": ca.ConditionedResample(generator, p=1.0),
        "resampled, cached": ca.ConditionedResample(generator, p=1.0, features=features),
    }


def measure(
    ways: dict[str, Callable[[Tensor], object]], tiles: Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds per batch by name: of wall, and of processor time."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter(), time.process_time()
            way(tiles)
            seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, processor = (
        {name: statistics.median(x[k] for x in taken[1:]) for name, taken in seconds.items()}
        for k in (0, 1)  # the first round warms up
    )
    return wall, processor


if __name__ == "__main__":
    main()
