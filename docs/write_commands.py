"""Write the reference page of commands, from what each command says to `--help`.

usage: python docs/write_commands.py
"""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parent / "pages" / "reference" / "commands.md"
INTRODUCTION = """# Commands

What every command says to `--help`. Where no script is installed, `python -m cytosyn_aug` does the
same as `cytosyn-aug`. `--help` loads no network library, so it answers at once.

*Written by `python docs/write_commands.py`; a test compares it with the commands.*
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(commands_page())
    print(PAGE)


def commands_page() -> str:
    """Return the page, in Markdown."""
    from cytosyn_aug.cli.main import main as library
    from training.command_line import main as training

    sections = [*_sections("cytosyn-aug", library), *_sections("python -m training", training)]
    return "\n".join([INTRODUCTION, *sections])


def _sections(program: str, run: Callable[[list[str]], object]) -> list[str]:
    whole = _help(run, [])
    # What has four spaces before it is the name of a command; its sentence has more.
    names = re.findall(r"^    ([a-z][a-z-]*)(?:  |$)", whole, re.MULTILINE)
    assert names, whole
    parts = [f"## {program}\n\n```text\n{whole}```\n"]
    for name in names:
        parts.append(f"## {program} {name}\n\n```text\n{_help(run, [name])}```\n")
    return parts


def _help(run: Callable[[list[str]], object], arguments: list[str]) -> str:
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "PYTHON_COLORS": "0"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        run([*arguments, "--help"])
    return said.getvalue()


if __name__ == "__main__":
    main()
