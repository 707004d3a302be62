"""The command for whole slides: normalize-slide. No torch is imported to show help.

Exit codes: 0 done; 1 done, but some slides failed and are named; 2 nothing could be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cytosyn_aug.config import Method

if TYPE_CHECKING:
    from cytosyn_aug.generator import TileGenerator
    from cytosyn_aug.slide_stain import Reference
    from cytosyn_aug.whole_slides import SlideReport

AddCommand = Callable[[str, Callable[..., int], str, str], argparse.ArgumentParser]


def add_command(add: AddCommand) -> None:
    """Add the command to a parser; `add` takes name, function, one sentence and an example."""
    command = add(
        "normalize-slide",
        run,
        "write slides with the stain of a reference, as pyramids that keep pixels and scale only",
        "cytosyn-aug normalize-slide SLIDE.svs OUT.ome.tif --reference LAB_A",
    )
    command.add_argument("source", metavar="IN", type=Path, help="slide, or folder of slides")
    command.add_argument("out", metavar="OUT", type=Path, help="file, or folder for a folder")
    command.add_argument(
        "--reference",
        required=True,
        nargs="+",
        metavar="DIR|FILE",
        help="folders of tiles and slides to fit to, or one saved .json",
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
    command.add_argument("--overwrite", action="store_true", help="replace what exists")
    command.add_argument("--threads", type=int, default=4)
    command.add_argument("--model", metavar="DIR|ID", help="folder or Hub id; default: tiny")
    command.add_argument("--encoder", default="auto", help="folder, file or Hub id; or none")
    command.add_argument("--device", default="cpu")
    command.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Normalise one slide or a folder of them; return the exit code."""
    from cytosyn_aug.slides import SlideError
    from cytosyn_aug.whole_slides import SlideRecipe, is_made, normalize_slide

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
    pairs = list(_pairs(args.source, args.out))
    generator = _load(args) if args.method == "cytosyn" else None
    reference = _reference(args, generator)
    failed = 0
    for slide, out in pairs:
        try:
            if out.exists() and not args.overwrite and is_made(out, slide, reference, recipe):
                print(f"{out}: is made already")
                continue
            report = normalize_slide(
                slide,
                out,
                reference,
                generator=generator,
                recipe=recipe,
                overwrite=args.overwrite,
                num_threads=args.threads,
                progress=None if args.quiet else _Progress(slide.name),
            )
        except (SlideError, FileExistsError) as error:
            if len(pairs) == 1:
                raise
            failed += 1
            print(f"failed: {error}", file=sys.stderr)
        else:
            _print(report)
    return 1 if failed else 0


class _Progress:
    """Says on stderr, at each tenth, how much of a slide is done."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, 0

    def __call__(self, done: int, total: int) -> None:
        if (tenths := 10 * done // total) > self._said:
            self._said = tenths
            print(f"{self._name}: {10 * tenths} %", file=sys.stderr)


def _pairs(source: Path, out: Path) -> Iterable[tuple[Path, Path]]:
    """Yield each slide and where it goes."""
    from cytosyn_aug.slides import SLIDE_SUFFIXES

    if not source.is_dir():
        if out.is_dir():
            raise ValueError(f"{out} is a folder; name a file, such as {out / source.stem}.ome.tif")
        yield source, out
        return
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} is inside {source}, where results would be found as slides")
    slides = sorted(
        f
        for f in source.rglob("*")
        if f.suffix.lower() in SLIDE_SUFFIXES and not f.name.startswith(".")
    )
    if not slides:
        raise ValueError(f"{source} holds no slides; expected {', '.join(SLIDE_SUFFIXES)}")
    names = [slide.relative_to(source).with_suffix(".ome.tif") for slide in slides]
    if len(set(names)) < len(names):
        raise ValueError(f"{source} holds slides that differ in their suffix only; rename them")
    yield from ((slide, out / name) for slide, name in zip(slides, names, strict=True))


def _load(args: argparse.Namespace) -> TileGenerator:
    from cytosyn_aug.generator import TileGenerator

    encoder = None if args.encoder == "none" else args.encoder
    return TileGenerator.from_pretrained(args.model, encoder=encoder, device=args.device)


def _reference(args: argparse.Namespace, generator: TileGenerator | None) -> Reference:
    from cytosyn_aug.laboratories import open_references

    opened, _ = open_references([args.reference], generator, args.method)
    return next(iter(opened.values()))


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
