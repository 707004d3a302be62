"""One HTML file about what `augment`, `normalize`, `sample`, `cache` or `normalize-slide` made.

    from cytosyn_aug import offline
    offline.report("augmented")  # writes augmented/report.html

The page holds its pictures and plots, needs no network and no script, prints on paper, and is the
same to the byte for the same folder. It changes nothing else: a run goes on as if it was not there.
"""

from __future__ import annotations

from pathlib import Path

from cytosyn_aug.files import write_atomically
from cytosyn_aug.run_facts import gather
from cytosyn_aug.run_folder import RUN_NAME
from cytosyn_aug.run_report import run_page
from cytosyn_aug.slide_facts import find_slides
from cytosyn_aug.slide_report import slides_page

NUM_TILES = 96
REPORT_NAME = "report.html"
_ATTEMPTS = 5


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
        source: IN, where it lies now; None for where it lay when the run began. Slides do not say
            where they came from, so without it a report on slides shows nothing of before.
        num_tiles: Results that are measured for colour and structure, of a slide tiles.

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
    slides = [] if (made / RUN_NAME).is_file() else find_slides(made)
    if made.is_file() and not slides:
        raise ValueError(f"{made} is not what normalize-slide wrote; give the OUT of a run")
    if slides:
        where = None if source is None else Path(source)
        page = slides_page(slides, source=where, num_tiles=num_tiles)
    else:
        page = _run_page(made, source, num_tiles)
    write_atomically(file, page.encode())
    return file


def _run_page(folder: Path, source: Path | str | None, num_tiles: int) -> str:
    """Return the page of a run that may be at work, whose receipts then become a manifest."""
    for attempt in range(_ATTEMPTS):
        try:
            return run_page(gather(folder, source=source, num_tiles=num_tiles))
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1 or not (folder / RUN_NAME).is_file():
                raise
    raise AssertionError
