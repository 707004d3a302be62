"""Command line of training: `python -m training vae --recipe tiny --data TILES --out RUN`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from training import recipes
from training.data import load_tiles
from training.encoder import EncoderStage
from training.loop import recipe_dict, train
from training.vae import VaeStage


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=["vae", "encoder"])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm-start", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = getattr(recipes, f"{args.recipe}_{args.stage}")()
    print(json.dumps(recipe_dict(recipe), indent=1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiles, validation = load_tiles(args.data / "train"), load_tiles(args.data / "val")
    if args.stage == "vae":
        stage = VaeStage(recipe, tiles, validation, device, args.compile)
    else:
        stage = EncoderStage(recipe, tiles, validation, device, args.out / "teacher", args.compile)
    train(stage, recipe.loop, args.out, recipe=recipe_dict(recipe), minutes=args.minutes,
          warm_start=args.warm_start)


if __name__ == "__main__":
    main()
