"""Colour and structure of a sample of results, and colours of references.

Pictures are read one at a time, and only numbers of them are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.tile_source import read_tiles
from cytosyn_aug.report.pictures import RunPictures
from cytosyn_aug.report.structure import gradient_correlation
from cytosyn_aug.report.tallies import ManifestRow
from cytosyn_aug.report.tissue_colours import ColourDistribution, as_images, colour_of_grey
from cytosyn_aug.runs.manifest import Manifest

_REFERENCE_TILES = 32


class Scored(NamedTuple):
    """A result and how well it kept the structure of its source, in [-1, 1]."""

    row: ManifestRow
    structure: float


@dataclass
class Measures:
    """Colours and structure of a sample of results.

    Attributes:
        before: Colours of the sources, by reference that their results went to; "" for none.
        after: Colours of the results, by reference.
        scored: Those whose structure could be compared.
        num_read: Results that were read.
        problems: Why sources or results could not be had, and how often.
    """

    before: dict[str, ColourDistribution] = field(default_factory=dict)
    after: dict[str, ColourDistribution] = field(default_factory=dict)
    scored: list[Scored] = field(default_factory=list)
    num_read: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    def structure_quantile(self, share: float) -> float | None:
        """Return the score that this share of results lies below."""
        if not self.scored:
            return None
        return float(np.quantile([x.structure for x in self.scored], share))


class ReferenceColour(NamedTuple):
    """What can be shown of a reference.

    Attributes:
        name: Its name.
        mean: Mean colour of its tissue, by axis; None if nothing tells.
        rgb: The same in grey levels, as far as recorded.
        distribution: Of its tiles, None where they are not at hand.
        tile: One of its tiles, uint8 [H, W, 3], or None.
        problem: Why there are no tiles, "" if there are.
    """

    name: str
    mean: dict[str, float] | None
    rgb: tuple[float, float, float] | None
    distribution: ColourDistribution | None
    tile: np.ndarray | None
    problem: str = ""


def measure_results(
    rows: Sequence[ManifestRow], pictures: RunPictures, *, keeps_structure: bool
) -> Measures:
    """Measure results and their sources.

    Args:
        rows: Of the manifest.
        pictures: Where they are.
        keeps_structure: Whether structure is compared at all.
    """
    measures = Measures()
    for row in rows:
        before, after = pictures.before(row), pictures.after(row)
        if pictures.has_sources and before.pixels is None:
            measures.problems[f"source: {before.problem}"] += 1
        if pictures.has_results and after.pixels is None:
            measures.problems[f"result: {after.problem}"] += 1
        measures.num_read += after.pixels is not None
        reference = row["reference"] or ""
        for pixels, into in ((before.pixels, measures.before), (after.pixels, measures.after)):
            if pixels is not None:
                into.setdefault(reference, ColourDistribution()).add(pixels)
        if keeps_structure and before.pixels is not None and after.pixels is not None:
            score = structure_score(before.pixels, after.pixels)
            if score is not None:
                measures.scored.append(Scored(row, score))
    return measures


def structure_score(before: np.ndarray, after: np.ndarray) -> float | None:
    """Return the correlation of gradients of two images [H, W, 3]; None if they do not compare."""
    if before.shape != after.shape:
        return None
    score = float(gradient_correlation(as_images(before), as_images(after))[0])
    return None if np.isnan(score) else score


def measure_references(manifest: Manifest) -> list[ReferenceColour]:
    """Measure the references of a run, from their tiles where those still are."""
    known = {entry["name"]: entry for entry in manifest.context.get("references", [])}
    named = manifest.identity.get("references", [])
    tile = TileSpec(**manifest.context.get("tile", {}))
    return [_measure_reference(entry["name"], known.get(entry["name"]), tile) for entry in named]


def _measure_reference(
    name: str,
    entry: dict[str, Any] | None,  # Any: JSON
    tile: TileSpec,
) -> ReferenceColour:
    if entry is None:
        return ReferenceColour(name, None, None, None, None, "the run does not say where it is")
    recorded = entry["rgb"]
    rgb = None if recorded is None else (recorded[0], recorded[1], recorded[2])
    mean = None if rgb is None else colour_of_grey(rgb)
    path = entry["place"]
    if path is None or Path(path).suffix == ".json":
        problem = "was given without its tiles"
        return ReferenceColour(name, mean, rgb, None, None, problem)
    try:
        tiles = read_tiles(path, tile, _REFERENCE_TILES)
    except (OSError, ValueError) as error:
        return ReferenceColour(name, mean, rgb, None, None, str(error))
    pictures = tiles.permute(0, 2, 3, 1).contiguous().numpy()
    distribution = ColourDistribution()
    for pixels in pictures:
        distribution.add(pixels)
    shown = pictures[len(pictures) // 2]
    return ReferenceColour(name, distribution.mean() or mean, rgb, distribution, shown)
