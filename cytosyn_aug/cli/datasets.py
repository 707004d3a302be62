"""The commands for whole data sets of tiles: augment, normalize, cache, sample.

No torch is imported to show help. Exit codes: 0 done; 1 done, but some tiles failed and are named;
2 the run was refused or had to stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from cytosyn_aug.cli.options import (
    Commands,
    add_command,
    add_model,
    add_tile_work,
    add_work,
    load_generator,
    say_summary,
    shared_path,
    work_of,
)
from cytosyn_aug.config import Method

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
    augment.add_argument("--variants", type=int, default=1, metavar="K", help="of each tile")
    augment.add_argument("--mode", default="stain", choices=["stain", "resample"])
    augment.add_argument(
        "--references",
        nargs="+",
        default=[],
        metavar="DIR|FILE",
        help="laboratories to restain to: folders of tiles, slides, or saved .json; taken in turn",
    )
    augment.add_argument(
        "--strength",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="S",
        help="one, or least and largest to draw between; 1 goes to the reference, 0 stays",
    )
    augment.add_argument(
        "--preserve", default="color", choices=["color", "none"], help="none moves structure"
    )
    augment.add_argument("--steps", type=int, help="of resampling; default: the model's")
    augment.add_argument("--guidance-scale", type=float, default=1.0, help="of resampling")
    augment.add_argument(
        "--min-similarity",
        type=float,
        default=-1.0,
        metavar="C",
        help="leave out what is drawn anew and less like its source, by the cosine of features",
    )
    augment.add_argument(
        "--max-similarity", type=float, default=1.0, metavar="C", help="the same, but more like it"
    )
    augment.add_argument("--seed", type=int, default=0)
    augment.add_argument(
        "--allow-geometry-change",
        action="store_true",
        help="go on although masks lie beside tiles whose structure will move; they stay behind",
    )
    _add_input(augment)
    _add_format(augment, ["png", "webp", "tar", "latents", "images"])
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
    normalize.add_argument("--method", default="cytosyn", choices=get_args(Method))
    normalize.add_argument(
        "--stain-source",
        default="tile",
        choices=["tile", "slide"],
        help="whose stain is changed; slide is better, and even, where names say the slide",
    )
    normalize.add_argument("--strength", type=float, default=1.0, metavar="S", help="0 to 1")
    _add_input(normalize)
    _add_format(normalize, ["png", "webp", "tar"])
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
        help=".npy or .safetensors with a CLS vector a row, taken in turn",
    )
    sample.add_argument("--steps", type=int, help="default: the model's")
    sample.add_argument("--guidance-scale", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    _add_format(sample, ["png", "webp", "tar"])
    add_model(sample)
    add_tile_work(sample)
    add_work(sample)


def _add_input(parser: argparse.ArgumentParser) -> None:
    kinds = ["tree", "table", "shards", "slides"]
    parser.add_argument("--input", choices=kinds, help="what IN is; default: look")
    parser.add_argument(
        "--mpp",
        type=float,
        help="microns per pixel of the tiles, default: the model's; of slides, default: their own",
    )


def _add_format(parser: argparse.ArgumentParser, formats: list[str]) -> None:
    parser.add_argument("--format", default="png", choices=formats, help="pixels without loss")


def _augment(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    if len(args.strength) > 2:
        raise ValueError(f"got {len(args.strength)} strengths, expected one or two")
    summary = offline.augment(
        shared_path(args, args.source),
        shared_path(args, args.out),
        load_generator(args),
        references=args.references,
        variants=args.variants,
        mode=args.mode,
        strength=(args.strength[0], args.strength[-1]),
        preserve=args.preserve,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        allow_geometry_change=args.allow_geometry_change,
        min_similarity=args.min_similarity,
        max_similarity=args.max_similarity,
        format=args.format,
        **_input(args),
        work=work_of(args),
    )
    return say_summary(summary)


def _normalize(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    summary = offline.normalize(
        shared_path(args, args.source),
        shared_path(args, args.out),
        load_generator(args),
        reference=args.reference,
        method=args.method,
        stain_source=args.stain_source,
        strength=args.strength,
        format=args.format,
        **_input(args),
        work=work_of(args),
    )
    return say_summary(summary)


def _cache(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    summary = offline.cache(
        shared_path(args, args.source),
        shared_path(args, args.out),
        load_generator(args),
        contents=args.contents,
        compact=args.compact,
        **_input(args),
        work=work_of(args),
    )
    return say_summary(summary)


def _sample(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    summary = offline.sample(
        shared_path(args, args.out),
        load_generator(args),
        n=args.n,
        conditions=args.conditions,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        format=args.format,
        unit_tiles=args.unit_tiles,
        work=work_of(args),
    )
    return say_summary(summary)


def _input(args: argparse.Namespace) -> dict[str, Any]:  # Any: arguments of offline's functions
    return {"mpp": args.mpp, "input": args.input, "unit_tiles": args.unit_tiles}
