"""Command line of training: a subcommand per stage, with the options of that stage.

Wrong or missing options are named before torch is loaded, unknown recipes before data is. Networks
that a stage has no use for are named and left alone, so that a script may hand one list of them to
all stages.

Exit codes: 0 done; 1 `tile`: slides or tiles are missing, each by name; 2 wrong options, or data or
weights that do not fit; 143 a signal came (SIGTERM), and the run was saved.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from training.stage_inputs import NEEDED, OPTIONAL, TRAINED, StageInputs

if TYPE_CHECKING:  # --help, and what is wrong with options, come without torch
    import torch
    from torch import Tensor

    from training.data.cutting import TileRecipe
    from training.data.sources import Named, SlideListing

_STAGES = {  # what it does, as a sentence, and the end of an example
    "tile": (
        "cut slides, or take tiles that were cut elsewhere, into shards that training reads",
        "--slides SLIDES --manifest gdc_manifest.txt --recipe xl --workers 32 --out TILES",
    ),
    "vae": ("train the autoencoder", "--data TILES --out RUNS/vae"),
    "encoder": ("train the encoder of tiles", "--data TILES --out RUNS/encoder"),
    "latents": (
        "encode tiles once, for the stages sit and distil",
        "--data TILES --vae RUNS/vae --encoder RUNS/encoder --out LATENTS",
    ),
    "sit": (
        "train the transformer on stored latents",
        "--data TILES --vae RUNS/vae --encoder RUNS/encoder --latents LATENTS --out RUNS/sit",
    ),
    "repae": (
        "train autoencoder and transformer end to end",
        "--data TILES --vae RUNS/vae --encoder RUNS/encoder --sit RUNS/sit --out RUNS/repae",
    ),
    "distil": (
        "distil the transformer into a student of few steps",
        "--data TILES --vae RUNS/vae --encoder RUNS/encoder --latents LATENTS --teacher RUNS/sit "
        "--out RUNS/distil",
    ),
    "decoder": (
        "train a small decoder beside that of the autoencoder",
        "--data TILES --vae RUNS/vae --out RUNS/decoder",
    ),
    "export": (
        "write the networks of several runs as one model folder",
        "--vae RUNS/vae --encoder RUNS/encoder --sit RUNS/sit --out MODEL",
    ),
    "evaluate": (
        "judge a model on tiles of held-out slides",
        "--data TILES --model MODEL --extractors tiny alexnet --out REPORT",
    ),
    "restaining": (
        "compare ways of restaining on the tiles of several slides",
        "--data TILES/val --model MODEL --out REPORT",
    ),
}
_NETWORKS = {
    "vae": "run or model folder of the autoencoder; several are averaged",
    "encoder": "run or model folder of the encoder; or folder or file of H0-mini",
    "latents": "folder that the latents stage wrote",
    "sit": "run or model folder of the transformer",
    "teacher": "run or model folder of the transformer that is distilled",
    "student": "run or model folder of the transformer of few steps",
    "decoder": "run or model folder of the small decoder",
}
_LEFT_ALONE = ("vae", "encoder", "latents", "sit")  # where a stage has no use for them
SAMPLERS = ("student", "ab2", "euler_maruyama")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; return the exit code. Wrong options end the process, as argparse does.

    Args:
        arguments: Without the program's name; None for the process's own.
    """
    args = parse(arguments)
    _check_options(args)
    run: Callable[[argparse.Namespace], int] = args.run_stage
    try:
        return run(args)
    except (ArithmeticError, OSError, ValueError) as error:
        print(f"training {args.stage}: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line without asking what it lacks; ends the process if it is wrong.

    Args:
        arguments: Without the program's name; None for the process's own.
    """
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Build a model from slides. Each stage reads what earlier ones wrote.",
        epilog="`python -m training STAGE --help` shows the options of a stage, with an example.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    _add_tile(_add_stage(stages, "tile", _tile, ()))
    for name in TRAINED:
        if name == "sit":  # which trains on them
            _add_latents(_add_stage(stages, "latents", _write_latents, ("data", "out")))
        _add_trained(_add_stage(stages, name, _train, ("data", "out")), name)
    _add_export(_add_stage(stages, "export", _export, ("out",)))
    _add_evaluate(_add_stage(stages, "evaluate", _evaluate, ("data", "out")))
    _add_restaining(_add_stage(stages, "restaining", _compare_restaining, ("data", "out")))
    return parser


def _add_stage(
    stages: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    needed: tuple[str, ...],
) -> argparse.ArgumentParser:
    """Add a stage with the options of all; `needed` ones are asked for beside its networks."""
    text, example = _STAGES[name]
    parser = stages.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  python -m training {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # leaves the example on one line
    )
    needed += NEEDED.get(name, ())
    parser.set_defaults(run_stage=run, parser=parser, needed=needed)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        default="tiny",
        metavar="NAME",
        help="tiny, xl, smoke or another name in training/recipes.py; default: tiny",
    )


def _add_networks(parser: argparse.ArgumentParser, stage: str) -> None:
    used = NEEDED.get(stage, ()) + OPTIONAL.get(stage, ())
    group = parser.add_argument_group("networks") if used else parser
    for name, text in _NETWORKS.items():
        if name not in used and name not in _LEFT_ALONE:
            continue
        group.add_argument(
            f"--{name}",
            type=Path,
            nargs="+" if name == "vae" else None,
            metavar="DIR",
            help=text if name in used else argparse.SUPPRESS,
        )


def _add_data(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help=text)


def _add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")


def _add_tile(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="to write, continue")
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
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--check-md5", action="store_true", help="compare with the manifest")
    parser.add_argument("--verify", action="store_true", help="read every tile of --out again")


_TILES_HELP = "folder that `tile` wrote, or with train/<slide>/<tile> and val/<slide>/<tile>"


def _add_trained(parser: argparse.ArgumentParser, stage: str) -> None:
    _add_recipe(parser)
    _add_data(parser, _TILES_HELP)
    _add_out(parser, "folder of the run, continued if it is there")
    _add_networks(parser, stage)
    parser.add_argument(
        "--warm-start", type=Path, metavar="DIR", help="run or model folder to start from"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="save and stop after so many"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    _add_threads(parser)


def _add_latents(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_data(parser, _TILES_HELP)
    _add_out(parser, "folder for the latents, continued if it is there")
    _add_networks(parser, "latents")
    _add_threads(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_out(parser, "model folder to write")
    _add_networks(parser, "export")
    group = parser.add_argument_group("model card")
    group.add_argument("--notes", type=Path, metavar="FILE", help="Markdown that opens the card")
    group.add_argument(
        "--run",
        dest="earlier_runs",
        type=_named_folder,
        nargs="+",
        default=(),
        metavar="NAME=DIR",
        help="runs that came before those of the networks",
    )
    group.add_argument(
        "--report",
        dest="reports",
        type=_named_folder,
        nargs="+",
        default=(),
        metavar="NAME=DIR",
        help="evaluations for the card, that of the exported model first",
    )
    _add_threads(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, _TILES_HELP)
    _add_out(parser, "folder for the results")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder; default: tiny")
    parser.add_argument(
        "--encoder", type=Path, metavar="DIR", help="H0-mini, for a model exported without encoder"
    )
    group = parser.add_argument_group("judging", "what is left out keeps its default")
    group.add_argument(
        "--extractors",
        nargs="+",
        metavar="NAME",
        help="networks that judge: tiny, own, alexnet, NAME=SOURCE; see training/evaluation",
    )
    group.add_argument(
        "--num", type=int, dest="num_tiles", metavar="N", help="tiles of held-out slides"
    )
    group.add_argument(
        "--num-training",
        type=int,
        dest="num_training_tiles",
        metavar="N",
        help="training tiles in which copies are sought",
    )
    group.add_argument(
        "--unseen",
        type=Path,
        metavar="DIR",
        help="DATA/unseen: tiles of training slides that were not trained on",
    )
    group.add_argument("--sampler", choices=SAMPLERS, help="of the generated tiles")
    group.add_argument("--steps", type=int, metavar="N", help="of the sampler")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="1 for none")
    group.add_argument("--codec", help="of generated tiles: memory, webp:88, jpeg:90")
    group.add_argument(
        "--mixed-codecs", metavar="REASON", help="why lossy and lossless tiles may be compared"
    )
    group.add_argument("--seed", type=int, metavar="N")
    _add_threads(parser)


def _add_restaining(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, "folder with <slide>/<tile>")
    _add_out(parser, "folder for the table")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder; default: tiny")
    parser.add_argument("--only", default="", metavar="TEXT", help="methods whose name holds this")
    _add_threads(parser)


def _named_folder(text: str) -> tuple[str, Path]:
    name, is_named, folder = text.partition("=")
    if not is_named:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=DIR")
    return name, Path(folder)


def _check_options(args: argparse.Namespace) -> None:
    """End the process, with the usage of the stage, if options are missing or contradict."""
    reads_nothing = args.dry_run and args.stage in (*TRAINED, "latents")
    if not reads_nothing:
        needed = [n for n in args.needed if n != "out" or not args.dry_run]
        missing = [f"--{name}" for name in needed if not getattr(args, name)]
        if missing:
            args.parser.error(f"{args.stage} needs {' and '.join(missing)}")
        _check_paths(args)
    if args.stage == "tile" and not args.verify:
        if (args.slides is None) == (args.tiles is None):
            args.parser.error("give --slides or --tiles, one of them")
        if args.tiles is not None and (args.manifest or args.masks):
            args.parser.error("--manifest and --masks are for --slides; leave them out")
    used = NEEDED.get(args.stage, ()) + OPTIONAL.get(args.stage, ())
    if args.stage in (*TRAINED, "latents", "export"):
        unused = [f"--{n}" for n in _LEFT_ALONE if n not in used and getattr(args, n)]
        if unused:
            print(f"training {args.stage} makes no use of {', '.join(unused)}", file=sys.stderr)


def _check_paths(args: argparse.Namespace) -> None:
    """End the process if a folder or file that the stage reads is not there."""
    names = ["data", "notes", "unseen", "warm_start", "slides", "tiles", "manifest", "slides_csv"]
    names += ["masks", *(_NETWORKS if args.stage != "evaluate" else ())]  # may be on the Hub there
    for name in names:
        given = getattr(args, name, None) or ()
        for path in given if isinstance(given, list) else [given] if given else []:
            if not path.exists():
                args.parser.error(f"--{name.replace('_', '-')} {path} is not there")


def _start(args: argparse.Namespace) -> torch.device:
    """Set the process up for torch, join the others of a launch, return the device."""
    import torch

    from training.engine.distributed import join_world

    if args.threads:
        torch.set_num_threads(args.threads)
    _, device = join_world()
    _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, where there is a glibc.

    By default it returns every large tensor to the kernel and faults it in again: a third of all
    processor time in a training step on a CPU (LOG.md, 2026-11-23).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 1 << 28)


def _inputs(args: argparse.Namespace) -> StageInputs:
    folders = {name: getattr(args, name, None) for name in _NETWORKS if name != "vae"}
    return StageInputs(recipe=args.recipe, vae=tuple(args.vae or ()), **folders)


def _tile(args: argparse.Namespace) -> int:
    from training.data.tiles import make_tiles, plan_tiles

    if args.verify:
        return _verify(args.out)
    recipe = _tile_recipe(args.recipe)
    listing = _list_sources(args, recipe)
    source = args.slides or args.tiles
    if args.out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {args.out} lies in {source}; choose a folder outside of it")
    for note in listing.notes:
        print(note, file=sys.stderr)
    _print_names("refused", listing.refused)
    if args.dry_run:
        plan = plan_tiles(listing, recipe, args.workers)
        print(json.dumps(plan, indent=1))
        return 1 if plan["failed"] else 0
    summary = make_tiles(
        listing, recipe, args.out, num_workers=args.workers, check_md5=args.check_md5
    )
    _print_names("failed", summary.failures)
    if recipe.num_tiles is not None and summary.num_tiles < recipe.num_tiles:
        lack = recipe.num_tiles - summary.num_tiles
        print(f"{lack} tiles fewer than the recipe asks for; see slides.csv", file=sys.stderr)
    print(
        f"{summary.num_tiles} tiles of {summary.num_slides} slides in {args.out}, "
        f"{len(summary.failures)} failures"
    )
    return 1 if summary.failures else 0


def _print_names(what: str, named: Sequence[Named]) -> None:
    for name, reason in named[:20]:
        print(f"{what}: {name}: {reason}", file=sys.stderr)
    if len(named) > 20:
        print(f"and {len(named) - 20} more {what}, in the tables of --out", file=sys.stderr)


def _verify(folder: Path) -> int:
    from training.data.shards import verify_tiles

    faults = 0
    for fault in verify_tiles(folder):
        print(fault, file=sys.stderr)
        faults += 1
    print(f"{folder}: {faults or 'no'} faults")
    return 1 if faults else 0


def _tile_recipe(name: str) -> TileRecipe:
    from training import recipes
    from training.data.cutting import TileRecipe

    function = getattr(recipes, f"{name}_tile", None)
    if function is None:
        raise ValueError(f"no recipe {name}_tile in training/recipes.py")
    recipe = function()
    assert isinstance(recipe, TileRecipe)
    return recipe


def _list_sources(args: argparse.Namespace, recipe: TileRecipe) -> SlideListing:
    from training.data.sources import list_slide_sources
    from training.data.tile_folders import list_tiles

    if args.tiles is not None:
        return list_tiles(args.tiles, table=args.slides_csv)
    return list_slide_sources(
        args.slides,
        manifest=args.manifest,
        table=args.slides_csv,
        masks=args.masks,
        sections=recipe.sections,
    )


def _train(args: argparse.Namespace) -> int:
    from training.build import build_stage, find_recipe
    from training.data.batches import identify
    from training.engine.loop import recipe_dict, train
    from training.plan import launch_text, plan

    device = _start(args)
    recipe = find_recipe(args.recipe, args.stage)
    settings = recipe_dict(recipe)
    print(json.dumps(settings, indent=1))
    if args.dry_run:
        print(plan(args.recipe, args.stage).text() + launch_text(args.recipe, args.stage))
        return 0
    settings["data"] = identify(args.data)  # another data set is another run
    stage = build_stage(recipe, args.data, _inputs(args), args.out, device, args.compile)
    warm_start = _starting_weights(args)
    done = train(
        stage, recipe.loop, args.out, recipe=settings, minutes=args.minutes, warm_start=warm_start
    )
    if done < recipe.loop.num_steps:
        print(f"saved at step {done:,} of {recipe.loop.num_steps:,}; run this again to go on")
        if math.isinf(args.minutes):  # asked to stop by a signal: what follows must not start
            return 128 + signal.SIGTERM
    return 0


def _starting_weights(args: argparse.Namespace) -> dict[str, Tensor] | None:
    """Return what a warm start begins with; latent statistics belong to the new run's VAE."""
    from training.engine.weights import stage_weights

    if args.warm_start is None:
        return None
    weights = stage_weights(args.warm_start, args.stage)
    return {k: v for k, v in weights.items() if not k.removeprefix("student.").startswith("bn.")}


def _write_latents(args: argparse.Namespace) -> int:
    from training.build import find_latents_recipe, write_latents
    from training.engine.loop import recipe_dict
    from training.plan import launch_text, plan_latents

    device = _start(args)
    print(json.dumps(recipe_dict(find_latents_recipe(args.recipe)), indent=1))
    if args.dry_run:
        print(plan_latents(args.recipe).text() + launch_text(args.recipe, args.stage))
        return 0
    missing = write_latents(args.recipe, args.data, _inputs(args), args.out, device)
    state = f"{missing} shards still to come from other processes" if missing else "complete"
    print(f"{args.out}: {state}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from training.build import export_parts, run_folders
    from training.export import export
    from training.model_card import CardSources, parts_text

    _start(args)
    inputs = _inputs(args)
    earlier = dict(args.earlier_runs)
    shown = set(earlier.values())
    card = CardSources(
        notes=args.notes.read_text() if args.notes else "",
        runs=earlier | {k: v for k, v in run_folders(inputs).items() if v not in shown},
        reports=dict(args.reports),
    )
    parts = export_parts(inputs)
    if args.dry_run:
        print("\n".join(parts_text(parts)))
        return 0
    outside = inputs.encoder if parts.encoder is None else None
    print(export(args.out, parts, card, encoder=outside))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from cytosyn_aug.model.checkpoint import load_model
    from cytosyn_aug.model.generator import TileGenerator
    from training.data.batches import open_split
    from training.engine.loop import recipe_dict
    from training.evaluation.evaluate import Evaluation, evaluate
    from training.plan import plan_evaluation

    device = _start(args)
    given = {f.name: getattr(args, f.name) for f in fields(Evaluation)}
    given["extractors"] = tuple(given["extractors"] or ())
    config = Evaluation(**{k: v for k, v in given.items() if v is not None})
    encoder = args.encoder or "auto"
    generator = TileGenerator.from_pretrained(args.model, encoder=encoder, device=device)
    if args.dry_run:
        print(json.dumps(recipe_dict(config), indent=1, default=str))
        assert generator.folder is not None  # it came from there
        num_held_out = len(open_split(args.data / "val", generator.tile.size_px))
        print(plan_evaluation(load_model(generator.folder), config, num_held_out))
        return 0
    print(json.dumps(evaluate(generator, args.data, args.out, config), indent=2))
    return 0


def _compare_restaining(args: argparse.Namespace) -> int:
    """Print one row per method: colour error removed where the answer is known, gap closed."""
    from cytosyn_aug.model.generator import TileGenerator
    from training.data.batches import load_tiles
    from training.evaluation.restaining import gap_closed, known_answer, methods

    device = _start(args)
    generator = TileGenerator.from_pretrained(args.model, device=device)
    if args.dry_run:
        print("\n".join(k for k in methods(generator, generator.null_condition) if args.only in k))
        return 0
    tiles = load_tiles(args.data, generator.tile.size_px)
    shuffled = generator.features(tiles.images[:: max(1, len(tiles) // 16)]).cls.mean(0)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {k: m for k, m in methods(generator, shuffled).items() if args.only in k}
    for name, method in chosen.items():
        row = f"{name:42s} {known_answer(tiles, method):.2f} {gap_closed(tiles, method):.2f}"
        print(row, flush=True)
        with (args.out / "restaining.txt").open("a") as stream:
            stream.write(row + "\n")
    return 0
