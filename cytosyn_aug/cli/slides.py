"""The command for whole slides: normalize-slide. No torch is imported to show help.

One slide to one file, or any number of slides to a folder as a run, which is resumed, shared and
recorded as those of tiles are. Exit codes: 0 done; 1 done, but some slides failed and are named;
2 the run was refused or had to stop.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cytosyn_aug.cli.options import (
    Commands,
    add_command,
    add_model,
    add_work,
    load_generator,
    say_summary,
    shared_path,
    work_of,
)
from cytosyn_aug.config import Method
from cytosyn_aug.runs.checks import check_apart, check_paths
from cytosyn_aug.runs.recipes import Work

if TYPE_CHECKING:
    from cytosyn_aug.model.generator import TileGenerator
    from cytosyn_aug.slides.recipe import SlideRecipe, SlideReport

_FILE_SUFFIXES = (".tif", ".tiff")
# A folder with such a name is almost certainly a forgotten .ome.tif.
_PICTURE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".czi", ".png", ".jpg", ".jpeg")


def register(commands: Commands) -> None:
    """Add the command to those of a parser."""
    command = add_command(
        commands,
        "normalize-slide",
        _normalize_slide,
        "write slides with the stain of a reference, as pyramids that keep pixels and scale only",
        "cytosyn-aug normalize-slide SLIDE.svs OUT.ome.tif --reference LAB_A",
    )
    command.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help="slide, folder of slides, or .csv or .parquet with path and any of label, mpp",
    )
    command.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="file that ends in .tif for one slide, or folder to write or continue",
    )
    command.add_argument(
        "--reference",
        required=True,
        nargs="+",
        metavar="DIR|FILE",
        help="folders of tiles and slides to fit one reference to, or one saved .json",
    )
    command.add_argument("--method", default="cytosyn", choices=get_args(Method))
    command.add_argument("--strength", type=float, default=1.0, metavar="S", help="0 to 1")
    command.add_argument(
        "--region", type=int, nargs=4, metavar=("X", "Y", "W", "H"), help="in level-0 pixels"
    )
    command.add_argument("--mpp", type=float, help="of the result; default: the slide's own")
    command.add_argument("--slide-mpp", type=float, help="where a slide states none or a wrong one")
    command.add_argument("--compression", default="jpeg", choices=["jpeg", "deflate"])
    command.add_argument("--quality", type=int, default=90, help="of JPEG")
    command.add_argument("--keep-thumbnail", action="store_true", help="labels are never kept")
    command.add_argument("--allow-damage", action="store_true", help="leave what is damaged black")
    command.add_argument(
        "--threads", dest="readers", type=int, default=4, help="that read, recolour and compress"
    )
    command.set_defaults(writers=1)
    add_model(command)
    add_work(command)


def _normalize_slide(args: argparse.Namespace) -> int:
    """Normalise one slide to a file, or slides to a folder; return the exit code."""
    from cytosyn_aug.slides.recipe import SlideRecipe

    recipe = SlideRecipe(
        strength=args.strength,
        region=None if args.region is None else tuple(args.region),
        mpp=args.mpp,
        slide_mpp=args.slide_mpp,
        compression=args.compression,
        quality=args.quality,
        keeps_thumbnail=args.keep_thumbnail,
        allows_damage=args.allow_damage,
    )
    work = work_of(args)
    check_paths(args.reference)
    is_file = args.out.suffix.lower() in _FILE_SUFFIXES
    if is_file:
        _check_one(args)
    elif args.out.suffix.lower() in _PICTURE_SUFFIXES and not args.out.is_dir():
        raise ValueError(
            f"{args.out} would become a folder; for a single slide give a name that ends in "
            ".ome.tif"
        )
    else:
        check_apart(args.source, args.out)
    generator = load_generator(args) if args.method == "cytosyn" else None
    return _one(args, recipe, generator) if is_file else _many(args, recipe, generator, work)


def _check_one(args: argparse.Namespace) -> None:
    """Refuse options that cannot be combined with one slide."""
    if args.source.is_dir():
        raise ValueError(f"{args.source} is a folder, and {args.out} names a file; give a folder")
    if args.shard != (0, 1) or args.engine != "local":
        raise ValueError(
            f"{args.out} is one file, and one slide is not shared among jobs; leave --shard and "
            "--engine away, or give a folder of slides and a folder to write"
        )


def _many(
    args: argparse.Namespace, recipe: SlideRecipe, generator: TileGenerator | None, work: Work
) -> int:
    from cytosyn_aug import offline

    summary = offline.normalize_slides(
        shared_path(args, args.source),
        shared_path(args, args.out),
        generator,
        reference=args.reference,
        method=args.method,
        recipe=recipe,
        work=work,
    )
    return say_summary(summary)


def _one(args: argparse.Namespace, recipe: SlideRecipe, generator: TileGenerator | None) -> int:
    from tqdm import tqdm

    from cytosyn_aug.runs.references import open_references
    from cytosyn_aug.slides.normalize import is_made, normalize_slide, try_slide

    opened, _ = open_references([args.reference], generator, args.method)
    (reference,) = opened.values()
    if args.dry_run:
        num_bytes, seconds = try_slide(
            args.source, reference, generator=generator, recipe=recipe, num_threads=args.readers
        )
        print(json.dumps({"output_bytes": num_bytes, "hours": round(seconds / 3600, 3)}, indent=1))
        return 0
    is_there = args.out.exists() and not args.overwrite
    if is_there and is_made(args.out, args.source, reference, recipe):
        print(f"{args.out} is up to date; use --overwrite to write it again")
        return 0
    with tqdm(unit="block", disable=args.quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = normalize_slide(
            args.source,
            args.out,
            reference,
            generator=generator,
            recipe=recipe,
            overwrite=args.overwrite,
            num_threads=args.readers,
            progress=show,
        )
    _print(report)
    return 0


def _print(report: SlideReport) -> None:
    for note in report.notes:
        print(f"{report.out.name}: {note}", file=sys.stderr)
    for x, y in report.damaged:
        print(f"{report.out.name}: damaged at x={x} y={y}, left black", file=sys.stderr)
    seams = "too little tissue to tell"
    if report.seam_ratio is not None and report.seam_ratio_before is not None:
        seams = f"{report.seam_ratio:.2f}, before {report.seam_ratio_before:.2f}"
    print(
        f"{report.out}: {report.status}, {report.width_px}x{report.height_px} px at "
        f"{report.mpp:.4g} microns/pixel, {report.tissue:.0%} tissue, seams {seams}, "
        f"{report.num_bytes:,} bytes in {report.seconds:.0f} s"
    )
