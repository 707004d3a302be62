"""Command line of training.

python -m training tile    --help
python -m training vae     --data TILES --out RUN
python -m training encoder --data TILES --out RUN
python -m training sit     --data TILES --out RUN --vae RUN --encoder RUN
python -m training decoder --data TILES --out RUN --warm-start VAE_RUN
python -m training export  --vae RUN --encoder RUN --sit RUN --out FOLDER
python -m training evaluate --data TILES --model FOLDER --out REPORT
python -m training restaining --data SLIDES --model FOLDER --out REPORT

TILES holds train/<slide>/<tile> and val/<slide>/<tile>, or is what `tile` wrote.
Runs resume from their own folder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import sys
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from cytosyn_aug.checkpoint import ModelParts
from cytosyn_aug.config import TileSpec
from cytosyn_aug.encoder import StainProbe, TileEncoder
from cytosyn_aug.generator import TileGenerator
from training import recipes
from training.data import load_tiles
from training.encoder import EncoderRecipe, EncoderStage, build_encoder
from training.evaluate import evaluate
from training.export import export
from training.loop import Stage, recipe_dict, train
from training.restaining import gap_closed, known_answer, methods
from training.sheets import write_sheet
from training.sit import SitRecipe, SitStage, build_transformer
from training.tile_command import main as run_tile_command
from training.vae import VaeRecipe, VaeStage, build_vae
from training.weights import load_stage, mean_weights, stage_weights

_TRAINED = ("vae", "encoder", "sit", "decoder")


def main() -> None:
    """Parse, build a frozen recipe, call one function."""
    if sys.argv[1:2] == ["tile"]:  # has options and exit codes of its own
        raise SystemExit(run_tile_command(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*_TRAINED, "export", "evaluate", "restaining"])
    parser.add_argument("--recipe", default="tiny", help="name in training/recipes.py")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--vae",
        type=Path,
        nargs="+",
        help="run or model folder of the autoencoder; several are averaged",
    )
    parser.add_argument("--encoder", type=Path, help="run or model folder of the encoder")
    parser.add_argument("--sit", type=Path, help="run or model folder of the transformer")
    parser.add_argument("--model", type=Path, help="model folder to evaluate; default: tiny")
    parser.add_argument("--only", default="", help="restaining: methods whose name holds this")
    parser.add_argument("--warm-start", type=Path, help="run or model folder to start from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _keep_freed_memory()
    if args.stage == "export":
        _export(args)
    elif args.stage == "evaluate":
        _evaluate(args, device)
    elif args.stage == "restaining":
        _compare_restaining(args, device)
    else:
        _train(args, device)


def _train(args: argparse.Namespace, device: torch.device) -> None:
    _need(args, "data")
    recipe = _recipe(args.recipe, args.stage)
    settings = recipe_dict(recipe)
    print(json.dumps(settings, indent=1))
    tiles, validation = load_tiles(args.data / "train"), load_tiles(args.data / "val")
    stage: Stage
    if isinstance(recipe, VaeRecipe):
        stage = VaeStage(recipe, tiles, validation, device, args.compile)
    elif isinstance(recipe, EncoderRecipe):
        cache = args.out / "teacher"
        stage = EncoderStage(recipe, tiles, validation, device, cache, args.compile)
    else:
        assert isinstance(recipe, SitRecipe)
        _need(args, "vae", "encoder")
        parts = (_load_vae(args), _load_encoder(args))
        cache = args.out / "views"
        stage = SitStage(recipe, tiles, validation, *parts, device, cache, args.compile)
    train(
        stage,
        recipe.loop,
        args.out,
        recipe=settings,
        minutes=args.minutes,
        warm_start=_starting_weights(args),
    )


def _export(args: argparse.Namespace) -> None:
    _need(args, "vae", "encoder", "sit")
    recipe = _recipe(args.recipe, "sit")
    assert isinstance(recipe, SitRecipe)
    encoder = _load_encoder(args)
    width = encoder.config["embed_dim"]
    transformer, probe = build_transformer(recipe, width), StainProbe(conditioning_dim=width)
    load_stage(args.sit, "sit", transformer)
    load_stage(args.encoder, "encoder", probe, prefix="stain_probe.")
    parts = ModelParts(_load_vae(args), transformer, encoder, probe, TileSpec(), digest="")
    print(export(args.out, parts))


def _evaluate(args: argparse.Namespace, device: torch.device) -> None:
    _need(args, "data")
    generator = TileGenerator.from_pretrained(args.model, device=device)
    tiles = load_tiles(args.data / "val", generator.tile.size_px)
    numbers = {"digest": generator.digest} | evaluate(generator, tiles)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    chosen = torch.linspace(0, len(tiles) - 1, 36).round().long()
    cls = generator.features(tiles.images[chosen]).cls
    write_sheet(args.out / "samples.png", generator.sample(cls, seed=0), columns=6)
    print(json.dumps(numbers, indent=2))


def _compare_restaining(args: argparse.Namespace, device: torch.device) -> None:
    """Print one row a method: colour error removed where the answer is known, gap closed."""
    _need(args, "data")
    generator = TileGenerator.from_pretrained(args.model, device=device)
    tiles = load_tiles(args.data, generator.tile.size_px)
    shuffled = generator.features(tiles.images[:: max(1, len(tiles) // 16)]).cls.mean(0)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {k: m for k, m in methods(generator, shuffled).items() if args.only in k}
    for name, method in chosen.items():
        row = f"{name:42s} {known_answer(tiles, method):.2f} {gap_closed(tiles, method):.2f}"
        print(row, flush=True)
        with (args.out / "restaining.txt").open("a") as stream:
            stream.write(row + "\n")


def _recipe(name: str, stage: str) -> VaeRecipe | EncoderRecipe | SitRecipe:
    function = getattr(recipes, f"{name}_{stage}", None)
    if function is None:
        raise SystemExit(f"no recipe {name}_{stage} in training/recipes.py")
    return function()


def _starting_weights(args: argparse.Namespace) -> dict[str, Tensor] | None:
    """Return what a warm start begins with; latent statistics belong to the new run's VAE."""
    if args.warm_start is None:
        return None
    weights = stage_weights(args.warm_start, args.stage)
    return {k: v for k, v in weights.items() if not k.startswith("bn.")}


def _load_vae(args: argparse.Namespace) -> AutoencoderKL:
    recipe = _recipe(args.recipe, "vae")
    assert isinstance(recipe, VaeRecipe)
    vae = build_vae(recipe)
    vae.load_state_dict(mean_weights([stage_weights(source, "vae") for source in args.vae]))
    return vae.eval().requires_grad_(False)


def _load_encoder(args: argparse.Namespace) -> TileEncoder:
    recipe = _recipe(args.recipe, "encoder")
    assert isinstance(recipe, EncoderRecipe)
    encoder = load_stage(args.encoder, "encoder", build_encoder(recipe), prefix="encoder.")
    assert isinstance(encoder, TileEncoder)
    return encoder


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
        raise SystemExit(f"{args.stage} needs {' and '.join(missing)}; see --help")


if __name__ == "__main__":
    main()
