"""Report file: one HTML page about a run or about normalised slides, chosen and written.

    from cytosyn_aug import offline
    offline.report("augmented")  # writes augmented/report.html

The page holds its pictures and plots, needs no network and no script, prints on paper, and is the
same to the byte for the same folder. It changes nothing else: a run goes on as if it was not there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.report.run_data import gather
from cytosyn_aug.report.run_page import run_page
from cytosyn_aug.report.slide_data import find_run, find_slides
from cytosyn_aug.report.slide_page import slides_page
from cytosyn_aug.runs.folder import RUN_NAME
from cytosyn_aug.slides.recipe import SLIDES_COMMAND

NUM_TILES = 96
REPORT_NAME = "report.html"
_ATTEMPTS = 5
Seen = TypeVar("Seen")


def report(
    made: Path | str,
    *,
    out: Path | str | None = None,
    source: Path | str | None = None,
    num_tiles: int = NUM_TILES,
) -> Path:
    """Write a report on a finished or unfinished run, or on normalised slides.

    Args:
        made: OUT: the folder of a run, or a slide or a folder of slides of `normalize-slide`.
        out: .html file to write; None for `report.html` in the folder, or `<slide>.report.html`
            beside a slide.
        source: IN, where it lies now; None for where it lay when the run began. A slide that was
            written without a run does not say where it came from; then nothing of before is shown.
        num_tiles: Results that are measured for colour and structure; of slides, tiles.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no such run or slide, or no folder for the file.
        ValueError: What is there is damaged or of something else, or the file is no .html.
        OSError: The file cannot be written.
    """
    made = Path(made)
    if num_tiles < 1:
        raise ValueError(f"num_tiles is {num_tiles}, expected at least 1")
    if not made.exists():
        raise FileNotFoundError(f"{made} does not exist; give the OUT of a run, or a slide")
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"source {source} does not exist; give the IN of the run")
    beside = made / REPORT_NAME if made.is_dir() else made.with_name(f"{made.name}.{REPORT_NAME}")
    file = beside if out is None else Path(out)
    if file.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out is {file.name!r}, expected a name that ends in .html")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist; make it, or give another file")
    where = None if source is None else Path(source)
    page = _page(made, where, num_tiles)
    write_atomically(file, page.encode())
    return file


def _page(made: Path, source: Path | None, num_tiles: int) -> str:
    is_run = (made / RUN_NAME).is_file()
    slides = _unless_moving(made, lambda: find_run(made, source)) if is_run else None
    if not is_run:
        slides = find_slides(made, source)
        if made.is_file() and not slides.slides:
            raise ValueError(f"{made} is not what normalize-slide wrote; give the OUT of a run")
    if slides is not None and (is_run or slides.slides):
        name = made.resolve().name
        return slides_page(slides, title=f"{SLIDES_COMMAND}: {name}", num_tiles=num_tiles)
    return _unless_moving(made, lambda: run_page(gather(made, source=source, num_tiles=num_tiles)))


def _unless_moving(folder: Path, look: Callable[[], Seen]) -> Seen:
    """Look at a run that may be at work, whose receipts then become a manifest; again if so."""
    for attempt in range(_ATTEMPTS):
        try:
            return look()
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1 or not (folder / RUN_NAME).is_file():
                raise
    raise AssertionError
