"""Options that several commands share: the model, the work on a run, and its exit code.

Exit codes: 0 done; 1 done, but some items failed and are named; 2 the run was refused or had to
stop. No torch is imported to show help.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cytosyn_aug.runs.ray_actors import RayCluster
from cytosyn_aug.runs.recipes import Tiles, Work

if TYPE_CHECKING:
    from cytosyn_aug.model.generator import TileGenerator
    from cytosyn_aug.runs.execute import Summary

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DTYPES = ["float32", "bfloat16", "float16"]
_MAX_NAMED = 20
_RAY_FLAGS = {"cpus": "actor_cpus", "gpus": "actor_gpus"}
Settings = TypeVar("Settings")


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


def add_work(parser: argparse.ArgumentParser, overwrite: str | None = None) -> None:
    """Add the options of how a run is worked on, here or by Ray; `overwrite` is help on that."""
    group = parser.add_argument_group("work")
    add_settings(group, Work, only=["dry_run"])
    if overwrite is None:
        add_settings(group, Work, only=["overwrite"])
    else:
        group.add_argument("--overwrite", action="store_true", help=overwrite)
    group.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N parts, from 0"
    )
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", default="local", choices=["local", "ray"], help="this process, or Ray actors"
    )
    add_settings(group, RayCluster, flags=_RAY_FLAGS)


def add_tile_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of how tiles are cut into units and taken through."""
    group = parser.add_argument_group("units and threads")
    add_settings(group, Tiles, only=["unit_tiles"])
    add_settings(group, Work, only=["readers", "writers"])


def add_settings(
    parser: argparse._ActionsContainer,
    settings: type,
    *,
    only: Sequence[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add an option per field of a frozen dataclass that has a sentence as its annotation.

    Args:
        parser: Where to add them.
        settings: The dataclass, such as `AugmentRecipe`.
        only: Names of the fields; empty for all.
        flags: Names of options, with underscores, where they differ from those of their fields.
    """
    for field, kind, sentence in stated_options(settings):
        if not only or field.name in only:
            flag = "--" + flags.get(field.name, field.name).replace("_", "-")
            help = sentence[0].lower() + sentence[1:] if sentence[1].islower() else sentence
            parser.add_argument(flag, help=help.rstrip("."), **_argument(kind, field.default))


def stated_options(settings: type) -> list[tuple[Field[Any], Any, str]]:  # Any: any type
    """Return field, type and sentence of the options that a frozen dataclass states."""
    hints = get_type_hints(settings, include_extras=True)
    options = []
    for field in fields(settings):
        if get_origin(hints[field.name]) is Annotated:
            kind, sentence = get_args(hints[field.name])
            options.append((field, kind, sentence))
    return options


def make_settings(
    settings: type[Settings],
    args: argparse.Namespace,
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
    **others: object,
) -> Settings:
    """Return the dataclass that the options of `add_settings` state.

    Args:
        settings: The dataclass.
        args: The parsed command line; options that a command does not have keep their default.
        flags: As `add_settings` was given them.
        others: Values of further fields.
    """
    values: dict[str, Any] = dict(others)  # Any: fields
    for field, kind, _ in stated_options(settings):
        name = flags.get(field.name, field.name)
        if hasattr(args, name) and field.name not in values:
            value = getattr(args, name)
            values[field.name] = _range(name, value) if get_origin(kind) is tuple else value
    return settings(**values)


def _argument(kind: Any, default: Any) -> dict[str, Any]:  # Any: types, values, argparse's words
    """Return what argparse is told of a type: bool, a choice, a range, or a plain one or None."""
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "default": default}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        return {"type": kind, "nargs": "+", "default": [default[0]], "metavar": "N"}
    return {"type": kind, "default": default, "metavar": None if kind is str else "N"}


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) > 2:
        raise ValueError(f"{name} has {len(values)} values, expected one, or least and largest")
    return values[0], values[-1]


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
    """Return how a run is to be worked on, with contradictions refused."""
    return make_settings(Work, args, shard=args.shard, progress=not args.quiet, ray=_ray(args))


def _ray(args: argparse.Namespace) -> RayCluster | None:
    if args.engine == "ray":
        return make_settings(RayCluster, args, flags=_RAY_FLAGS, device=args.device)
    flags = [_RAY_FLAGS.get(field.name, field.name) for field, *_ in stated_options(RayCluster)]
    given = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} can only be combined with --engine ray")
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
    state = "" if summary.is_complete else "; the manifest follows when the other shards are done"
    print(f"{summary.out}: {counts or 'no tiles in this shard'}{state}")
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
