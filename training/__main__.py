"""Command line of training.

python -m training tile    --help
python -m training vae     --data TILES --out RUN
python -m training encoder --data TILES --out RUN
python -m training repae   --data TILES --out RUN --vae RUN --encoder RUN [--sit RUN]
python -m training latents --data TILES --out LATENTS --vae RUN --encoder RUN
python -m training sit     --data TILES --out RUN --vae RUN --encoder RUN --latents LATENTS
python -m training distil  --data TILES --out RUN --vae RUN --encoder RUN --latents LATENTS
                           --teacher RUN
python -m training decoder --data TILES --out RUN --vae RUN
python -m training export  --vae RUN --encoder RUN --sit RUN [--student RUN] [--decoder RUN]
                           --out FOLDER [--notes FILE] [--run NAME=RUN ...]
                           [--report NAME=REPORT ...]
python -m training evaluate --data TILES --model FOLDER --out REPORT [--extractors tiny alexnet]
                           [--encoder H0_MINI]
python -m training restaining --data SLIDES --model FOLDER --out REPORT

TILES holds train/<slide>/<tile> and val/<slide>/<tile>, or is what `tile` wrote.
Runs resume from their own folder. Exit code 143: SIGTERM came, and the run was saved.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from cytosyn_aug.model.checkpoint import load_model
from cytosyn_aug.model.generator import Sampler, TileGenerator
from training.build import (
    TRAINED,
    Sources,
    build_stage,
    export_parts,
    find_latents_recipe,
    find_recipe,
    write_latents,
)
from training.data.batches import identify, load_tiles, open_tiles
from training.engine.distributed import join_world
from training.engine.loop import recipe_dict, train
from training.engine.weights import stage_weights
from training.evaluation.evaluate import Evaluation, evaluate
from training.evaluation.restaining import gap_closed, known_answer, methods
from training.export import export
from training.model_card import CardSources, parts_text
from training.plan import launch_text, plan, plan_evaluation, plan_latents
from training.tile_command import main as run_tile_command


def main() -> None:
    """Parse, build a frozen recipe, call one function."""
    if sys.argv[1:2] == ["tile"]:  # has options and exit codes of its own
        raise SystemExit(run_tile_command(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*TRAINED, "latents", "export", "evaluate", "restaining"])
    parser.add_argument("--recipe", default="tiny", help="name in training/recipes.py")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--vae",
        type=Path,
        nargs="+",
        default=(),
        help="run or model folder of the autoencoder; several are averaged",
    )
    parser.add_argument("--encoder", type=Path, help="run or model folder of the encoder")
    parser.add_argument("--latents", type=Path, help="what the latents stage wrote")
    parser.add_argument("--sit", type=Path, help="run or model folder of the transformer")
    parser.add_argument("--teacher", type=Path, help="distil: run or model folder of the teacher")
    parser.add_argument("--student", type=Path, help="export: run or model folder of the student")
    parser.add_argument("--decoder", type=Path, help="export: run or model folder of the small one")
    parser.add_argument("--notes", type=Path, help="export: Markdown that opens the model card")
    parser.add_argument(
        "--run",
        nargs="+",
        default=(),
        metavar="NAME=FOLDER",
        help="export: runs that came before, for the model card",
    )
    parser.add_argument(
        "--report",
        nargs="+",
        default=(),
        metavar="NAME=FOLDER",
        help="export: evaluations for the model card, the exported model's own first",
    )
    parser.add_argument("--model", type=Path, help="model folder to evaluate; default: tiny")
    _add_evaluation(parser)
    parser.add_argument("--only", default="", help="restaining: methods whose name holds this")
    parser.add_argument("--warm-start", type=Path, help="run or model folder to start from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after")
    parser.add_argument("--dry-run", action="store_true", help="print recipe and cost, and stop")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    _, device = join_world()
    _keep_freed_memory()
    try:
        if not args.dry_run:
            _need(args, "out")
        if args.stage == "export":
            _export(args)
        elif args.stage == "latents":
            _write_latents(args, device)
        elif args.stage == "evaluate":
            _evaluate(args, device)
        elif args.stage == "restaining":
            _compare_restaining(args, device)
        else:
            _train(args, device)
    except (ArithmeticError, OSError, ValueError) as error:
        raise SystemExit(f"training {args.stage}: {error}") from error


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation; what is left out keeps its default."""
    group = parser.add_argument_group("evaluate", "judge a model")
    group.add_argument(
        "--extractors", nargs="+", help="networks that judge, see training/evaluation"
    )
    group.add_argument("--num", type=int, dest="num_tiles", help="tiles of held-out slides")
    group.add_argument("--num-training", type=int, dest="num_training_tiles")
    group.add_argument(
        "--unseen", type=Path, help="DATA/unseen: of training slides, not trained on"
    )
    group.add_argument("--sampler", choices=get_args(Sampler))
    group.add_argument("--steps", type=int)
    group.add_argument("--guidance-scale", type=float)
    group.add_argument("--codec", help="of generated tiles: memory, webp:88, jpeg:90")
    group.add_argument("--mixed-codecs", help="why lossy and lossless tiles may be compared")
    group.add_argument("--seed", type=int)


