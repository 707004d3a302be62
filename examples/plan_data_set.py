"""Plan a data set of any size: bytes, files, hours and money, as JSON.

    python examples/plan_data_set.py --slides 10000 --tiles 40e6 --variants 2 --tiles-per-s RATE

Formulas of docs/pages/how-to/scale.md, which says where each measured constant comes from. The
rate of a GPU is for the reader to measure (`--dry-run` of a command prints it); none is assumed
here. Nothing is read or loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cytosyn_aug.cache.diagnosis import THUMBNAIL
from cytosyn_aug.cache.spec import CacheSpec, Field
from cytosyn_aug.config import TileSpec
from cytosyn_aug.runs.outputs import BYTES_PER_PIXEL

Stored = Literal["png", "webp", "tar", "latents"]

# Seconds of one processor (LOG.md, "what reading and writing cost beside the generator", "the cache
# beside LMDB"): decode and hash a tile; encode and write a result.
READ_S = 0.0018
WRITE_S: dict[str, float] = {"png": 0.0035, "webp": 0.0016, "tar": 0.0013, "latents": 1 / 15_468}
# By benchmarks/units.py, of one processor.
LIST_S = 18e-6  # per tile of a tree of files
CUT_S = 6e-6  # per tile
LOOK_S = 1.9e-3  # per finished unit
MANIFEST_S = 11e-6  # per row
MANIFEST_BYTES = 125  # per row
LATENT_BYTES = 0.13  # per pixel of a tile, with its features


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A data set and what is kept of it.

    Attributes:
        slides: Whole slides.
        tiles: Tiles of all of them.
        variants: Results per tile.
        format: How results are stored.
        unit_tiles: Tiles per work unit.
        tile_bytes: Of a stored tile; 74 kB was measured of 8,509 tiles of H&E as lossless WebP.
        tile: Side and scale of tiles.
        cls_width: Numbers of an encoder's feature; 768 of H0-mini.
    """

    slides: int
    tiles: int
    variants: int = 1
    format: Stored = "tar"
    unit_tiles: int = 256
    tile_bytes: float = 74_000
    tile: TileSpec = field(default_factory=TileSpec)
    cls_width: int = 768

    def __post_init__(self) -> None:
        counts = (self.slides, self.tiles, self.variants, self.unit_tiles)
        if min(counts) < 1 or not 0 < self.tile_bytes < math.inf:
            raise ValueError(
                f"slides, tiles, variants and unit_tiles are {counts}, a tile has "
                f"{self.tile_bytes:g} bytes, expected at least 1 of each"
            )
        if self.format not in get_args(Stored):
            raise ValueError(f"format is {self.format!r}, expected one of {get_args(Stored)}")

    @property
    def units(self) -> int:
        """Work units."""
        return math.ceil(self.tiles / self.unit_tiles)

    @property
    def result_bytes(self) -> float:
        """Bytes of a result; a bound that the space on a disk is compared with, too."""
        per_pixel = LATENT_BYTES if self.format == "latents" else BYTES_PER_PIXEL[self.format]
        return per_pixel * self.tile.size_px**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Who does the work.

    Attributes:
        tiles_per_s: Of one worker, with all variants of a tile; `--dry-run` prints it.
        workers: Jobs of an array, or Ray actors.
        price: Per hour of a worker.
        task_hours: What a job of an array shall take.
    """

    tiles_per_s: float
    workers: int = 1
    price: float = 0.0
    task_hours: float = 4.0

    def __post_init__(self) -> None:
        amounts = (self.tiles_per_s, self.workers, self.task_hours)
        if not all(0 < amount < math.inf for amount in amounts):
            raise ValueError(
                f"rate, workers and hours of a task are {self.tiles_per_s:g}, {self.workers} and "
                f"{self.task_hours:g}, expected finite numbers of more than 0"
            )
        if not 0 <= self.price < math.inf:
            raise ValueError(f"price is {self.price:g}, expected a finite one of at least 0")


def storage(volume: Volume) -> dict[str, dict[str, int]]:
    """Return bytes and files of everything that may be kept.

    `tiles` is one tar file per slide, as `python -m training tile` writes them; a cache has one
    shard per unit until it is compacted; `while_running` are receipts and locks.
    """
    latent = volume.tile.size_px // 8
    features = Field("cls", (volume.cls_width,), "float32")
    moments = Field("moments", (2, 4, latent, latent), "float16")
    results = volume.tiles * volume.variants
    kept = {
        "tiles": (volume.tiles * volume.tile_bytes, volume.slides),
        "features": (volume.tiles * _record_bytes(volume, features), volume.units),
        "moments": (volume.tiles * _record_bytes(volume, moments), volume.units),
        "results": (
            results * volume.result_bytes,
            results if volume.format in ("png", "webp") else volume.units,
        ),
        "manifest": (results * MANIFEST_BYTES, 1),
        "while_running": (results * MANIFEST_BYTES, 2 * volume.units),
    }
    return {name: {"bytes": round(size), "files": files} for name, (size, files) in kept.items()}


def labour(volume: Volume, fleet: Fleet) -> dict[str, Any]:  # Any: JSON
    """Return hours, money, and what workers ask of processors and of the file system.

    Of one processor: `restart_s` is what every process (with Ray, only the first) spends before its
    first tile when all is done already, the most it can be; `manifest_s` what the last one spends
    at the end. `lost_worker_s` is what the death of all workers loses, two units in hand each.
    """
    worker_hours = volume.tiles / fleet.tiles_per_s / 3600
    per_tile_s = READ_S + volume.variants * WRITE_S[volume.format]
    per_tile_bytes = volume.tile_bytes + volume.variants * volume.result_bytes
    start_s = volume.tiles * (LIST_S + CUT_S)
    return {
        "worker_hours": round(worker_hours, 2),
        "hours": round(worker_hours / fleet.workers, 2),
        "price": round(worker_hours * fleet.price, 2),
        "processors_per_worker": round(fleet.tiles_per_s * per_tile_s, 2),
        "bytes_per_s": round(fleet.workers * fleet.tiles_per_s * per_tile_bytes),
        "units": volume.units,
        "array_tasks": max(1, math.ceil(worker_hours / fleet.task_hours)),
        "restart_s": round(start_s + volume.units * LOOK_S, 1),
        "manifest_s": round(volume.tiles * volume.variants * MANIFEST_S, 1),
        "lost_worker_s": round(2 * fleet.workers * volume.unit_tiles / fleet.tiles_per_s, 1),
    }


def _record_bytes(volume: Volume, content: Field) -> int:
    fields = (content, THUMBNAIL)
    return CacheSpec(tile=volume.tile, fields=fields, model_digest="").record_bytes


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; return 0, or 2 for amounts that cannot be."""
    args = _parser().parse_args(arguments)
    try:
        plan = _plan(args)
    except ValueError as error:
        print(f"plan_data_set.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan, indent=1))
    return 0


def _plan(args: argparse.Namespace) -> dict[str, object]:
    volume = Volume(
        slides=args.slides,
        tiles=args.tiles,
        variants=args.variants,
        format=args.format,
        unit_tiles=args.unit_tiles,
        tile_bytes=args.tile_bytes,
        cls_width=args.cls_width,
    )
    plan: dict[str, object] = {"storage": storage(volume)}
    if args.tiles_per_s is not None:
        fleet = Fleet(
            tiles_per_s=args.tiles_per_s,
            workers=args.workers,
            price=args.price,
            task_hours=args.task_hours,
        )
        plan["labour"] = labour(volume, fleet)
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slides", type=_count, required=True)
    parser.add_argument("--tiles", type=_count, required=True, help="of all slides, such as 40e6")
    parser.add_argument("--variants", type=int, default=1, metavar="K", help="of each tile")
    parser.add_argument("--format", default="tar", choices=["png", "webp", "tar", "latents"])
    parser.add_argument("--unit-tiles", type=int, default=256)
    parser.add_argument("--tile-bytes", type=float, default=74_000, help="of a stored tile")
    parser.add_argument("--cls-width", type=int, default=768, help="of the encoder's features")
    parser.add_argument(
        "--tiles-per-s",
        type=float,
        metavar="RATE",
        help="of one worker, as --dry-run of a command prints it; without it, storage only",
    )
    parser.add_argument("--workers", type=int, default=1, help="jobs or Ray actors")
    parser.add_argument("--price", type=float, default=0.0, help="per hour of a worker")
    parser.add_argument("--task-hours", type=float, default=4.0, help="of one job of an array")
    return parser


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no count, expected one such as 10000 or 4e7")
    return int(number)


if __name__ == "__main__":
    sys.exit(main())
