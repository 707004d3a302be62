"""Data of the report on normalised slides: what each file states, and a sample of its tiles.

The file names neither its slide nor where that lies, on purpose. Where the slide is given, it is
shown beside the result if it has the hash that the file names.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.slide import SLIDE_SUFFIXES, Slide, SlideError
from cytosyn_aug.io.tissue import TissueConfig, candidate_positions, slide_mask
from cytosyn_aug.report.measures import structure_score
from cytosyn_aug.report.tissue_colours import ColourDistribution
from cytosyn_aug.runs.manifest import open_manifest
from cytosyn_aug.slides.normalize import open_written, provenance_of
from cytosyn_aug.slides.recipe import SLIDES_COMMAND
from cytosyn_aug.stain.lab import colour_distance

_WRITTEN = (".tif", ".tiff")
_OVERVIEW_PX = 560
NUM_SHOWN = 9
NUM_WORST = 3


class SlideTile(NamedTuple):
    """A tile of a slide before and after.

    Attributes:
        x, y: Its corner in pixels of the result's finest level.
        before: uint8 [H, W, 3], or None.
        after: uint8 [H, W, 3].
        structure: Correlation of the gradients of before and after; None if they do not compare.
        distance: Mean distance in CIE Lab, or None.
    """

    x: int
    y: int
    before: np.ndarray | None
    after: np.ndarray
    structure: float | None
    distance: float | None


class SlideData(NamedTuple):
    """What a report says of a slide.

    Attributes:
        file: The result.
        provenance: What the file states of how it was made, JSON.
        size: Width and height of its finest level.
        mpp: Microns per pixel of its finest level.
        overviews: Before, or None, and after; None of a slide that is only described.
        tiles: A few, in the order of their places.
        worst: Those of the sample whose structure was kept least, the worst first.
        structures: Structure scores of the sample.
        before, after: Colours of the sample.
        problem: Why there is no before, "" if there is.
    """

    file: Path
    provenance: dict[str, Any]  # Any: JSON
    size: tuple[int, int]
    mpp: float
    overviews: tuple[np.ndarray | None, np.ndarray] | None
    tiles: list[SlideTile]
    worst: list[SlideTile]
    structures: list[float]
    before: ColourDistribution
    after: ColourDistribution
    problem: str


class WrittenSlides(NamedTuple):
    """Slides that were written, and those that were not.

    Attributes:
        slides: Each with the slide it was made from, or None if that is not known.
        failed: Name and reason.
        is_finished: Whether nothing is left to do.
        num_slides: How many the run has, of a run.
    """

    slides: list[tuple[Path, Path | None]]
    failed: list[tuple[str, str]]
    is_finished: bool = True
    num_slides: int = 0


def find_slides(made: Path, source: Path | None) -> WrittenSlides:
    """Return what `normalize-slide` wrote: the file itself, or those in a folder, by name.

    Args:
        made: A file, or a folder that is no run's.
        source: The slide it was made from, or a folder of those; None if not at hand.
    """
    files = [made] if made.is_file() else sorted(made.iterdir())
    results = [file for file in files if file.suffix.lower() in _WRITTEN and _is_ours(file)]
    return WrittenSlides([(file, source_of(file, source)) for file in results], [])


def find_run(folder: Path, source: Path | None) -> WrittenSlides | None:
    """Return the slides of a run, finished or not; None if the run is not one of slides.

    Args:
        folder: OUT, which holds a run.
        source: Where IN is now; None for where it lay.

    Raises:
        FileNotFoundError: The run went on meanwhile.
        ValueError: Its `run.json` is damaged.
    """
    manifest = open_manifest(folder)
    if manifest.identity["command"] != SLIDES_COMMAND:
        return None
    input_path = Path(manifest.context["input"]) if source is None else source
    root = input_path if input_path.is_dir() else input_path.parent
    slides: list[tuple[Path, Path | None]] = []
    failed = []
    for part in manifest.parts(["source", "status", "reason", "output"]):
        for row in part.to_pylist():
            if row["status"] == "failed":
                failed.append((row["source"], row["reason"]))
            else:
                slide = root / row["source"]
                slides.append((folder / row["output"], slide if slide.is_file() else None))
    return WrittenSlides(slides, failed, manifest.is_finished, manifest.num_tiles)


def source_of(file: Path, source: Path | None) -> Path | None:
    """Return the slide a result was made from: the one given, or that of its name in a folder."""
    if source is None or source.is_file():
        return source
    stem = file.name.removesuffix(file.suffix).removesuffix(".ome")
    endings = (*SLIDE_SUFFIXES, *_WRITTEN)
    candidates = (f for f in sorted(source.iterdir()) if f.suffix.lower() in endings)
    return next((f for f in candidates if f.stem == stem), None)


def describe_slide(file: Path) -> SlideData:
    """Return what a result says of itself, without looking at its pixels.

    Raises:
        SlideError: It cannot be read.
    """
    with open_written(file) as result:
        return _slide_data(result, None, "")


def gather_slide(file: Path, source: Path | None, num_tiles: int) -> SlideData:
    """Gather what there is to say of a slide.

    Args:
        file: What `normalize-slide` wrote.
        source: The slide it was made from, if known.
        num_tiles: Tiles that are measured, evenly spaced over the tissue.

    Raises:
        SlideError: The result cannot be read.
    """
    with open_written(file) as result:
        provenance = provenance_of(result)
        opened, problem = _open_source(source, provenance)
        with ExitStack() as stack:
            if opened is not None:
                stack.enter_context(opened)
            view = _View(result, opened, provenance)
            data = _slide_data(result, view.overviews(), problem)
            positions = view.positions(num_tiles)
            for number, (x, y) in enumerate(positions):
                is_shown = number % max(1, len(positions) // NUM_SHOWN) == 0
                _take(data, view.tile(x, y), is_shown and len(data.tiles) < NUM_SHOWN)
        return data


def _slide_data(
    result: Slide, overviews: tuple[np.ndarray | None, np.ndarray] | None, problem: str
) -> SlideData:
    return SlideData(
        file=result.file,
        provenance=provenance_of(result),
        size=(result.width_level0, result.height_level0),
        mpp=result.scale.mpp,
        overviews=overviews,
        tiles=[],
        worst=[],
        structures=[],
        before=ColourDistribution(),
        after=ColourDistribution(),
        problem=problem,
    )


def _take(data: SlideData, tile: SlideTile, is_shown: bool) -> None:
    """Count a tile; keep its pixels only if it is to be shown."""
    data.after.add(tile.after)
    if tile.before is not None:
        data.before.add(tile.before)
    if is_shown:
        data.tiles.append(tile)
    if tile.structure is not None:
        data.structures.append(tile.structure)
        worst = sorted([*data.worst, tile], key=lambda x: x.structure or 0.0)
        data.worst[:] = worst[:NUM_WORST]


def _is_ours(file: Path) -> bool:
    try:
        with Slide(file, mpp=1.0) as slide:
            return bool(provenance_of(slide))
    except (SlideError, ValueError):
        return False


def _open_source(source: Path | None, provenance: dict[str, Any]) -> tuple[Slide | None, str]:
    if source is None:
        return None, "the slide it was made from was not given or found; give --source"
    try:
        opened = Slide(source, provenance["recipe"]["slide_mpp"])
    except SlideError as error:
        return None, str(error)
    if opened.identity != provenance["source_digest"]:
        opened.close()
        return None, f"{source.name} is not the slide this was made from"
    return opened, ""


class _View:
    """A result and its slide, if at hand, by places of the result."""

    def __init__(self, result: Slide, source: Slide | None, provenance: dict[str, Any]) -> None:
        self._result, self._source = result, source
        region = provenance["recipe"]["region"]
        self._corner = (0, 0) if region is None else (region[0], region[1])
        # Pixels of the source's level 0 in one of the result's.
        self._ratio = 1.0 if source is None else result.scale.mpp / source.scale.mpp
        self._tile = TileSpec(mpp=max(TileSpec().mpp, result.scale.mpp))

    def positions(self, num_tiles: int) -> list[tuple[int, int]]:
        """Return corners of evenly spaced tiles with tissue."""
        config = TissueConfig()
        mask = slide_mask(self._result, None, config)
        corners = candidate_positions(self._result, self._result.plan(self._tile), mask, config)[0]
        step = max(1.0, len(corners) / num_tiles)
        chosen = [int(k * step) for k in range(min(num_tiles, len(corners)))]
        return [(x, y) for x, y in corners[chosen].tolist()]

    def tile(self, x: int, y: int) -> SlideTile:
        """Return the tile at a corner, before and after."""
        after = np.asarray(self._result.read_tile(x, y, self._result.plan(self._tile)))
        return _compared(x, y, self._before(x, y), after)

    def overviews(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the whole of both, reduced."""
        result = self._result
        longest = max(result.width_level0, result.height_level0)
        mpp = result.scale.mpp * max(1.0, longest / _OVERVIEW_PX)
        after = result.thumbnail(mpp).image
        if self._source is None:
            return None, after
        thumbnail = self._source.thumbnail(max(mpp, self._source.scale.mpp))
        x, y = self._corner
        ends = x + result.width_level0 * self._ratio, y + result.height_level0 * self._ratio
        box = (x, y, *ends)
        left, top, right, bottom = (round(edge / thumbnail.pixel_level0) for edge in box)
        image = Image.fromarray(thumbnail.image).crop((left, top, right, bottom))
        return np.asarray(image.resize((after.shape[1], after.shape[0]))), after

    def _before(self, x: int, y: int) -> np.ndarray | None:
        if self._source is None:
            return None
        left, top = self._corner[0] + x * self._ratio, self._corner[1] + y * self._ratio
        reading = self._source.plan(self._tile)
        try:
            return np.asarray(self._source.read_tile(round(left), round(top), reading))
        except SlideError:
            return None


def _compared(x: int, y: int, before: np.ndarray | None, after: np.ndarray) -> SlideTile:
    if before is None:
        return SlideTile(x, y, None, after, None, None)
    pair = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in (before, after))
    distance = float(colour_distance(*pair)[0])
    return SlideTile(x, y, before, after, structure_score(before, after), distance)
