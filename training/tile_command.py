"""`python -m training tile`: parse, build a listing and a frozen recipe, call one function.

Exit codes: 0 all is there; 1 something is missing and named; 2 the run could not be made.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training import recipes
from training.data.cutting import TileRecipe
from training.data.shards import verify
from training.data.sources import Listing, Named, list_slides
from training.data.tile_folders import list_tiles
from training.data.tiles import describe, make_tiles

_EXAMPLES = """examples:
  python -m training tile --slides SLIDES --manifest gdc_manifest.txt --recipe xl --out TILES
  python -m training tile --tiles he_tiles --out TILES
  python -m training tile --verify --out TILES
"""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    args = _parser().parse_args(arguments)
    try:
        return _verify(args.out) if args.verify else _make(args)
    except (OSError, ValueError) as error:
        print(f"training tile: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training tile",
        description="Cut slides, or take tiles cut elsewhere, into shards that training reads. "
        "A run that was killed continues where it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write or continue")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="folder with slides")
    parser.add_argument("--tiles", type=Path, metavar="DIR", help="folder with tiles cut elsewhere")
    parser.add_argument("--manifest", type=Path, metavar="TSV", help="GDC manifest of --slides")
    parser.add_argument(
        "--slides-csv",
        type=Path,
        metavar="FILE",
        help="table: slide and any of patient, site, project, split, mpp; or a GDC sample sheet",
    )
    parser.add_argument("--masks", type=Path, metavar="DIR", help="<slide>.png or .geojson")
    parser.add_argument("--recipe", default="tiny", help="NAME of NAME_tile in training/recipes.py")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--check-md5", action="store_true", help="compare with the manifest")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--verify", action="store_true", help="read every tile of --out again")
    return parser


def _make(args: argparse.Namespace) -> int:
    recipe = _recipe(args.recipe)
    listing = _listing(args, recipe)
    source = args.slides or args.tiles
    if args.out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {args.out} lies in {source}; choose a folder outside of it")
    for note in listing.notes:
        print(note, file=sys.stderr)
    _name("refused", listing.refused)
    if args.dry_run:
        plan = describe(listing, recipe, args.workers)
        print(json.dumps(plan, indent=1))
        return 1 if plan["failed"] else 0
    summary = make_tiles(
        listing, recipe, args.out, num_workers=args.workers, check_md5=args.check_md5
    )
    _name("failed", summary.failures)
    if recipe.num_tiles is not None and summary.num_tiles < recipe.num_tiles:
        lack = recipe.num_tiles - summary.num_tiles
        print(f"{lack} tiles fewer than the recipe asks for; see slides.csv", file=sys.stderr)
    print(
        f"{summary.num_tiles} tiles of {summary.num_slides} slides in {args.out}, "
        f"{len(summary.failures)} failures"
    )
    return 1 if summary.failures else 0


def _name(what: str, named: Sequence[Named]) -> None:
    for name, reason in named[:20]:
        print(f"{what}: {name}: {reason}", file=sys.stderr)
    if len(named) > 20:
        print(f"and {len(named) - 20} more {what}, in the tables of --out", file=sys.stderr)


def _verify(folder: Path) -> int:
    faults = 0
    for fault in verify(folder):
        print(fault, file=sys.stderr)
        faults += 1
    print(f"{folder}: {faults or 'no'} faults")
    return 1 if faults else 0


def _recipe(name: str) -> TileRecipe:
    function = getattr(recipes, f"{name}_tile", None)
    if function is None:
        raise ValueError(f"no recipe {name}_tile in training/recipes.py")
    recipe = function()
    assert isinstance(recipe, TileRecipe)
    return recipe


def _listing(args: argparse.Namespace, recipe: TileRecipe) -> Listing:
    if (args.slides is None) == (args.tiles is None):
        raise ValueError("give --slides or --tiles, one of them; see --help")
    if args.tiles is not None:
        if args.manifest or args.masks:
            raise ValueError("--manifest and --masks are for --slides; leave them out")
        return list_tiles(args.tiles, table=args.slides_csv)
    return list_slides(
        args.slides,
        manifest=args.manifest,
        table=args.slides_csv,
        masks=args.masks,
        sections=recipe.sections,
    )
