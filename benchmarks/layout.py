"""Size and shape of the code: modules, lines, rooms, floors and arrows between rooms.

usage: python -m benchmarks.layout [PACKAGE ...]

A room is a sub-package, or a module beside them. An arrow goes from a room to another one that it
imports from; a room's floor is the longest way down from it. Nothing is imported or run.
"""

import argparse
import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print one line per package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", default=["cytosyn_aug", "training"])
    for package in parser.parse_args().packages:
        files = [f for f in sorted((ROOT / package).rglob("*.py")) if f.name != "__init__.py"]
        lines = sorted(len(f.read_text().splitlines()) for f in files)
        arrows = room_arrows(package, files)
        print(
            f"{package}: {len(files)} modules, median {lines[len(lines) // 2]} lines, {sum(lines)} "
            f"in all; {len(arrows)} rooms on {num_floors(arrows)} floors, "
            f"{sum(map(len, arrows.values()))} arrows between rooms"
        )


def room_arrows(package: str, files: list[Path]) -> dict[str, set[str]]:
    """Return for each room the other rooms that it imports from."""
    rooms = {room_of(package, file): set[str]() for file in files}
    for file in files:
        here = room_of(package, file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                rooms[here] |= {n.split(".")[1] for n in names if n.startswith(f"{package}.")}
    return {room: others & rooms.keys() - {room} for room, others in rooms.items()}


def room_of(package: str, file: Path) -> str:
    """Return the part of a file's path that follows the package, without suffix."""
    return file.relative_to(ROOT / package).parts[0].removesuffix(".py")


def num_floors(arrows: dict[str, set[str]]) -> int:
    """Return the rooms of the longest way down."""

    @cache
    def height(room: str) -> int:
        return 1 + max(map(height, arrows[room]), default=0)

    return max(map(height, arrows))


if __name__ == "__main__":
    main()
