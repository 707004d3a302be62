"""The command that writes a report. No torch is imported to show help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

AddCommand = Callable[[str, Callable[..., int], str, str], argparse.ArgumentParser]


def add_report(add: AddCommand) -> None:
    """Add the command to a parser; `add` takes name, function, one sentence and an example."""
    command = add(
        "report",
        run,
        "write one HTML file about a run, finished or not, or about normalised slides",
        "cytosyn-aug report OUT --out report.html",
    )
    command.add_argument(
        "made", metavar="OUT", type=Path, help="folder of a run, or what normalize-slide wrote"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE.html", help="default: report.html in OUT"
    )
    command.add_argument(
        "--source", type=Path, metavar="IN", help="where the input is now; of slides, to show it"
    )
    command.add_argument(
        "--num-tiles",
        type=int,
        default=96,
        metavar="N",
        help="results measured for colour and structure",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    from cytosyn_aug.offline import report

    print(report(args.made, out=args.out, source=args.source, num_tiles=args.num_tiles))
    return 0
