"""The command that says what a data set would take: arithmetic, nothing is read or loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

AddCommand = Callable[[str, Callable[..., int], str, str], argparse.ArgumentParser]


def add_command(add: AddCommand) -> None:
    """Add the command to a parser; see `cytosyn_aug.cli.datasets.add_commands`."""
    budget = add(
        "budget",
        _budget,
        "say what a data set of any size would take: bytes, files, hours and money, as JSON",
        "cytosyn-aug budget --slides 10000 --tiles 40e6 --variants 2 --tiles-per-s RATE",
    )
    budget.add_argument("--slides", type=_count, required=True)
    budget.add_argument("--tiles", type=_count, required=True, help="of all slides, such as 40e6")
    budget.add_argument("--variants", type=int, default=1, metavar="K", help="of each tile")
    budget.add_argument("--format", default="tar", choices=["png", "webp", "tar", "latents"])
    budget.add_argument("--unit-tiles", type=int, default=256)
    budget.add_argument("--tile-bytes", type=float, default=74_000, help="of a stored tile")
    budget.add_argument("--cls-width", type=int, default=768, help="of the encoder's features")
    budget.add_argument(
        "--tiles-per-s",
        type=float,
        metavar="RATE",
        help="of one worker, as --dry-run of a command prints it; without, only storage is said",
    )
    budget.add_argument("--workers", type=int, default=1, help="jobs or Ray actors")
    budget.add_argument("--price", type=float, default=0.0, help="of a worker, an hour")
    budget.add_argument("--task-hours", type=float, default=4.0, help="of one job of an array")


def _budget(args: argparse.Namespace) -> int:
    from cytosyn_aug.cli.budget import Fleet, Volume, labour, storage

    volume = Volume(
        slides=args.slides,
        tiles=args.tiles,
        variants=args.variants,
        format=args.format,
        unit_tiles=args.unit_tiles,
        tile_bytes=args.tile_bytes,
        cls_width=args.cls_width,
    )
    found: dict[str, object] = {"storage": storage(volume)}
    if args.tiles_per_s is not None:
        fleet = Fleet(
            tiles_per_s=args.tiles_per_s,
            workers=args.workers,
            price=args.price,
            task_hours=args.task_hours,
        )
        found["labour"] = labour(volume, fleet)
    print(json.dumps(found, indent=1))
    return 0


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no count, expected one such as 10000 or 4e7")
    return int(number)
