"""The `cytosyn-aug` command: parse, call one function, print where the result is."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version

from cytosyn_aug.cli import datasets, models, report, slides


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 when done, 1 if a check or tile failed, 2 for bad input."""
    args = parse(arguments)
    # Where in the code a warning arose says nothing to who typed a command.
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        print(f"cytosyn-aug {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cytosyn-aug {args.command}: stopped", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line; its `run` does it. Ends the process if it is wrong, as argparse does.

    Args:
        arguments: Without the program's name; None for the process's own.
    """
    return make_parser().parse_args(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cytosyn-aug", description="Synthetic H&E with a diffusion model of histology tiles."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('cytosyn-aug')}")
    commands = parser.add_subparsers(dest="command", required=True)
    models.register(commands)
    datasets.register(commands)
    slides.register(commands)
    report.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
