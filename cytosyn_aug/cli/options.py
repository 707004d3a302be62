"""Options that several commands share: the model, the work on a run, and its exit code.

Exit codes: 0 done; 1 done, but some items failed and are named; 2 the run was refused or had to
stop. No torch is imported to show help.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cytosyn_aug.model.generator import TileGenerator
    from cytosyn_aug.runs.execute import Summary, Work
    from cytosyn_aug.runs.ray_actors import RayCluster

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DTYPES = ["float32", "bfloat16", "float16"]
_MAX_NAMED = 20


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    sentence: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command to those of a parser, and return its own parser.

    Args:
        commands: Where to add it.
        name: What is typed.
        run: Does it and returns the exit code.
        sentence: What it does, without a full stop.
        example: A line that can be pasted.
    """
    command = commands.add_parser(
        name,
        help=sentence,
        description=f"{sentence[0].upper()}{sentence[1:]}. Example: {example}",
    )
    command.set_defaults(run=run)
    return command


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model that works on a data set."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="DIR|ID", help="folder or Hub id; default: tiny")
    add_weights(group)
    group.add_argument("--batch-size", type=int, default=16, help="tiles in the networks at once")


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Add the options of how the weights of a model are found and loaded."""
    parser.add_argument("--encoder", default="auto", help="folder, file or Hub id; or none")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--key-map", type=Path, metavar="FILE", help="JSON that renames tensors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)


def add_work(
    parser: argparse.ArgumentParser, overwrite: str = "remove what OUT holds, first"
) -> None:
    """Add the options of how a run is worked on, here or by Ray; `overwrite` is help on that."""
    group = parser.add_argument_group("work")
    group.add_argument("--dry-run", action="store_true", help="say what would be done, as JSON")
    group.add_argument("--overwrite", action="store_true", help=overwrite)
    group.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N parts, from 0"
    )
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", default="local", choices=["local", "ray"], help="this process, or Ray actors"
    )
    group.add_argument(
        "--address", help="of a running Ray, such as auto; default: RAY_ADDRESS, or start one here"
    )
    group.add_argument("--actors", type=int, metavar="N", help="default: all there is room for")
    group.add_argument(
        "--actor-cpus",
        type=int,
        metavar="N",
        help="of each; default: this process's threads of torch, 1 with cuda",
    )
    group.add_argument(
        "--actor-gpus", type=float, metavar="N", help="of each, may be 0.5; default: 1 with cuda"
    )


def add_tile_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of how tiles are cut into units and taken through."""
    group = parser.add_argument_group("units and threads")
    group.add_argument(
        "--unit-tiles", type=int, default=256, help="a kill costs at most two units of so many"
    )
    group.add_argument("--readers", type=int, default=4, help="threads that decode")
    group.add_argument("--writers", type=int, default=4, help="threads that encode")


def load_generator(args: argparse.Namespace) -> TileGenerator:
    """Return the model that was asked for, on the CPU if only Ray workers have GPUs."""
    import torch

    device = args.device
    if args.engine == "ray" and device == "cuda" and not torch.cuda.is_available():
        print(
            "No GPU on this machine: references are fitted on the CPU; Ray workers use their own "
            "GPUs",
            file=sys.stderr,
        )
        device = "cpu"
    return load_weights(args, device=device, batch_size=args.batch_size)


def load_weights(args: argparse.Namespace, *, device: str, batch_size: int) -> TileGenerator:
    """Return the model whose weights the options of `add_weights` name."""
    import torch

    from cytosyn_aug.model.generator import TileGenerator

    return TileGenerator.from_pretrained(
        args.model,
        encoder=None if args.encoder == "none" else args.encoder,
        revision=args.revision,
        key_map=args.key_map,
        device=device,
        dtype=getattr(torch, args.dtype),
        batch_size=batch_size,
    )


def work_of(args: argparse.Namespace) -> Work:
    """Return how a run is to be worked on."""
    from cytosyn_aug.runs.execute import Work

    return Work(
        shard=args.shard,
        readers=args.readers,
        writers=args.writers,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=not args.quiet,
        ray=_ray(args),
    )


def _ray(args: argparse.Namespace) -> RayCluster | None:
    from cytosyn_aug.runs.ray_actors import RayCluster

    given = {
        "address": args.address,
        "actors": args.actors,
        "cpus": args.actor_cpus,
        "gpus": args.actor_gpus,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if args.engine == "ray":
        return RayCluster(device=args.device, **asked)
    if asked:
        raise ValueError(f"{', '.join(asked)} of actors only go with --engine ray")
    return None


def shared_path(args: argparse.Namespace, path: Path) -> Path:
    """Return a path as other machines understand it, if they take part."""
    return path if args.engine == "local" else path.absolute()


def say_summary(summary: Summary) -> int:
    """Print what became of a run; return the exit code."""
    for note in summary.notes:
        print(note, file=sys.stderr)
    if summary.estimate is not None:
        print(json.dumps(summary.estimate, indent=1))
        return 1 if summary.estimate["unusable"] else 0
    _name_failures(summary.failed, summary.counts.get("failed", 0))
    counts = ", ".join(f"{number} {status}" for status, number in summary.counts.items())
    state = "" if summary.is_complete else "; the manifest follows when the other parts are done"
    print(f"{summary.out}: {counts or 'nothing in this part'}{state}")
    return 1 if summary.counts.get("failed") else 0


def _name_failures(failed: Sequence[tuple[str, str]], number: int) -> None:
    for name, reason in failed[:_MAX_NAMED]:
        shown = name.encode("unicode_escape").decode()  # names may hold line breaks
        print(f"failed: {shown} {reason}", file=sys.stderr)
    if number > _MAX_NAMED:
        print(f"and {number - _MAX_NAMED} more failed, see the manifest", file=sys.stderr)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not (index.isdigit() and count.isdigit()) or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard, expected I/N such as 0/4 to 3/4")
    return int(index), int(count)
