"""The `cytosyn-aug` command: parse, call one function, print where the result is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 when done and 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="cytosyn-aug", description="Synthetic H&E with a diffusion model of histology tiles."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="restain and resample sample tiles; write pictures and an index.html",
        description="Restain and resample real sample tiles with the embedded model. "
        "Example: cytosyn-aug demo --out my-demo",
    )
    demo.add_argument("--out", type=Path, default=Path("cytosyn-demo"), metavar="DIR")
    demo.add_argument("--model", type=Path, metavar="DIR", help="model folder; default: tiny")
    demo.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    from cytosyn_aug.demo import write_demo

    try:
        page = write_demo(args.out, model=args.model, seed=args.seed)
    except (OSError, ValueError) as error:
        print(f"cytosyn-aug {args.command}: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
