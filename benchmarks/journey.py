"""How many functions and files a model passes through on its way from a command to its encoder.

usage: python -m benchmarks.journey [--list]

Runs `offline.augment` on a few sample tiles, and notes every function of the package that holds the
generator, as an argument, in a closure, or inside of another object, until the encoder sees the
first tile. Moves are changes of file from one noted call to the next. Fewer means that a change of
how a model is used touches less.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from types import FrameType

from PIL import Image

from cytosyn_aug import StainReference, TileGenerator, offline
from cytosyn_aug.demo import load_laboratories


class Journey:
    """The functions that hold an object, in the order in which they were called.

    Attributes:
        stops: File and function of each noted call.
    """

    def __init__(self, traveller: object, package: Path, end: str) -> None:
        self.stops: list[tuple[str, str]] = []
        self._traveller, self._package, self._end = traveller, package, end
        self._has_arrived = False

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        """Take a call into account; a function for `sys.setprofile`."""
        if event != "call" or self._has_arrived:
            return
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(self._package):
            return
        name = frame.f_code.co_qualname
        self._has_arrived = name == self._end
        if any(self._is_carried(value) for value in list(frame.f_locals.values())):
            self.stops.append((file.relative_to(self._package).as_posix(), name))

    def _is_carried(self, value: object) -> bool:
        if value is self._traveller:
            return True
        inside = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
        return any(x is self._traveller for x in inside)


def main() -> None:
    """Print the numbers, and with --list every stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print every file and function")
    arguments = parser.parse_args()
    generator = TileGenerator.from_pretrained()
    tiles = load_laboratories()["CMU"][:4]
    reference = StainReference.fit(generator, tiles)
    package = Path(sys.modules["cytosyn_aug"].__file__ or "").parent
    journey = Journey(generator, package, "TileEncoder.forward")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in")
        source.mkdir()
        for k, tile in enumerate(tiles):
            picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
            picture.save(source / f"{k}.png")
        reference.save(Path(folder, "lab.json"))
        sys.setprofile(journey.note)
        references = [Path(folder, "lab.json")]
        offline.augment(source, Path(folder, "out"), generator, references=references)
        sys.setprofile(None)
    if arguments.list:
        for stop in dict.fromkeys(journey.stops):
            print(*stop)
    files = [file for file, _ in journey.stops]
    moves = sum(a != b for a, b in itertools.pairwise(files))
    functions = len(set(journey.stops))
    print(f"{functions} functions in {len(set(files))} files, {moves} moves between files")


if __name__ == "__main__":
    main()