def _train(args: argparse.Namespace, device: torch.device) -> None:
    if not args.dry_run:
        _need(args, "data")
    recipe = find_recipe(args.recipe, args.stage)
    settings = recipe_dict(recipe)
    print(json.dumps(settings, indent=1))
    if args.dry_run:
        print(plan(args.recipe, args.stage).text() + launch_text(args.recipe, args.stage))
        return
    settings["data"] = identify(args.data)  # another data set is another run
    stage = build_stage(recipe, args.data, _sources(args), args.out, device, args.compile)
    warm_start = _starting_weights(args)
    done = train(
        stage, recipe.loop, args.out, recipe=settings, minutes=args.minutes, warm_start=warm_start
    )
    if done < recipe.loop.num_steps:
        print(f"saved at step {done:,} of {recipe.loop.num_steps:,}; run this again to go on")
        if math.isinf(args.minutes):  # asked to stop by a signal: what follows must not start
            raise SystemExit(128 + signal.SIGTERM)


def _write_latents(args: argparse.Namespace, device: torch.device) -> None:
    print(json.dumps(recipe_dict(find_latents_recipe(args.recipe)), indent=1))
    if args.dry_run:
        print(plan_latents(args.recipe).text() + launch_text(args.recipe, args.stage))
        return
    _need(args, "data")
    missing = write_latents(args.recipe, args.data, _sources(args), args.out, device)
    state = f"{missing} shards still to come from other processes" if missing else "complete"
    print(f"{args.out}: {state}")


def _export(args: argparse.Namespace) -> None:
    sources = _sources(args)
    earlier = dict(_named_folder(text) for text in args.run)
    shown = set(earlier.values())
    card = CardSources(
        notes=args.notes.read_text() if args.notes else "",
        runs=earlier | {k: v for k, v in sources.runs().items() if v not in shown},
        reports=dict(_named_folder(text) for text in args.report),
    )
    parts = export_parts(sources)
    if args.dry_run:
        print("\n".join(parts_text(parts)))
        return
    outside = sources.encoder if parts.encoder is None else None
    print(export(args.out, parts, card, encoder=outside))


def _named_folder(text: str) -> tuple[str, Path]:
    name, is_named, folder = text.partition("=")
    if not is_named:
        raise ValueError(f"got {text!r}, expected NAME=FOLDER")
    return name, Path(folder)


def _sources(args: argparse.Namespace) -> Sources:
    sources = Sources(
        recipe=args.recipe,
        vae=tuple(args.vae),
        encoder=args.encoder,
        latents=args.latents,
        sit=args.sit,
        teacher=args.teacher,
        student=args.student,
        decoder=args.decoder,
    )
    missing = sources.missing(args.stage)
    if missing:
        flags = " and ".join(f"--{name}" for name in missing)
        raise ValueError(f"{args.stage} needs {flags}; see --help")
    return sources


def _evaluate(args: argparse.Namespace, device: torch.device) -> None:
    _need(args, "data")
    encoder = args.encoder or "auto"
    generator = TileGenerator.from_pretrained(args.model, encoder=encoder, device=device)
    given = {f.name: getattr(args, f.name) for f in fields(Evaluation)}
    given["extractors"] = tuple(given["extractors"] or ())
    config = Evaluation(**{k: v for k, v in given.items() if v is not None})
    if args.dry_run:
        print(json.dumps(recipe_dict(config), indent=1, default=str))
        assert generator.folder is not None  # it came from there
        num_held_out = len(open_tiles(args.data / "val", generator.tile.size_px))
        print(plan_evaluation(load_model(generator.folder), config, num_held_out))
        return
    print(json.dumps(evaluate(generator, args.data, args.out, config), indent=2))


def _compare_restaining(args: argparse.Namespace, device: torch.device) -> None:
    """Print one row a method: colour error removed where the answer is known, gap closed."""
    _need(args, "data")
    generator = TileGenerator.from_pretrained(args.model, device=device)
    if args.dry_run:
        print("\n".join(k for k in methods(generator, generator.null_condition) if args.only in k))
        return
    tiles = load_tiles(args.data, generator.tile.size_px)
    shuffled = generator.features(tiles.images[:: max(1, len(tiles) // 16)]).cls.mean(0)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {k: m for k, m in methods(generator, shuffled).items() if args.only in k}
    for name, method in chosen.items():
        row = f"{name:42s} {known_answer(tiles, method):.2f} {gap_closed(tiles, method):.2f}"
        print(row, flush=True)
        with (args.out / "restaining.txt").open("a") as stream:
            stream.write(row + "\n")


def _starting_weights(args: argparse.Namespace) -> dict[str, Tensor] | None:
    """Return what a warm start begins with; latent statistics belong to the new run's VAE."""
    if args.warm_start is None:
        return None
    weights = stage_weights(args.warm_start, args.stage)
    return {k: v for k, v in weights.items() if not k.removeprefix("student.").startswith("bn.")}


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


def _need(args: argparse.Namespace, *names: str) -> None:
    missing = [f"--{n}" for n in names if getattr(args, n) is None]
    if missing:
        raise ValueError(f"{args.stage} needs {' and '.join(missing)}; see --help")


if __name__ == "__main__":
    main()
