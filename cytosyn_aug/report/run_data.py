"""Data of the report on a run: counts over all rows, and measures of a sample.

Memory and reading are bounded, whatever the run's size: rows are gone through in parts, and of the
pictures a fixed number is read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cytosyn_aug.report.measures import (
    Measures,
    ReferenceColour,
    measure_references,
    measure_results,
)
from cytosyn_aug.report.pictures import RunPictures
from cytosyn_aug.report.seams import SlideSeams, measure_seams
from cytosyn_aug.report.tallies import ManifestRow, Tally, tally_rows
from cytosyn_aug.report.throughput import Throughput, measure_throughput
from cytosyn_aug.runs.folder import RUN_NAME
from cytosyn_aug.runs.manifest import Manifest, open_manifest

NUM_PAIRS = 12
NUM_CONTENTS = 6
MAX_COLUMNS = 6
_CANDIDATES = 96
_COLUMNS = (
    "source",
    "variant",
    "status",
    "slide",
    "x",
    "y",
    "mpp",
    "output",
    "key",
    "reference",
    "strength",
    "similarity",
    "colour_distance",
)


class RunData(NamedTuple):
    """What a report says of a run.

    Attributes:
        manifest: The run.
        tally: Of all rows.
        pictures: Finds pictures.
        measures: Of a sample.
        references: As far as they are at hand.
        matrix: Rows of the manifest by content, then by reference.
        seams: Of some slides, where a run has one reference for all tiles.
        throughput: How fast it was, if that can be told.
    """

    manifest: Manifest
    tally: Tally
    pictures: RunPictures
    measures: Measures
    references: list[ReferenceColour]
    matrix: list[dict[str, ManifestRow]]
    seams: list[SlideSeams]
    throughput: Throughput | None

    @property
    def recipe(self) -> dict[str, Any]:  # Any: JSON
        """How tiles were edited."""
        return dict(self.manifest.identity["recipe"])

    @property
    def keeps_structure(self) -> bool:
        """Whether results claim to have the structure of their sources."""
        return keeps_structure(self.manifest)

    @property
    def shown_references(self) -> list[str]:
        """Names of references that get a column and a colour: those with most results."""
        groups = self.tally.references
        return sorted(groups, key=lambda name: (-groups[name].num_results, name))[:MAX_COLUMNS]

    def reference(self, name: str) -> ReferenceColour | None:
        """Return what is known of a reference."""
        return next((reference for reference in self.references if reference.name == name), None)

    @property
    def gate(self) -> tuple[float | None, float | None]:
        """Least and largest similarity of results that were kept, where there are bounds."""
        low, high = (self.recipe.get(f"{end}_similarity") for end in ("min", "max"))
        return None if low in (None, -1) else low, None if high in (None, 1) else high


def gather(folder: Path, *, source: Path | str | None, num_tiles: int) -> RunData:
    """Gather what there is to say of a run.

    Args:
        folder: OUT.
        source: Where its input lies now; None for where it lay.
        num_tiles: Results that are measured.

    Raises:
        FileNotFoundError: There is no run, or it went on meanwhile.
        ValueError: Its `run.json` is damaged.
    """
    manifest = open_manifest(folder)
    tally = tally_rows(manifest)
    pictures = RunPictures(manifest, source)
    rows = tally.sample[:num_tiles]
    seams = []
    if manifest.identity["command"] == "normalize":
        seams = measure_seams(manifest, tally, pictures)
    return RunData(
        manifest=manifest,
        tally=tally,
        pictures=pictures,
        measures=measure_results(rows, pictures, keeps_structure=keeps_structure(manifest)),
        references=measure_references(manifest),
        matrix=_matrix(manifest, tally),
        seams=seams,
        throughput=_throughput(manifest, tally, pictures),
    )


def keeps_structure(manifest: Manifest) -> bool:
    """Return whether results claim to have the structure of their sources."""
    recipe = manifest.identity["recipe"]
    is_restained = recipe.get("mode") == "stain" and recipe.get("preserve") == "color"
    return manifest.identity["command"] == "normalize" or is_restained


def round_robin(
    rows: Sequence[ManifestRow], num: int, by: Callable[[ManifestRow], Hashable]
) -> list[ManifestRow]:
    """Return some rows, from as many groups as there are, each group's first ones first."""
    groups: dict[Hashable, list[ManifestRow]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    remaining = [list(group) for group in groups.values()]
    chosen: list[ManifestRow] = []
    while remaining and len(chosen) < num:
        chosen += [group.pop(0) for group in remaining]
        remaining = [group for group in remaining if group]
    return chosen[:num]


def _matrix(manifest: Manifest, tally: Tally) -> list[dict[str, ManifestRow]]:
    """Return contents that went to most references, of different slides where possible."""
    of_reference = [row for row in tally.sample if row["reference"]]
    first = {row["key"]: row for row in reversed(of_reference)}
    contents = sorted(first.values(), key=lambda row: row["key"])
    contents = round_robin(contents, _CANDIDATES, lambda row: row["slide"] or row["label"])
    wanted = pa.array([row["key"] for row in contents], pa.string())
    results: dict[str, dict[str, ManifestRow]] = {row["key"]: {} for row in contents}
    for part in manifest.parts(_COLUMNS) if contents else ():
        for row in part.filter(pc.is_in(part["key"], wanted)).to_pylist():
            if row["reference"] and row["output"] is not None:
                results[row["key"]].setdefault(row["reference"], row)
    fullest = sorted(results.values(), key=len, reverse=True)  # stable: the order of slides stays
    return [cells for cells in fullest[:NUM_CONTENTS] if cells]


def _throughput(manifest: Manifest, tally: Tally, pictures: RunPictures) -> Throughput | None:
    times = [pictures.written_at(row) for row in tally.sample]
    written = [time for time in times if time is not None]
    began = (manifest.folder / RUN_NAME).stat().st_mtime
    return measure_throughput(began, written, tally.num_done)
