"""The commands about a model: demo, info, doctor, convert. No torch is imported to show help."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cytosyn_aug.cli.options import DTYPES, Commands, add_command, add_weights, load_weights


def register(commands: Commands) -> None:
    """Add the commands to those of a parser."""
    demo = add_command(
        commands,
        "demo",
        _demo,
        "restain and resample sample tiles; write pictures and an index.html",
        "cytosyn-aug demo --out my-demo",
    )
    demo.add_argument("--out", type=Path, default=Path("cytosyn-demo"), metavar="DIR")
    demo.add_argument("--model", type=Path, metavar="DIR", help="model folder; default: tiny")
    demo.add_argument("--seed", type=int, default=0)
    info = add_command(
        commands,
        "info",
        _info,
        "say what a model folder holds, and how it differs from what is expected",
        "cytosyn-aug info Owkin-Bioptimus/CytoSyn --revision main",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "check that a model does what its parts are for; write a file for bug reports",
        "cytosyn-aug doctor Owkin-Bioptimus/CytoSyn --encoder bioptimus/H0-mini --device cuda",
    )
    doctor.add_argument("--steps", type=int, default=250, help="of the reference sampler")
    doctor.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="CLS of the 8 tiles of cytosyn_aug.demo.load_samples(), if there is no encoder",
    )
    doctor.add_argument("--out", type=Path, default=Path("cytosyn-doctor.json"), metavar="FILE")
    for command in (info, doctor):
        command.add_argument("model", nargs="?", help="folder or Hub id; default: tiny")
        add_weights(command)
    _register_convert(commands)


def _register_convert(commands: Commands) -> None:
    convert = add_command(
        commands,
        "convert",
        _convert,
        "turn a REPA-E or SiT checkpoint into a model folder, or a .bin into .safetensors, once",
        "cytosyn-aug convert 0400000.pt my-model --vae sdvae-f8d4.pt",
    )
    convert.add_argument("checkpoint", type=Path, help=".pt file of the training, or a .bin")
    convert.add_argument(
        "out", type=Path, help="model folder to write, or .safetensors; must not exist"
    )
    convert.add_argument("--vae", type=Path, metavar="FILE", help="default: the checkpoint's own")
    convert.add_argument("--latent-stats", type=Path, metavar="FILE", help="*-latents-stats.pt")
    convert.add_argument("--weights", default="ema", choices=["ema", "model"])
    convert.add_argument("--time", default="repae", choices=["repae", "sit"], help="direction")
    convert.add_argument("--num-heads", type=int, help="needed unless XL")
    convert.add_argument("--size-px", type=int, default=224, help="side of its tiles")
    convert.add_argument("--mpp", type=float, default=0.5, help="microns per pixel of its tiles")
    convert.add_argument("--dtype", default="float32", choices=DTYPES)


def _demo(args: argparse.Namespace) -> int:
    from cytosyn_aug.demo import write_demo

    print(write_demo(args.out, model=args.model, seed=args.seed))
    return 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from cytosyn_aug.config import TileSpec
    from cytosyn_aug.model.convert import convert, convert_tensors

    if args.out.suffix == ".safetensors":
        print(convert_tensors(args.checkpoint, args.out))
        return 0
    folder = convert(
        args.checkpoint,
        args.out,
        tile=TileSpec(size_px=args.size_px, mpp=args.mpp),
        vae=args.vae,
        latent_stats=args.latent_stats,
        weights=args.weights,
        time=args.time,
        num_heads=args.num_heads,
        dtype=getattr(torch, args.dtype),
    )
    print(folder)
    return 0


def _info(args: argparse.Namespace) -> int:
    from cytosyn_aug.cli.info import describe_model, info_text

    facts = describe_model(load_weights(args, device=args.device, batch_size=16))
    print(json.dumps(facts, indent=2) if args.json else info_text(facts))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from cytosyn_aug.cli.doctor import as_json, examine, verdict
    from cytosyn_aug.cli.info import describe_model, environment, info_text, inventory
    from cytosyn_aug.demo import load_samples
    from cytosyn_aug.io.files import write_atomically

    content: dict[str, object] = {"environment": environment()}
    content["asked"] = {k: str(v) for k, v in vars(args).items() if k != "run"}
    checks = []
    try:
        content["files"] = inventory(args.model, args.revision)
        generator = load_weights(args, device=args.device, batch_size=16)
        content["model"] = facts = describe_model(generator)
        print(info_text(facts), end="\n\n", flush=True)
        samples = load_samples()
        for check in examine(generator, samples, features=args.features, steps=args.steps):
            mark = {True: "ok  ", False: "FAIL", None: "skip"}[check.passed]
            value = "" if check.value is None else f" {check.value:.3g}"
            print(f"{mark} {check.name}:{value} ({check.expected})", flush=True)
            checks.append(check)
    except (ArithmeticError, OSError, ValueError) as error:
        content["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:  # a model that does not load is what the file is for
        content["checks"] = as_json(checks)
        write_atomically(args.out, json.dumps(content, indent=2).encode())
        print(f"attach {args.out} to a bug report", file=sys.stderr)
    print(f"\n{verdict(checks)}")
    return int(any(c.passed is False for c in checks))
