"""The commands for whole data sets of tiles: augment, normalize, cache, sample.

No torch is imported to show help. Exit codes: 0 done; 1 done, but some tiles failed and are named;
2 the run was refused or had to stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from cytosyn_aug.cli.options import (
    Commands,
    add_command,
    add_model,
    add_settings,
    add_tile_work,
    add_work,
    load_generator,
    make_settings,
    say_summary,
    shared_path,
    work_of,
)
from cytosyn_aug.runs.checks import (
    check_apart,
    check_augment,
    check_count,
    check_not_overwritten,
    check_paths,
)
from cytosyn_aug.runs.recipes import (
    AugmentRecipe,
    Format,
    ImageFormat,
    NormalizeRecipe,
    SampleRecipe,
    Tiles,
    Work,
)

_NORMALIZE_FLAGS = {"source": "stain_source"}
_IN = "folder of tiles, .csv or .parquet with paths, tar shards (file or folder), or slides"


def register(commands: Commands) -> None:
    """Add the commands to those of a parser."""
    _register_augment(commands)
    _register_normalize(commands)
    _register_cache(commands)
    _register_sample(commands)


def _register_augment(commands: Commands) -> None:
    augment = add_command(
        commands,
        "augment",
        _augment,
        "write variants of all tiles of a data set, and a manifest; resumes",
        "cytosyn-aug augment TILES OUT --references LAB_A LAB_B.json --variants 2",
    )
    augment.add_argument("source", metavar="IN", type=Path, help=_IN)
    augment.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    augment.add_argument(
        "--references",
        nargs="+",
        default=[],
        metavar="DIR|FILE",
        help="laboratories to restain to: folders of tiles, slides, or saved .json; taken in turn",
    )
    add_settings(augment, AugmentRecipe)
    _add_input(augment)
    _add_format(augment, get_args(Format))
    add_model(augment)
    add_tile_work(augment)
    add_work(augment)


def _register_normalize(commands: Commands) -> None:
    normalize = add_command(
        commands,
        "normalize",
        _normalize,
        "restain all tiles of a data set to one reference; resumes",
        "cytosyn-aug normalize TILES OUT --reference LAB_A",
    )
    normalize.add_argument("source", metavar="IN", type=Path, help=_IN)
    normalize.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    normalize.add_argument(
        "--reference",
        required=True,
        nargs="+",
        metavar="DIR|FILE",
        help="folders of tiles and slides to fit one reference to, or one saved .json",
    )
    add_settings(normalize, NormalizeRecipe, flags=_NORMALIZE_FLAGS)
    _add_input(normalize)
    _add_format(normalize, get_args(ImageFormat))
    add_model(normalize)
    add_tile_work(normalize)
    add_work(normalize)


def _register_cache(commands: Commands) -> None:
    cache = add_command(
        commands,
        "cache",
        _cache,
        "put what the model sees in all tiles of a data set into a cache; resumes",
        "cytosyn-aug cache TILES CACHE --contents features",
    )
    cache.add_argument("source", metavar="IN", type=Path, help=_IN)
    cache.add_argument("out", metavar="CACHE", type=Path, help="cache to make or to add to")
    cache.add_argument(
        "--contents",
        nargs="+",
        default=["moments", "features"],
        choices=["moments", "features"],
    )
    cache.add_argument(
        "--compact", action="store_true", help="merge small shards in the end, once all is there"
    )
    _add_input(cache)
    add_model(cache)
    add_tile_work(cache)
    add_work(cache, "refused, since CACHE may hold other sets of tiles; remove it yourself")


def _register_sample(commands: Commands) -> None:
    sample = add_command(
        commands,
        "sample",
        _sample,
        "generate tiles, and write a manifest; resumes",
        "cytosyn-aug sample OUT --n 1000 --conditions features.npy",
    )
    sample.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    sample.add_argument("--n", type=int, required=True, help="tiles")
    sample.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help=".npy or .safetensors with a CLS vector per row, taken in turn",
    )
    add_settings(sample, SampleRecipe)
    _add_format(sample, get_args(ImageFormat))
    add_model(sample)
    add_tile_work(sample)
    add_work(sample)


def _add_input(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, Tiles, only=["input", "mpp"])


def _add_format(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    parser.add_argument("--format", default="png", choices=formats, help="pixels without loss")


def _augment(args: argparse.Namespace) -> int:
    recipe = make_settings(AugmentRecipe, args)
    tiles, out, work = _request(args)
    check_augment(
        recipe,
        args.format,
        num_references=len(args.references),
        has_encoder=args.encoder != "none",
    )
    check_paths(args.references)
    generator = load_generator(args)
    from cytosyn_aug.runs.execute import do_run
    from cytosyn_aug.runs.plan import plan_augment

    run = plan_augment(tiles, out, generator, args.references, recipe, args.format)
    return say_summary(do_run(run, work))


def _normalize(args: argparse.Namespace) -> int:
    recipe = make_settings(NormalizeRecipe, args, flags=_NORMALIZE_FLAGS)
    tiles, out, work = _request(args)
    check_paths(args.reference)
    generator = load_generator(args)
    from cytosyn_aug.runs.execute import do_run
    from cytosyn_aug.runs.plan import plan_normalize

    run = plan_normalize(tiles, out, generator, [args.reference], recipe, args.format)
    return say_summary(do_run(run, work))


def _cache(args: argparse.Namespace) -> int:
    tiles, out, work = _request(args)
    check_not_overwritten(out, work)
    generator = load_generator(args)
    from cytosyn_aug import offline

    summary = offline.cache(
        tiles.source,
        out,
        generator,
        contents=args.contents,
        compact=args.compact,
        mpp=tiles.mpp,
        input=tiles.input,
        unit_tiles=tiles.unit_tiles,
        work=work,
    )
    return say_summary(summary)


def _sample(args: argparse.Namespace) -> int:
    recipe, out, work = (
        make_settings(SampleRecipe, args),
        shared_path(args, args.out),
        work_of(args),
    )
    tiles = make_settings(Tiles, args, source=out)
    check_count(args.n)
    if args.conditions is not None and not args.conditions.exists():
        raise FileNotFoundError(f"{args.conditions} does not exist; give a .npy or .safetensors")
    generator = load_generator(args)
    from cytosyn_aug.runs.execute import do_run
    from cytosyn_aug.runs.plan import plan_sample

    run = plan_sample(
        out, generator, args.n, args.conditions, recipe, args.format, tiles.unit_tiles
    )
    return say_summary(do_run(run, work))


def _request(args: argparse.Namespace) -> tuple[Tiles, Path, Work]:
    """Return IN, OUT and how to work, with contradictions refused before a model is loaded."""
    tiles = make_settings(Tiles, args, source=shared_path(args, args.source))
    out, work = shared_path(args, args.out), work_of(args)
    check_apart(tiles.source, out)
    return tiles, out, work
