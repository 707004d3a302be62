"""Reference page of the command line: the help of every command, as Markdown.

python -m cytosyn_aug.cli.reference > docs/reference/cli.md
"""

from __future__ import annotations

import argparse
import os

from cytosyn_aug.cli.main import make_parser


def reference_page() -> str:
    """Return one section per command with its `--help`, 80 columns wide."""
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "80"  # what argparse asks for
    try:
        sections = [f"## {name}\n\n```text\n{text}```\n" for name, text in _help_texts()]
    finally:
        del os.environ["COLUMNS"]
        if width is not None:
            os.environ["COLUMNS"] = width
    return "\n".join(["# Command line\n", *sections])


def _help_texts() -> list[tuple[str, str]]:
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = [(parser.prog, parser.format_help())]
    texts += [(command.prog, command.format_help()) for command in commands.choices.values()]
    return texts


if __name__ == "__main__":
    print(reference_page(), end="")
