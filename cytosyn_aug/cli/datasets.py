"""The commands for whole data sets: augment, normalize, cache, sample, and slurm around them.

No torch is imported to show help; for exit codes see `cytosyn_aug.cli.options`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cytosyn_aug.cli.options import (
    add_model,
    add_tile_work,
    add_work,
    load_generator,
    say_summary,
    shared_path,
    work_of,
)
from cytosyn_aug.cli.slides import FILE_SUFFIXES
from cytosyn_aug.cli.slurm import SlurmJob, array_script
from cytosyn_aug.config import Method

AddCommand = Callable[[str, Callable[..., int], str, str], argparse.ArgumentParser]
_IN = "folder of tiles, .csv or .parquet with paths, tar shards (file or folder), or slides"


def add_commands(add: AddCommand, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Add the commands to a parser.

    Args:
        add: Takes name, function, one sentence and an example.
        parse: Parses a whole command line.
    """
    _add_augment(add)
    _add_normalize(add, parse)
    _add_cache(add)
    _add_sample(add)
    slurm = add(
        "slurm",
        partial(_slurm, parse),
        "print a SLURM job array that shares one of these commands among many machines",
        "cytosyn-aug slurm --shards 16 --gpus 1 -- augment TILES OUT --references LAB > job.sh",
    )
    slurm.add_argument("--shards", type=int, required=True, help="jobs of the array")
    slurm.add_argument("--gpus", type=int, default=1, help="of each job")
    slurm.add_argument("--cpus", type=int, default=8, help="of each job")
    slurm.add_argument("--memory", default="32G", help="of each job")
    slurm.add_argument("--time", default="24:00:00", help="limit of each job")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--setup", default="", help="line to run before, such as activating a venv")
    slurm.add_argument("words", nargs=argparse.REMAINDER, help="-- and the command to share")


def _add_augment(add: AddCommand) -> None:
    augment = add(
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


def _add_normalize(add: AddCommand, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    normalize = add(
        "normalize",
        partial(_normalize, parse),
        "restain all tiles of a data set, or whole slides, to one reference; resumes",
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
    _add_format(
        normalize,
        ["png", "webp", "tar", "slide"],
        "pixels without loss; slide: slides to slides, as normalize-slide does with its defaults",
    )
    add_model(normalize)
    add_tile_work(normalize)
    add_work(normalize)


def _add_cache(add: AddCommand) -> None:
    cache = add(
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


def _add_sample(add: AddCommand) -> None:
    sample = add(
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


def _add_format(
    parser: argparse.ArgumentParser, formats: list[str], text: str = "pixels without loss"
) -> None:
    parser.add_argument("--format", default="png", choices=formats, help=text)


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


def _normalize(parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace) -> int:
    if args.format == "slide":
        return _normalize_slides(parse, args)
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


# What tiles have and slides have not.
_OF_TILES = ("stain_source", "unit_tiles", "writers")


def _normalize_slides(
    parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace
) -> int:
    """Do what `normalize-slide` does, with the options that both commands have."""
    words = [str(args.source), str(args.out), "--reference", *args.reference]
    usual = vars(parse(["normalize", *words]))
    strange = [name for name in _OF_TILES if getattr(args, name) != usual[name]]
    if args.input not in (None, "slides", "table"):
        strange.append("input")
    if strange:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        raise ValueError(f"{flags} mean nothing for --format slide; see normalize-slide --help")
    slides = parse(["normalize-slide", *words])
    for name in vars(slides).keys() & vars(args).keys() - {"mpp", "run", "command", *_OF_TILES}:
        setattr(slides, name, getattr(args, name))
    slides.slide_mpp = args.mpp
    run: Callable[[argparse.Namespace], int] = slides.run
    return run(slides)


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


def _slurm(parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace) -> int:
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    nested = parse(words)  # a typing error is found now, not when the job starts
    if not hasattr(nested, "shard"):
        raise ValueError("expected augment, normalize, cache, sample or normalize-slide after --")
    if nested.shard != (0, 1) or nested.overwrite or nested.dry_run:
        raise ValueError("leave --shard, --overwrite and --dry-run away; the script says --shard")
    if nested.engine != "local":
        raise ValueError("each job of an array would start a Ray of its own; leave --engine away")
    if nested.out.suffix.lower() in FILE_SUFFIXES:
        raise ValueError(
            f"{nested.out} is one file, and one slide is not shared among jobs; give a folder of "
            "slides and a folder to write"
        )
    job = SlurmJob(
        shards=args.shards,
        gpus=args.gpus,
        cpus=args.cpus,
        memory=args.memory,
        time=args.time,
        partition=args.partition,
        account=args.account,
        setup=args.setup,
    )
    print(array_script(f"cytosyn-aug {shlex.join(words)}", nested.command, job), end="")
    return 0


def _input(args: argparse.Namespace) -> dict[str, Any]:  # Any: arguments of offline's functions
    return {"mpp": args.mpp, "input": args.input, "unit_tiles": args.unit_tiles}
