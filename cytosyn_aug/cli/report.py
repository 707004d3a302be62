"""The command that writes a report. No torch is imported to show help."""

from __future__ import annotations

import argparse
from pathlib import Path

from cytosyn_aug.cli.options import Commands, add_command


def register(commands: Commands) -> None:
    """Add the command to those of a parser."""
    command = add_command(
        commands,
        "report",
        _report,
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


def _report(args: argparse.Namespace) -> int:
    from cytosyn_aug.offline import report

    print(report(args.made, out=args.out, source=args.source, num_tiles=args.num_tiles))
    return 0
